"What browser tests do in JupyterLab: open, run, change the theme, ask axe-core"
import json, os, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from pathlib import Path
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]/'tools'))
from browser import found

FLAGS = '--no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
SETTINGS = {'@jupyterlab/apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False, doNotDisturbMode=True),
    '@jupyterlab/notebook-extension/tracker': dict(autoStartDefaultKernel=True, windowingMode='none'), # what is not on the screen is on the page, too
    '@jupyterlab/docmanager-extension/plugin': dict(autosave=False), '@jupyter-widgets/jupyterlab-manager/plugin': dict(saveState=True)}
READY = '''async () => { const p = window.jupyterapp.shell.currentWidget; await p.context.ready; await p.sessionContext.ready;
  const k = p.sessionContext.session?.kernel; if (!k) throw Error('no kernel'); await k.info; return k.connectionStatus }'''
OFFLINE = ('ERR_INTERNET_DISCONNECTED', 'ERR_NAME_NOT_RESOLVED', 'favicon', '403', '404') # a laboratory without a network, or a file that JupyterLab only asks for

@contextmanager
def serve(tmp, root):
    "The URL of a JupyterLab with settings of its own in `tmp`, whose files are those of `root`"
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
            else: raise RuntimeError((tmp/'lab.log').read_text()[-3000:])
            yield f'http://127.0.0.1:{port}'
        finally:
            srv.terminate()
            srv.wait(20)

def write_cells(path, *cells):
    "A notebook of code cells"
    import nbformat as n
    nb = n.v4.new_notebook(cells=[n.v4.new_code_cell(c) for c in cells])
    nb.metadata.kernelspec = dict(name='python3', display_name='Python 3', language='python')
    n.write(nb, path)

def open_notebook(browser, url, name, width=1280, height=900):
    "The page of a notebook whose kernel is ready; `errors` collects what the console says"
    page = browser.new_context(viewport=dict(width=width, height=height), reduced_motion='reduce').new_page()
    page.set_default_timeout(60_000)
    page.errors = []
    page.on('pageerror', lambda e: page.errors.append(str(e)))
    page.on('console', lambda m: page.errors.append(m.text) if m.type=='error' and not any(o in m.text for o in OFFLINE) else None)
    page.goto(f'{url}/lab/tree/{name}?reset')
    page.wait_for_function('() => window.jupyterapp?.shell?.currentWidget?.context')
    page.evaluate(READY)
    return page

def run_all(page): page.evaluate("() => { void window.jupyterapp.commands.execute('notebook:run-all-cells') }") # its promise may never settle

def dark(page, on=True):
    name = 'JupyterLab Dark' if on else 'JupyterLab Light'
    page.evaluate("t => { void window.jupyterapp.commands.execute('apputils:change-theme', {theme: t}) }", name)
    page.wait_for_selector(f"body[data-jp-theme-name='{name}']", state='attached')

def axe_faults(page, within='.ftnb-panel'):
    "What axe-core finds in the panels, but for the slider that ipywidgets itself leaves without a name"
    from axe_playwright_python.sync_playwright import Axe
    res = Axe().run(page, context=within, options=dict(rules={'aria-input-field-name': dict(enabled=False)}))
    return [(v['id'], v['impact'], [n['html'][:160] for n in v['nodes']][:3]) for v in res.response['violations']]

def narrow(page, width=400, height=900):
    "A telephone's width, the file list closed"
    page.evaluate("() => { if (!window.jupyterapp.shell.leftCollapsed) void window.jupyterapp.commands.execute('application:toggle-left-area') }")
    page.set_viewport_size(dict(width=width, height=height))

def cut(page, within='.ftnb-panel'):
    "Elements that reach over the panel's right edge, outside what scrolls by itself"
    return page.locator(within).first.evaluate("""e => { const w = e.getBoundingClientRect().right; const own = x => { for (let p = x; p && p !== e; p = p.parentElement) if (getComputedStyle(p).overflowX !== 'visible' && p !== x) return true; return false };
        return [...e.querySelectorAll('*')].filter(x => x.getBoundingClientRect().right > w+5 && !own(x) && getComputedStyle(x).overflowX === 'visible').map(x => `${x.tagName}.${x.className} ${(x.innerText || '').slice(0, 40)}`).slice(0, 9) }""")

def photograph(page, path, within='.ftnb-panel'):
    "A picture of the whole panel, also of what is below the window's edge"
    size = page.viewport_size
    high = page.locator(within).first.evaluate('e => e.scrollHeight')
    page.set_viewport_size(dict(width=size['width'], height=int(high)+400))
    page.locator(within).first.scroll_into_view_if_needed()
    page.locator(within).first.screenshot(path=path)
    page.set_viewport_size(size)

def read_by_everyone(page, folder):
    "The panel in light, dark and at a telephone's width: axe-core finds nothing, nothing is cut, the console is quiet; pictures into `folder`"
    for on in (False, True):
        dark(page, on)
        photograph(page, folder/f'{on}.png')
        assert axe_faults(page)==[]
    narrow(page)
    photograph(page, folder/'narrow.png')
    assert cut(page)==[]
    assert not page.errors

# fixtures, which conftest gives to all tests: one JupyterLab and one Chromium; what is skipped without a browser says so in one line

def chrome():
    "The path of a Chromium, or the test is skipped in one line"
    pytest.importorskip('playwright.sync_api', reason='browser tests: playwright is not installed')
    return found() or pytest.skip('browser tests: no Chromium here; python tools/browser.py gets one')

# for a module, not the session: playwright keeps its event loop running between tests, and the next module of the same process may want one of its own
@pytest.fixture(scope='module')
def browser():
    path = chrome()
    from playwright import sync_api as api
    api.expect.set_options(timeout=20_000)
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, args=FLAGS)
        yield b
        b.close()

@pytest.fixture(scope='session')
def lab(tmp_path_factory):
    "(URL of a JupyterLab, its root folder)"
    chrome()
    tmp, root = tmp_path_factory.mktemp('lab'), tmp_path_factory.mktemp('root')
    (root/'settings.ini').write_text('[ftnb]\n')
    with serve(tmp, root) as url: yield url, root

@pytest.fixture(scope='module')
def show(lab, browser):
    "Callable: a notebook of these cells, opened and run; all panels of a module in one page would hide each other's faults, so each has its own"
    url, root = lab
    pages = []
    def f(name, *cells):
        write_cells(root/f'{name}.ipynb', *cells)
        page = open_notebook(browser, url, f'{name}.ipynb')
        pages.append(page)
        run_all(page)
        return page
    yield f
    for page in pages:
        page.evaluate('() => Promise.race([window.jupyterapp.shell.currentWidget.sessionContext.shutdown(), new Promise(done => setTimeout(done, 10_000))])') # a kernel that hangs ends with the server
        page.context.close()
