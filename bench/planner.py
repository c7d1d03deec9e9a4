"""Time of a forecast, on paper and by the trace, and forecasts of RAM and time beside what a run took.

    python bench/planner.py [--run runs/demo] [--out bench/results/planner.json]
"""
import argparse, json, os, statistics, subprocess, sys, time
os.environ.setdefault('HF_HUB_OFFLINE', '1')

PAPER = '''
import json, sys, time
from ftnb.forecast import forecast
from ftnb.profiles import profile
from ftnb.step import Step
cases = [Step(profile(name).config, **kw, batch=b, length=n) for name in ('llama-3.1-8b', 'mistral-7b-v0.1', 'mixtral-8x7b', 'falcon-40b', 'llama-3.1-70b', 'gemma-2-9b')
    for kw in (dict(peft='full', autocast=None), dict(), dict(bits=4), dict(activation_checkpointing=False, loss='full')) for b,n in ((1, 512), (4, 1024), (8, 4096))]
got = []
for s in cases:
    t = time.perf_counter(); forecast(s); got.append(time.perf_counter()-t)
print(json.dumps(dict(ms=[round(1e3*t, 2) for t in got], torch='torch' in sys.modules)))
'''
TRACE = '''
import json, time
from ftnb.profiles import profile
from ftnb.step import Step
from ftnb.trace import trace
s = Step(profile('llama-3.1-8b').config, batch=2, length=2048)
trace(s.but(length=64), cache=False) # the first one loads the model's code
t = time.perf_counter(); trace(s, cache=False)
print(json.dumps(round(time.perf_counter()-t, 2)))
'''

def call(code):
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    if p.returncode: sys.exit(p.stderr[-3000:])
    return json.loads(p.stdout.splitlines()[-1])

def of_run(folder):
    "Forecasts of stage 2 beside what the run took"
    from ftnb.runs import Run
    from ftnb.plan import plan
    run = Run(folder)
    p, t, took = plan(run).report, run.report('train'), run.manifest['stages']
    stages = [dict(stage=s['stage'], forecast=s['ram'], measured=took[at]['peak_ram']) for s in p['stages'] for at in [dict(merge='export').get(s['stage'], s['stage'])] if at in took]
    return dict(train=dict(forecast=p['memory']['resident'], measured=t['memory']['peak']), stages=stages)

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--run'); p.add_argument('--runs', type=int, default=5); p.add_argument('--out', default='bench/results/planner.json')
    a = p.parse_args()
    from ftnb.runs import hardware, versions
    paper = [call(PAPER) for _ in range(a.runs)]
    ms = sorted(t for o in paper for t in o['ms'])
    res = dict(paper=dict(calls=len(ms), median_ms=statistics.median(ms), p90_ms=ms[int(.9*len(ms))], most_ms=ms[-1], torch=any(o['torch'] for o in paper)), trace_seconds=[call(TRACE) for _ in range(a.runs)])
    if a.run: res['run'] = of_run(a.run)
    elif os.path.exists(a.out): res['run'] = json.load(open(a.out)).get('run')
    res.update(versions=versions(), hardware={k: v for k,v in hardware().items() if k in ('cpu', 'cores', 'gpus')}, command='python bench/planner.py --run runs/demo')
    json.dump(res, open(a.out, 'w'), indent=1)
    print(json.dumps({k: v for k,v in res.items() if k!='versions'}, indent=1))

if __name__=='__main__': main()
