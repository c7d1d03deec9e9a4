"""The pictures of the site: the plan panel, the proof and the rating panel, photographed in a real JupyterLab.

    python tools/screenshots.py [NAME ...]       writes images/plan.png, images/proof.png and images/rate.png, or those named
"""
import os, sys, tempfile
from pathlib import Path

root = Path(__file__).parent.parent
sys.path[:0] = [str(root/'tools'), str(root/'tests')]
os.environ.setdefault('HF_HUB_OFFLINE', '1')
from browser import get
from inlab import FLAGS, open_notebook, run_all, serve, write_cells

PLAN = '''from ftnb.panels import plan_panel
from ftnb.recipe import make_recipe
p = plan_panel(make_recipe(dict(model_name_or_path='llama-3.1-8b', peft='qlora', max_length=2048, per_device_train_batch_size=4)), 'T4', 5000)
p.pages.selected_index = 3
p'''
PROOF = '''from ftnb.prepare import prepare
from ftnb.recipe import make_recipe
from ftnb.runs import Run
from ftnb.panels import data_panel
run = Run('runs/demo', make_recipe(dict(dataset='demo', max_length=512))).save()
prepare(run)
data_panel(run=run)'''
RATE = '''from ftnb.base import shipped
from ftnb.panels import rating_panel
p = rating_panel(str(shipped('data', 'demo', 'preferences.jsonl')), 'mine.jsonl')
for c in ('a', 'both'): p.choose(c)
p'''

def shoot(browser, url, name, first, last, to):
    "Photograph a panel of a notebook that was run, from one text to above another, or to its end"
    page = open_notebook(browser, url, name, 1240, 5200)
    run_all(page)
    page.wait_for_selector(f'.ftnb-panel >> text={last or first}', timeout=120_000)
    page.wait_for_timeout(1500)
    box, a = (page.locator(f'.ftnb-panel{q}').first.bounding_box() for q in ('', f' >> text={first}'))
    end = page.locator(f'.ftnb-panel >> text={last}').first.bounding_box()['y'] if last else box['y']+box['height']+6
    page.screenshot(path=to, clip=dict(x=box['x'], y=a['y']-6, width=box['width'], height=end-a['y']))
    page.context.close()

def main():
    from playwright.sync_api import sync_playwright
    if not (chrome := get()): sys.exit('No Chromium here, and none could be installed.')
    (root/'images').mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b, serve(Path(a), Path(b)) as url, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chrome, args=FLAGS)
        for name,cell,first,last in (('plan', PLAN, 'preset', 'Offloading'), ('proof', PROOF, 'Gates: ', 'drawn · '), ('rate', RATE, 'Pair 3', '')):
            if sys.argv[1:] and name not in sys.argv[1:]: continue
            write_cells(Path(b)/f'{name}.ipynb', cell)
            shoot(browser, url, f'{name}.ipynb', first, last, root/f'images/{name}.png')
            print(f'images/{name}.png')
        browser.close()

if __name__=='__main__': main()
