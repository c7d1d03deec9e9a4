"One JupyterLab and one Chromium for all browser tests; what is skipped without a browser says so in one line"
import sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT/'tools'))
from browser import found
from inlab import FLAGS, open_notebook, run_all, serve, write_cells

@pytest.fixture(scope='session')
def browser():
    api = pytest.importorskip('playwright.sync_api', reason='browser tests: playwright is not installed')
    if not (chrome := found()): pytest.skip('browser tests: no Chromium here; python tools/browser.py gets one')
    api.expect.set_options(timeout=20_000)
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chrome, args=FLAGS)
        yield b
        b.close()

@pytest.fixture(scope='session')
def lab(browser, tmp_path_factory):
    "(URL of a JupyterLab, its root folder)"
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
        page.evaluate('async () => { await window.jupyterapp.shell.currentWidget.sessionContext.shutdown() }')
        page.context.close()
