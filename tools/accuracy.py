"Write accuracy.qmd from bench/results/memory.json: the exact path against peaks that others have measured."
import json
from pathlib import Path

root = Path(__file__).parent.parent
names = dict(allocated='Allocated: what PyTorch has given out', reserved="Reserved: what PyTorch's allocator holds", **{'nvidia-smi': 'Device: what nvidia-smi shows'})

def table(rows, cols):
    return '\n'.join(['| '+' | '.join(cols)+' |', '|'+'---|'*len(cols), *('| '+' | '.join(str(r[c]) for c in cols)+' |' for r in rows)])

def line(name, s):
    if not s['n']: return dict.fromkeys(('rows', 'n', 'median', '90 %', 'worst', 'bias', 'from', 'to', 'within 5 %'), '')|dict(rows=name, n=0)
    pc = lambda x: f'{x:+.2f}'
    return {'rows': name, 'n': s['n'], 'median': pc(s['median']).lstrip('+'), '90 %': pc(s['p90']).lstrip('+'), 'worst': pc(s['worst']).lstrip('+'), 'bias': pc(s['bias']), 'from': pc(s['lowest']), 'to': pc(s['highest']), 'within 5 %': f'{100*s["within_5"]:.0f}'}

def section(metric, r):
    s, rows = r['summary'][metric], [o for o in r['rows'] if o['metric']==metric]
    parts = [line('all', s['all'])] + ([line('without the rows a length was derived from', s['without_derived'])] if s['without_derived']['n']!=s['all']['n'] else [])
    parts += [line(k, v) for k,v in s['by_method'].items()] + [line(f'transformers {k}', v) for k,v in s['by_version'].items() if k] + ([line('fused kernels (foak), forecast as if without', s['foak'])] if s['foak']['n'] else [])
    out = [f'## {names[metric]}\n\nErrors are (forecast - measured) / measured, in per cent; median, 90 % and worst without their sign.\n\n'+table(parts, list(parts[0]))]
    gib = lambda b: f'{b/2**30:.2f}'
    each = [dict(row=o['id'], model=o['model'].split('/')[-1], method=o['method'], variant=o['variant'], transformers=o['transformers'], batch=o['batch'], tokens=o['tokens_per_row'], measured=gib(o['measured']), forecast=gib(o['forecast']), error=f'{o["error"]:+.2f} %'+(' (derived)' if o['derived'] else '')) for o in rows if not o['foak']]
    out.append('::: {.callout-note collapse="true"}\n## Every row, in GiB\n\n'+table(each, list(each[0]))+'\n:::' if each else '')
    return '\n\n'.join(out)

def main():
    r = json.loads((root/'bench/results/memory.json').read_text())
    v = r['versions']
    out = [f'''---
title: How right the forecast is
---

The exact path, `ftnb.trace`, against peaks of GPU memory that others have measured and published with their settings ({r["source"]}). No number is fitted to a peak but the lengths named below. Made by `python bench/memory.py --data memory_calibration.csv` and `python tools/accuracy.py`, with transformers {v["transformers"]}, TRL {v["trl"]}, PEFT {v["peft"]}, torch {v["torch"]}; older library versions are emulated where they differ in memory (a copy of the logits, AdamW by foreach), and named with each row.

Rows of the runs on orca-math were padded to the longest row of a batch, and no length is published. The longest follows from the peak of one row, the mean of the others from that of a second; both are marked *derived*, and the summary stands with and without them. The reserved rows are of PEFT's benchmark, whose batches were padded to an unknown length too: 643 tokens, which who compiled the table has fitted to them.''']
    out += [section(m, r) for m in names if r['summary'].get(m)]
    if r['no_forecast']: out.append('## No forecast\n\n'+table([dict(rows=n, reason=k.split(': ', 1)[1], metric=k.split(': ')[0]) for k,n in r['no_forecast'].items()], ['metric', 'rows', 'reason']))
    out.append('''## What has no row

No published peak of tier A exists here for: Llama and Qwen families beyond these models, Gemma, Phi, Falcon, Mixtral or any mixture of experts, 8-bit weights, prefix tuning, rows with `eager` attention, GPUs other than the A100 and the L40S, and TRL 1.16 itself. For these the forecast rests on the trace being the true code, not on a measurement.''')
    (root/'accuracy.qmd').write_text('\n\n'.join(out)+'\n')

if __name__=='__main__': main()
