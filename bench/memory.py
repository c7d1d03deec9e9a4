"""Forecasts of the exact path against published peaks of GPU memory.

Reads a table of measurements (`--data`, columns as in the results) and traces the step of every row that ran on the
Hugging Face stack with a model class of transformers, under the row's library versions. No number here is fitted to a peak,
with one exception that is named: the rows of the run on orca-math (`FMS-203` and on) were padded to the longest row of a
batch, and neither that length nor the others are published. The longest row follows from the peak of FMS-211 (it is in one
batch of every run, whatever the batch), the mean of the other rows of the longest flattened batch from that of FMS-215; both rows are marked
`derived`, and the summary is given with and without them. The forecasts of FMS-213 and FMS-217 are checks of the two.

The rows of PEFT's benchmark (reserved memory) are padded to an unknown longest batch too: the table gives 643 tokens, which who
compiled it fitted to that benchmark's rows; the result says so under `lengths`. Its loop keeps `outputs` alive, and so does ours.

Fused kernels of fms-acceleration (`foak`) are not traced: their rows are forecast as if without, and stand apart.

    python bench/memory.py --data memory_calibration.csv [--only allocated reserved nvidia-smi] [--out bench/results/memory.json]
"""
import argparse, csv, json, re, statistics, time
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch
import ftnb.trace
from ftnb.base import gib, shipped, write_json
from ftnb.fit import context
from ftnb.runs import hardware, versions
from ftnb.step import Step
from ftnb.trace import trace

MODELS = {'mistralai/Mistral-7B-v0.1': 'mistral-7b-v0.1', 'ibm/PowerLM-3b': 'powerlm-3b', 'meta-llama/Llama-3.2-3B': 'llama-3.2-3b'}
A100 = 84_932_978_278 # bytes that torch reports of an A100 80GB
# refs_orca/requirements.txt and refs/requirements_granite.txt of foundation-model-stack/fms-acceleration
VERSIONS = {'requirements_granite': '4.45.0', 'requirements_pf': '4.44.0'}

def version_of(r)->str:
    "transformers' version of a row"
    m = re.search(r'transformers (\d+\.\d+\.\d+)', r['framework'])
    return m[1] if m else next((v for k,v in VERSIONS.items() if k in r['framework']), '')

def era_of(version:str)->str:
    a,b,_ = map(int, version.split('.'))
    return '1.16' if a>=5 else '4.48' if b>=46 else '4.45'

def flags(r)->str: return m[1] if (m := re.search(r'framework_config=([\w-]+)', r['notes'])) else ''

def why_not(r)->str:
    "Why a row has no forecast, or an empty text"
    if r['model'] not in MODELS: return 'remote code' if 'Qwen-7B' in r['model'] else 'not the Hugging Face stack' if 'LitGPT' in r['framework'] else 'no config here'
    if r['method'] not in ('full', 'lora', 'qlora', 'ia3', 'prompt_tuning'): return f'{r["method"]} is no method of a Step'
    return ''

