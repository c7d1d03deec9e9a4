"""First paint of the plan panel, and the time of a change: models by GPUs by changes, with every page closed and with each one open.
Seconds of the clock, and of the processor alone, which a busy machine does not lengthen as much.

    python bench/panel.py [--out bench/results/panel.json]
"""
import argparse, json, os, statistics, subprocess, sys
os.environ.setdefault('HF_HUB_OFFLINE', '1')

FIRST = '''
import json, sys, time
t, c = [time.perf_counter()], time.process_time()
import ftnb.plan_panel as m
t.append(time.perf_counter())
p = m.plan_panel(gpu='T4', rows=1000)
t.append(time.perf_counter())
html = p.static_html()
t.append(time.perf_counter())
print(json.dumps(dict(seconds=[round(b-a, 3) for a,b in zip(t, t[1:])], all=round(t[-1]-t[0], 3), cpu=round(time.process_time()-c, 3), kilobytes=round(len(html)/1000), torch='torch' in sys.modules)))
'''
CHANGES = '''
import json, sys, time
from ftnb.plan_panel import pages, plan_panel
changes = [dict(max_length=n) for n in (256, 512, 2048, 4096, 1000, 333)]+[dict(per_device_train_batch_size=n) for n in (1, 2, 4, 16)]+[dict(lora_r=n) for n in (8, 64, 16)]+[dict(gradient_accumulation_steps=n) for n in (4, 1)]+[
    dict(peft='qlora'), dict(peft='lora'), dict(peft='full'), dict(peft='lora'), dict(packing=True), dict(max_length=2048), dict(packing=False), dict(activation_checkpointing=False), dict(activation_checkpointing=None),
    dict(optim='adamw_8bit'), dict(optim='adamw_torch_fused'), dict(num_train_epochs=1), dict(num_train_epochs=2.5), dict(rows='1234'), dict(rows='500000')]
res = []
for name in ('smollm2-135m', 'llama-3.1-8b', 'mixtral-8x7b'):
    for gpu in ('T4', 'A100 80GB', None):
        for i in (None, *range(len(pages))):
            p = plan_panel(None, gpu, 1000) # a new one remembers nothing
            p.set(model_name_or_path=name)
            p.pages.selected_index = i
            for c in changes:
                t, u = time.perf_counter(), time.process_time(); p.set(**c); res.append(dict(cpu=1e3*(time.process_time()-u), model=name, gpu=gpu or 'this machine', page=pages[i] if i is not None else 'none', change=next(iter(c)), ms=1e3*(time.perf_counter()-t)))
                assert p.value is not None and not p.form.problems, (c, p.problem, p.form.problems)
print(json.dumps(dict(res=res, torch='torch' in sys.modules)))
'''

def call(code):
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    if p.returncode: sys.exit(p.stderr[-3000:])
    return json.loads(p.stdout.splitlines()[-1])

def stats(rows):
    ms, cpu = (sorted(r[k] for r in rows) for k in ('ms', 'cpu'))
    return dict(changes=len(ms), median_ms=round(statistics.median(ms), 1), p90_ms=round(ms[int(.9*len(ms))], 1), most_ms=round(ms[-1], 1), median_cpu_ms=round(statistics.median(cpu), 1), p90_cpu_ms=round(cpu[int(.9*len(cpu))], 1))

def by(rows, key): return {k: stats([r for r in rows if r[key]==k]) for k in dict.fromkeys(r[key] for r in rows)}

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--runs', type=int, default=7); p.add_argument('--out', default='bench/results/panel.json')
    a = p.parse_args()
    from ftnb.runs import hardware, versions
    busy = os.getloadavg()[0]
    call(FIRST) # files into the system's cache
    first = [call(FIRST) for _ in range(a.runs)]
    got = call(CHANGES)
    closed = [r for r in got['res'] if r['page']=='none']
    mid = statistics.median
    res = dict(first_paint=dict(processes=a.runs, median_seconds=mid(o['all'] for o in first), most_seconds=max(o['all'] for o in first), median_cpu_seconds=mid(o['cpu'] for o in first), kilobytes=first[0]['kilobytes'],
            **dict(zip(('import_seconds', 'build_seconds', 'static_html_seconds'), (round(mid(o['seconds'][i] for o in first), 3) for i in range(3))))),
        change=dict(**stats(closed), by_model=by(closed, 'model'), by_gpu=by(closed, 'gpu'), by_change=by(closed, 'change')),
        change_with_an_open_page=dict(note='with the page drawn at once, as without an event loop; in a notebook a page that takes a search follows 150 ms after the last change', **by([r for r in got['res'] if r['page']!='none'], 'page')),
        torch=got['torch'] or any(o['torch'] for o in first), versions=versions(), hardware={k: v for k,v in hardware().items() if k in ('cpu', 'cores', 'gpus')}, load_average_before=round(busy, 1), command='python bench/panel.py')
    json.dump(res, open(a.out, 'w'), indent=1)
    print(json.dumps({k: v for k,v in res.items() if k!='versions'}, indent=1))

if __name__=='__main__': main()
