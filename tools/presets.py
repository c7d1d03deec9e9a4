"Write guides/presets.qmd: what each preset sets, why, and who says so, from the table of ftnb.presets."
from pathlib import Path

from ftnb.fields import defaults
from ftnb.form import show_value
from ftnb.presets import presets

root = Path(__file__).parent.parent
intro = '''---
title: Presets for a domain
---

```
ftnb new my.yaml --dataset my.jsonl --preset medical
```

writes a recipe with the values of a domain, below what you give yourself: `-p max_length=1024` wins over the preset. The recipe panel has the same presets in its list, and in a notebook it is `make_recipe(with_preset(dict(dataset='my.jsonl'), 'medical'))` with `ftnb.presets.with_preset`.

A preset sets fields that you could set yourself and nothing else. The learning rate, the method and the model it leaves to you: [choosing parameters](choosing.qmd) says how. Rank and alpha belong together: who gives one of them gets neither from the preset.

Written by `python tools/presets.py` from the table of `ftnb.presets`.
'''

def cell(s): return str(s).replace('|', '\\|')
def page():
    "The text of the page"
    d, out = defaults(), [intro]
    for p in presets.values():
        out.append(f'## {p.name}\n\n{p.title}. {p.note}\n\n| field | value | default | why | source |\n|---|---|---|---|---|')
        out[-1] += ''.join(f'\n| `{k}` | {cell(show_value(v.value))} | {cell(show_value(d[k]))} | {cell(v.reason)} | <{v.source}> |' for k,v in p.values.items())+'\n'
    return '\n'.join(out)

def main(): (root/'guides/presets.qmd').write_text(page())

if __name__=='__main__': main()
