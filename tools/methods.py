"Write methods.qmd: full fine-tuning, LoRA and QLoRA of an 8B and a 70B model side by side, and the figures of handbooks beside ours."
import sys
from pathlib import Path

from ftnb.base import UserError, gib
from ftnb.choose import method_step
from ftnb.cost import training_cost

from ftnb.fit import cheapest
from ftnb.flops import run_time
from ftnb.forecast import forecast
from ftnb.profiles import profile

root, GB = Path(__file__).parent.parent, 10**9
methods = {'full, float32': 'full', 'full, bfloat16': 'full in bfloat16', 'LoRA': 'lora', 'QLoRA': 'qlora'}
owners = ('frozen weights', 'trained weights', 'gradients', 'optimizer', 'activations', 'logits', 'workspace')

def table(rows):
    cols = list(rows[0])
    return '\n'.join(['| '+' | '.join(cols)+' |', '|'+'---|'*len(cols), *('| '+' | '.join(str(r[c]) for c in cols)+' |' for r in rows)])

def num(b): return f'{b/2**30:,.1f}' if b>2**26 else '0' if not b else f'{b/2**30:.2f}'
def band(t, per): return f'{t.seconds/per:.1f} ({t.low/per:.1f} to {t.high/per:.1f})'

def column(name, method, tokens=10_000_000, batch=1, length=2048):
    p = profile(name)
    s = method_step(p.config, method, length=length, batch=batch)
    f = forecast(s)
    own = {o: num(f.by_owner.get(o, 0)) for o in owners}
    try:
        c = cheapest(s, forecast, by='run')
        t = run_time(s, c.device, tokens//s.tokens)
        cost = training_cost(c.device, t)
        where = {'cheapest GPU': c.device.name, 'hours': band(t, 3600), 'price, USD': f'{cost.amount:.2f} ({cost.low:.2f} to {cost.high:.2f})'}
    except UserError: where = {'cheapest GPU': 'none alone', 'hours': '', 'price, USD': ''}
    return {**own, '**peak**': f'**{num(f.peak)}**', 'million trained': f'{f.params_trained/1e6:,.0f}', **where}

def main():
    l8, l70 = profile('llama-3.1-8b'), profile('llama-3.1-70b')
    def weights(p, bits): return forecast(method_step(p.config, 'qlora' if bits==4 else 'lora', length=2048)).by_owner['frozen weights']
    w70, w8 = weights(l70, 4), weights(l8, 4)
    full70 = forecast(method_step(l70.config, 'full in bfloat16', length=2048)).by_owner
    state = sum(full70.get(k, 0) for k in ('frozen weights', 'trained weights', 'gradients', 'optimizer'))
    lora8 = forecast(method_step(l70.config, 'lora', length=2048).but(lora_r=8))
    mix = profile('mixtral-8x7b')
    said = [dict(handbook='70B in 4 bits takes 8.75 GB', here=f'{w70/GB:.1f} GB', reason='NF4 with double quantisation takes 4.127 bits a weight, not one; embeddings and output layer stay in 16 bits'),
        dict(handbook='4 bits are 16 times smaller (8B: 2 GB)', here=f'{w8/GB:.2f} GB, {2*l8.params/w8:.1f} times smaller than 16 bits', reason='16 times is against 64 bits; models ship in 16'),
        dict(handbook='full fine-tuning of 70B takes 420 GB', here=f'{state/GB:.0f} GB in pure bfloat16, {4*l70.params*4/GB:,.0f} GB in float32, without activations', reason='weights, gradients and two Adam states: 8 bytes a weight in bfloat16, 16 in float32'),
        dict(handbook='LoRA saves 93 to 98 %', here=f'gradients and optimizer shrink by {100*(1-lora8.params_trained/l70.params):.1f} %, the weights of the base not at all', reason='the base is there whole, only frozen'),
        dict(handbook='the KV cache takes 8 GB in training', here='0', reason='`use_cache` is off in training: every position is computed at once'),
        dict(handbook='Mixtral in 4 bits takes 22.8 GiB', here=gib(weights(mix, 4)), reason='under transformers 5 the experts are fused tensors, which bitsandbytes does not quantise'),
        dict(handbook='r=8 adds 10 MB', here=f'{4*forecast(method_step(profile("mistral-7b-v0.3").config, "lora").but(lora_r=8)).params_trained/1e6:.0f} MB for all linear layers of a 7B model in float32', reason='it depends on rank, layers and type; the plan counts it')]
    out = ['---\ntitle: Full, LoRA or QLoRA\n---\n\nWhat each costs on Llama 3.1 8B and 70B, r=16 on all linear layers, for one step of one row of 2,048 tokens with activation checkpointing, as `ftnb.forecast` counts it for transformers 5.23, TRL 1.16 and PEFT 0.21. Memory is what PyTorch allocates at the peak, in GiB by owner; the GPU is the one of the table on which the run is cheapest; time and price are for 10 million tokens, with their band, at the dated rates of `data/devices.json`. Written by `python tools/methods.py`.\n']
    for p in (l8, l70): 
        cols = {k: column(p.name, m) for k,m in methods.items()}
        out.append(f'## {p.name}, {p.params/1e9:.2f} billion weights\n\n'+table([{'GiB': r, **{k: c[r] for k,c in cols.items()}} for r in next(iter(cols.values()))]))
    out.append('## What handbooks say\n\nFigures that are copied from page to page, beside what is counted here and why it differs.\n\n'+table(said))
    (root/'methods.qmd').write_text('\n\n'.join(out)+'\n')

if __name__=='__main__': main()
