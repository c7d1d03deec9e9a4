"""Trace every method of `ftnb.methods` that the closed form does not know by its operations, and write what it keeps beyond a LoRA: data/method_memory.json"""
import json, sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from ftnb import like
from ftnb.base import UserError
from ftnb.forecast import forecast
from ftnb.methods import methods
from ftnb.recipe import make_recipe
from ftnb.step import step_of
from ftnb.trace import trace

model = dict(model_type='llama', hidden_size=1024, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=4, intermediate_size=3072, vocab_size=64, tie_word_embeddings=True)
known = (*like.known, 'ptuning', 'llama_adapter') # one is walked as a prompt, the other can not be traced
left_out = dict(waveft='two sizes do not describe it: its transforms pad the matrices')
lengths, depths = (512, 1024, 2048), (1, 2, 4)
h, i, kv = 1024, 3072, 256
weights, widths = 2*h*h+2*h*kv+3*h*i, 4*h+2*(h+kv)+3*(h+i) # of one block

def beyond(name, length, checkpointing, depth=2):
    "Bytes of a traced step beyond the closed form's"
    s = step_of(make_recipe(dict(peft=name, per_device_train_batch_size=2, max_length=length, activation_checkpointing=checkpointing)), dict(model, num_hidden_layers=depth))
    return trace(s, layers=(depth,), cache=False).peak-forecast(s, inplace=False).peak, s.tokens

def least(A, y):
    "Least squares whose terms all have the sign of the whole"
    A, y, left = np.array(A, float), np.array(y, float), list(range(len(A[0])))
    while left:
        x = np.linalg.lstsq(A[:,left], y, rcond=None)[0]
        if all(v*y.sum()>=0 for v in x): break
        left.pop(int(np.argmin(x*np.sign(y.sum()))))
    out = [0.]*A.shape[1]
    for k,v in zip(left, x if left else []): out[k] = round(float(v), 3)
    return out

def whole(name):
    "(bytes a weight, bytes a token and width) of each block, and bytes a weight once"
    got = [(*beyond(name, n, False, d), d) for n in lengths for d in depths]
    *graph, once = least([[d*weights, d*widths*t, weights] for _,t,d in got], [b for b,_,_ in got])
    return dict(graph=graph, once=once)

def block(name):
    "(bytes a weight, bytes a token and width) of one block that is recomputed"
    got = [beyond(name, n, True) for n in lengths]
    return dict(block=least([[weights, widths*t] for _,t in got], [b for b,_ in got]))

if __name__=='__main__':
    like.coefficients = lambda: {}
    out, failed = {}, {}
    for name in methods:
        if name in known or name in left_out: continue
        try: out[name] = {**whole(name), **block(name)}
        except UserError as e: failed[name] = str(e)
        print(name, out.get(name) or failed[name][:120], flush=True)
    v = {k: version(k) for k in ('torch', 'transformers', 'peft', 'trl')}
    Path(__file__).parent.parent.joinpath('data', 'method_memory.json').write_text(json.dumps(dict(what='bytes a weight of the adapted layers, and bytes a token and width (inputs and outputs of the adapted layers), beyond a LoRA with as many weights', versions=v, methods=out, not_traced=sorted(failed), left_out=left_out), indent=1)+'\n')