def step_of_row(r, length:int=None)->Step:
    "The step of a row; `length` where rows are not packed"
    v, half, name = version_of(r), r['compute_dtype'].split()[0], flags(r)
    half = {'bf16': 'bfloat16'}.get(half, half)
    free, orca, plain_loop = 'padding-free' in name, 'requirements_pf' in r['framework'], r['framework'].startswith('plain loop')
    batch, n = int(r['batch']), length or int(r['seq_len'])
    more = dict(num_virtual_tokens=int(re.search(r'trainable (\d+)', r['notes'])[1])//3072) if r['method']=='prompt_tuning' else dict(lora_r=int(r['rank']), lora_target_modules=tuple(r['targets'].split())) if 'lora' in r['method'] else {}
    return Step(json.loads(shipped('data', 'models', MODELS[r['model']]+'.json').read_text()), peft={'qlora': 'lora', 'prompt_tuning': 'prompt'}.get(r['method'], r['method']), bits=4 if r['method']=='qlora' else 16,
        lora_dropout=.1 if 'dropout 0.1' in r['notes'] else 0., dtype=half, adapter_dtype='float32' if r['method']!='full' else 'auto', autocast=half if '+amp' in r['compute_dtype'] or 'autocast on' in r['notes'] else None,
        kbit_prep='baseline-peft-bnb' in name, batch=1 if free else batch, length=n, padded=not free and r['packing']!='yes', packed=free, accumulates=orca, attn='sdpa' if r['attn'].startswith('sdpa') else r['attn'],
        activation_checkpointing=r['grad_ckpt']=='True', loss='full', optim='adamw_torch', max_grad_norm=0. if plain_loop else 1., era=era_of(v), **more)

def length_for(r, bytes_:int)->int:
    "Tokens of a row at which the step takes so many bytes"
    a, b = (trace(step_of_row(r, n)).peak for n in (2048, 4096))
    return round(2048+(bytes_-a)*2048/(b-a))

def lengths(rows)->dict:
    "{id: tokens of a row} where they are not those of the packed rows"
    by = {r['id']: r for r in rows}
    res = {r['id']: 643 for r in rows if 'gives ~643 tokens' in r['notes']}
    if 'FMS-211' not in by: return res
    longest, four = (length_for(by[i], int(float(by[i]['published']))) for i in ('FMS-211', 'FMS-215'))
    for r in rows:
        if 'requirements_pf' not in r['framework']: continue
        batch = int(r['batch'])
        res[r['id']] = round(longest+(batch-1)*(four-longest)/3) if 'padding-free' in flags(r) else longest
    return res

def keeping(model, step, ids, labels, more):
    "The loss in a loop that keeps `outputs`, as PEFT's benchmark does"
    model.outputs = model(input_ids=ids, labels=labels, **more)
    return model.outputs.loss

def forecast(r, length:int):
    "(bytes, Forecast) for the metric of a row"
    s, metric = step_of_row(r, length), r['metric']
    if metric=='allocated': return (f := trace(s)).peak, f
    if r['framework'].startswith('plain loop'):
        with patch.object(ftnb.trace, '_loss', keeping): f = trace(s, reserved=True, cache=False)
    else: f = trace(s, limit=A100)
    return f.reserved+(round(context[1]) if metric=='nvidia-smi' else 0), f

def summary(rows)->dict:
    "Errors of some rows in percent"
    e = [r['error'] for r in rows]
    if not e: return dict(n=0)
    a = sorted(map(abs, e))
    at = lambda q: a[min(len(a)-1, max(0, -(-int(q*len(a)*1000)//1000)-1))]
    return dict(n=len(e), median=round(statistics.median(a), 3), p90=round(at(.9), 3), worst=round(a[-1], 3), bias=round(statistics.mean(e), 3), lowest=round(min(e), 3), highest=round(max(e), 3), within_5=round(sum(x<=5 for x in a)/len(a), 3))

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--data', required=True)
    ap.add_argument('--only', nargs='*', default=['allocated', 'reserved', 'nvidia-smi'])
    ap.add_argument('--out', default=str(Path(__file__).parent/'results/memory.json'))
    a = ap.parse_args()
    table = [r for r in csv.DictReader(open(a.data)) if r['tier']=='A']
    known, done, left = lengths(table), [], defaultdict(int)
    for r in table:
        if r['metric'] not in a.only: continue
        if (w := why_not(r)):
            left[f'{r["metric"]}: {w}'] += 1
            continue
        measured, t = float(r['peak_gb'])*2**30 if r['metric']=='nvidia-smi' else float(r['published']), time.time()
        n, f = forecast(r, known.get(r['id']))
        done.append(dict(id=r['id'], metric=r['metric'], model=r['model'], method=r['method'], variant=flags(r), transformers=version_of(r), era=era_of(version_of(r)), batch=int(r['batch']), tokens_per_row=known.get(r['id'], int(r['seq_len'])),
            measured=int(measured), forecast=int(n), error=round(100*(n/measured-1), 3), phase=f.phase, derived=r['id'] in ('FMS-211', 'FMS-215'), foak='foak' in flags(r)))
        print(f'{r["id"]} {r["metric"]:10s} {r["method"]:13s} {flags(r):36s} measured {gib(measured)} forecast {gib(n)} {100*(n/measured-1):+.2f} % {f.phase} ({time.time()-t:.0f} s)', flush=True)
    groups = {m: [r for r in done if r['metric']==m and not r['foak']] for m in a.only}
    res = {m: dict(all=summary(rs), without_derived=summary([r for r in rs if not r['derived']]), by_method={k: summary([r for r in rs if r['method']==k]) for k in dict.fromkeys(r['method'] for r in rs)},
        by_version={k: summary([r for r in rs if r['transformers']==k]) for k in dict.fromkeys(r['transformers'] for r in rs)}, foak=summary([r for r in done if r['metric']==m and r['foak']])) for m,rs in groups.items()}
    for m,s in res.items(): print(m, json.dumps(s, indent=1))
    s = Step(json.loads(shipped('data', 'models', 'llama-3.1-8b.json').read_text()), batch=1, length=2048, padded=False)
    t = time.time()
    trace(s, cache=False)
    write_json(a.out, dict(summary=res, no_forecast=dict(left), llama_8b_seconds=round(time.time()-t, 1), lengths=dict(derived={k: v for k,v in known.items() if k in ('FMS-211', 'FMS-215', 'FMS-217')}, peft_benchmark='643 tokens, fitted to its own rows by who compiled the table'),
        source='memory_calibration.csv, tier A: foundation-model-stack/fms-acceleration (Apache-2.0) and huggingface/peft (Apache-2.0)', rows=done, hardware=hardware(), versions=versions()))

if __name__=='__main__': main()
