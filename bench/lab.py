"""The plan panel in a real JupyterLab that is warm: seconds from running the cell that imports it until it is on the page, and of a change.

    python bench/lab.py [--runs 5] [--out bench/results/lab.json]
"""
import argparse, json, os, statistics, sys, tempfile, time
from pathlib import Path

root = Path(__file__).parent.parent
sys.path[:0] = [str(root/'tools'), str(root/'tests')]
os.environ.setdefault('HF_HUB_OFFLINE', '1')
CELL = "from ftnb.plan_panel import plan_panel\nfrom ftnb.recipe import make_recipe\nplan_panel(make_recipe(dict(model_name_or_path='llama-3.1-8b', peft='qlora')), 'T4', 1000)"

def one(browser, url, name):
    "(seconds to the first paint, seconds of each change) in a kernel of its own"
    from inlab import open_notebook, run_all
    page = open_notebook(browser, url, name)
    t = time.perf_counter()
    run_all(page)
    page.wait_for_selector('.ftnb-panel [role=img]', state='attached')
    first, took = time.perf_counter()-t, []
    for n in ('512', '2048', '4096', '8192', '1024'):
        before = page.locator('.ftnb-panel [role=img]').first.get_attribute('aria-label')
        t = time.perf_counter()
        page.locator('.ftnb-panel').first.get_by_label('max_length', exact=True).fill(n)
        page.wait_for_function('b => document.querySelector(".ftnb-panel [role=img]").getAttribute("aria-label") !== b', arg=before, polling=5)
        took.append(time.perf_counter()-t)
    page.evaluate('async () => { await window.jupyterapp.shell.currentWidget.sessionContext.shutdown() }')
    page.context.close()
    return first, took

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--runs', type=int, default=5); p.add_argument('--out', default='bench/results/lab.json')
    a = p.parse_args()
    from browser import get
    from inlab import FLAGS, serve, write_cells
    from ftnb.runs import hardware, versions
    from playwright.sync_api import sync_playwright
    with tempfile.TemporaryDirectory() as d, tempfile.TemporaryDirectory() as r, serve(Path(d), Path(r)) as url, sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=get(), args=FLAGS)
        for i in range(a.runs+1): write_cells(Path(r)/f'{i}.ipynb', CELL)
        got = [one(browser, url, f'{i}.ipynb') for i in range(a.runs+1)][1:] # the first warms the server
        browser.close()
    firsts, changes = [g[0] for g in got], sorted(t for g in got for t in g[1])
    res = dict(first_paint=dict(seconds=[round(t, 2) for t in firsts], median_seconds=round(statistics.median(firsts), 2)), change=dict(changes=len(changes), median_ms=round(1e3*statistics.median(changes)), p90_ms=round(1e3*changes[int(.9*len(changes))])),
        versions=versions(), hardware={k: v for k,v in hardware().items() if k in ('cpu', 'cores', 'gpus')}, command=' '.join(['python', *sys.argv]))
    Path(a.out).write_text(json.dumps(res, indent=1))
    print({k: res[k] for k in ('first_paint', 'change')})

if __name__=='__main__': main()
