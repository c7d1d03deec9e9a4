"One JupyterLab and one Chromium for all browser tests; what is skipped without a browser says so in one line"
import json, os, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT/'tools'))
from browser import found
from inlab import open_notebook, run_all

FLAGS = '--no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
SETTINGS = {'@jupyterlab/apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False, doNotDisturbMode=True),
    '@jupyterlab/notebook-extension/tracker': dict(autoStartDefaultKernel=True, windowingMode='none'), # what is not on the screen is on the page, too
    '@jupyterlab/docmanager-extension/plugin': dict(autosave=False), '@jupyter-widgets/jupyterlab-manager/plugin': dict(saveState=True)}
@pytest.fixture(scope='session')
def browser():
    api = pytest.importorskip('playwright.sync_api', reason='browser tests: playwright is not installed')
    if not (chrome := found()): pytest.skip('browser tests: no Chromium here; python tools/browser.py gets one')
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chrome, args=FLAGS)
        yield b
        b.close()

@pytest.fixture(scope='session')
def lab(browser, tmp_path_factory):
    "(URL of a JupyterLab, its root folder)"
    tmp, root = tmp_path_factory.mktemp('lab'), tmp_path_factory.mktemp('root')
    (root/'settings.ini').write_text('[ftnb]\n')
    for k,v in SETTINGS.items():
        f = tmp/'settings'/f'{k}.jupyterlab-settings'
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(json.dumps(v))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {**os.environ, **{k: str(tmp/v) for k,v in dict(JUPYTER_CONFIG_DIR='cfg', JUPYTER_DATA_DIR='data', JUPYTER_RUNTIME_DIR='rt', IPYTHONDIR='ip', JUPYTERLAB_SETTINGS_DIR='settings', JUPYTERLAB_WORKSPACES_DIR='ws').items()}}
    with (tmp/'lab.log').open('w') as log:
        srv = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0', f'--ServerApp.root_dir={root}',
            '--IdentityProvider.token=', '--ServerApp.password=', '--expose-app-in-browser'], env=env, cwd=root, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(600):
                try: urllib.request.urlopen(f'http://127.0.0.1:{port}/api', timeout=1); break
                except OSError: time.sleep(.1)
            else: pytest.fail((tmp/'lab.log').read_text()[-3000:])
            yield f'http://127.0.0.1:{port}', root
        finally:
            srv.terminate()
            srv.wait(20)

@pytest.fixture(scope='module')
def show(lab, browser):
    "Callable: a notebook of these cells, opened and run; all panels of a module in one page would hide each other's faults, so each has its own"
    url, root = lab
    pages = []
    def f(name, *cells):
        import nbformat as n
        nb = n.v4.new_notebook(cells=[n.v4.new_code_cell(c) for c in cells])
        nb.metadata.kernelspec = dict(name='python3', display_name='Python 3', language='python')
        n.write(nb, root/f'{name}.ipynb')
        page = open_notebook(browser, url, f'{name}.ipynb')
        pages.append(page)
        run_all(page)
        return page
    yield f
    for page in pages:
        page.evaluate('async () => { await window.jupyterapp.shell.currentWidget.sessionContext.shutdown() }')
        page.context.close()
