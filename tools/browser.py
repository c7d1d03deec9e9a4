"""Find a Chromium for the browser tests, or get one: the system's where it may be installed, else Playwright's own.

    python tools/browser.py        prints one line: which browser, or what is skipped without one
"""
import os, shutil, subprocess, sys

def found():
    "Path of a Chromium or Chrome that is there, or None"
    for p in (os.environ.get('CHROME_PATH'), *map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))):
        if p and os.path.exists(p): return p
    try:
        from playwright.sync_api import sync_playwright
        with sync_playwright() as p: own = p.chromium.executable_path
        return own if os.path.exists(own) else None
    except Exception: return None

def tried(*command, seconds=60):
    "Whether a command ended well"
    try: return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, timeout=seconds, env={**os.environ, 'DEBIAN_FRONTEND': 'noninteractive'}).returncode==0
    except (OSError, subprocess.TimeoutExpired): return False

def get():
    "A browser, installed if need be; None where none can be had"
    if p := found(): return p
    if shutil.which('apt-get'):
        root, install = [] if os.geteuid()==0 else ['sudo', '-n'], ('apt-get', 'install', '-y', '-q', 'chromium')
        if (tried(*root, *install, seconds=180) or tried(*root, 'apt-get', 'update', '-q') and tried(*root, *install, seconds=180)) and (p := found()): return p
    if tried(sys.executable, '-m', 'playwright', 'install', 'chromium'): return found()

if __name__=='__main__':
    p = get()
    print(f'browser: {p}' if p else 'browser: none is here and none could be installed; the browser tests are skipped')
