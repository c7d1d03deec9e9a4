"""The pictures of the site: the plan panel and the proof, photographed in a real JupyterLab.

    python tools/screenshots.py        writes images/plan.png and images/proof.png
"""
import os, sys, tempfile
from pathlib import Path

root = Path(__file__).parent.parent
sys.path[:0] = [str(root/'tools'), str(root/'tests/browser')]
os.environ.setdefault('HF_HUB_OFFLINE', '1')
from browser import get
from inlab import FLAGS, open_notebook, run_all, serve, write_cells

PLAN = '''from ftnb.panels import plan_panel
from ftnb.recipe import make_recipe
p = plan_panel(make_recipe(dict(model_name_or_path='llama-3.1-8b', peft='qlora', max_length=2048, per_device_train_batch_size=4)), 'T4', 5000)
p.pages.selected_index = 3
p'''
PROOF = '''from IPython.display import HTML
from ftnb.look import css
from ftnb.prepare import prepare
from ftnb.recipe import make_recipe
from ftnb.runs import Run
from ftnb.panels import data_panel
run = Run('runs/demo', make_recipe(dict(dataset='demo', max_length=512))).save()
prepare(run)
data_panel(run=run)'''

def shoot(browser, url, name, at, to, margin=0):
    "Photograph an element of a notebook that was run"
    page = open_notebook(browser, url, name, 1240, 4200)
    run_all(page)
    page.wait_for_selector(at, timeout=120_000)
    page.wait_for_timeout(1500)
    page.locator(at).first.screenshot(path=to, timeout=120_000)
    page.context.close()

def main():
    from playwright.sync_api import sync_playwright
    if not (chrome := get()): sys.exit('No Chromium here, and none could be installed.')
    (root/'images').mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b, serve(Path(a), Path(b)) as url, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chrome, args=FLAGS)
        for name,cell,at in (('plan', PLAN, '.ftnb-panel'), ('proof', PROOF, '.ftnb-panel')):
            write_cells(Path(b)/f'{name}.ipynb', cell)
            shoot(browser, url, f'{name}.ipynb', at, root/f'images/{name}.png')
            print(f'images/{name}.png')
        browser.close()

if __name__=='__main__': main()
