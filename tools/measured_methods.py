"Write guides/methods.qmd: every method on the same rows, as bench/methods.py measured it."
import json
from pathlib import Path

from ftnb.base import gib, size
from ftnb.bootstrap import paired_bootstrap, ratio_bootstrap
from ftnb.draw import svg_points, svg_image
from ftnb.methods import methods

root = Path(__file__).parent.parent
source = root/'bench/results/methods.json'

def load(): return json.loads(source.read_text()) if source.exists() else None
def table(rows): return '\n'.join(['| '+' | '.join(rows[0])+' |', '|'+'---|'*len(rows[0]), *('| '+' | '.join(str(v) for v in r.values())+' |' for r in rows)]) if rows else ''
def points(v): return f'{100*v:+.0f}'

def against(a, b):
    "Row by row: fields right and perplexity of `a` against `b`"
    d, p = paired_bootstrap(b['rows'], a['rows']), ratio_bootstrap(b['losses'], a['losses'])
    word = 'as good, as far as these rows tell' if d['low']<=0<=d['high'] else 'better' if d['low']>0 else 'worse'
    return d, p, word

def row(name, o, full):
    "A row of the table"
    s = paired_bootstrap([0.]*len(o['rows']), o['rows'])
    out = {'method': f'[{methods[name].title}]({methods[name].paper})' if name in methods and methods[name].paper.strip('/').split('/')[-1][:1].isdigit() else methods[name].title if name in methods else 'the base, untrained', '`peft`': f'`{name}`' if name in methods else '',
        'trained': f'{100*o["trained"]/o["total"]:.3g} %' if 'trained' in o else '0', 'fields right': f'{100*s["mean_b"]:.0f} % ({100*s["low"]:.0f} to {100*s["high"]:.0f})'}
    if full is None: rel = '', ''
    elif o is full: rel = 'is full', '1'
    else:
        d, p, word = against(o, full)
        rel = f'{points(d["diff"])} ({points(d["low"])} to {points(d["high"])}): {word}', f'{p["ratio"]:.2f} ({p["low"]:.2f} to {p["high"]:.2f})'
    return out | {'against full, points': rel[0], 'perplexity over full\'s': rel[1], 'peak memory': gib(o['peak']) if 'peak' in o else '', 'tokens/s': f'{o["tokens_per_second"]:,.0f}' if 'peak' in o else '', 'saved': size(o['weights']) if o.get('weights') else '', 'learning rate': f'{o["learning_rate"]:g}' if 'learning_rate' in o else ''}

def page(r):
    "The text of the page"
    good = {k: o for k,o in r['rows'].items() if 'error' not in o and o.get('rows')}
    full, b, h, v = good.get('full'), r['budget'], r['hardware'], r['versions']
    ranked = sorted(good, key=lambda k: -sum(good[k]['rows'])/len(good[k]['rows']))
    tokens = next((o['tokens'] for o in good.values() if 'tokens' in o), 0)
    many, open_ = len(b['rates'])>1, [k for k in methods if k not in r['rows']]
    out = [f'''---
title: Methods, measured
page-layout: full
---

Handbooks give each method a share of the quality of full fine-tuning, without saying of what. Here {f'{len(methods)-len(open_)} of the {len(methods)} methods' if open_ else 'every method'} of `peft:` had the same budget on the same rows, and what came out stands below with its interval.{f' Not run yet: {", ".join(open_)}.' if open_ else ''}

- **What**: `{b["model"]}` on the demo of ftnb (messages to a help desk, answered in JSON), {b["steps"]} steps of {b["batch"]} rows, {tokens:,} tokens, the same rows in the same order for all, seed {b["seed"]}.
- **Measured on**: {b["rows"]} held-out rows. *Fields right* is the share of the values of the answer that are right. The intervals are 95 % over rows; differences are taken row by row.
- **Learning rate**: {f"the best of {len(b['rates'])} ({', '.join(f'{x:g}' for x in b['rates'])} times the usual one) by the loss on the validation rows after a third of the steps" if many else "one for each method, from a table with its reasons in the script"}.
- **Where**: {h["cpu"]}, {h["cores"]} cores{', '+', '.join(h["gpus"]) if h.get("gpus") else ''}, each method in a process of its own; torch {v["torch"]}, transformers {v["transformers"]}, peft {v["peft"]}, bitsandbytes {v.get("bitsandbytes", "none")}. {'Tokens per second are those of one core. ' if r.get('clock')=='one core' else ''}Peak memory is all that the process held in training, Python and its libraries ({gib(min((o["before"] for o in good.values() if "before" in o), default=0))}) among it.

What it does not say: how the methods stand on a larger model, a longer run or another task. A short budget favours methods that move fast; *as good* means that these rows show no difference, not that there is none. Repeat it with your model and steps: `python bench/methods.py --model ... --steps ...`, then `python tools/measured_methods.py`.
''']
    if full is None: out.append('Full fine-tuning was not measured in this run, so nothing is set against it.\n')
    out.append(table([row(k, good[k], full) for k in ranked])+'\n')
    chart = svg_points({k: (o['peak']/2**30, sum(o['rows'])/len(o['rows']), None, None) for k,o in good.items() if 'peak' in o}, 'peak memory, GiB', 'fields right', 860, 480)
    if chart: out.append(f'Memory against score:\n\n{svg_image(chart.replace("currentColor", "#777"))}\n')
    bad = {k: o for k,o in r['rows'].items() if k not in good}
    if bad: out.append('## Not measured\n\n'+table([dict(peft=f'`{k}`', why=str(o.get('error')).replace('|', '/')) for k,o in bad.items()])+'\n')
    out.append('## Learning rates\n\n'+table([{'`peft`': f'`{k}`', 'rate': f'{x["rate"]:g}', 'why': x['why'], **({'tried, with validation loss': ', '.join(f'{a}: {l:.3g}' for a,l in good[k].get('tried', {}).items())} if many else {})} for k,x in r['rates'].items() if k in good])+'\n')
    out.append(f'Written by `python tools/measured_methods.py` from `bench/results/methods.json`, made by `{r["command"]}`. What each method costs on large models, counted: [Full, LoRA or QLoRA](../methods.qmd).')
    return '\n'.join(out)+'\n'

def main():
    if r := load(): (root/'guides/methods.qmd').write_text(page(r))

if __name__=='__main__': main()
