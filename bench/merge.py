"""RAM of a merge: shard by shard against the whole model in float32, each in a fresh process; and what holding a model in 16 bits does to its answers.

    python bench/merge.py [--model smollm2-135m] [--shard 50MB] [--out bench/results/merge.json]

The adapter is LoRA of rank 16 on all linear layers with random weights. The peak is the largest resident memory of the process
(`ru_maxrss`), of which `start` is there before the merge: Python and the libraries. Files are compared tensor by tensor.
"""
import argparse, json, os, resource, subprocess, sys, tempfile, time
from pathlib import Path
os.environ.setdefault('HF_HUB_OFFLINE', '1')

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024

def settings(a):
    from ftnb.recipe import make_recipe
    from ftnb.tokenizer import load_tokenizer
    r = make_recipe(dict(model_name_or_path=a.model, dataset='demo', use_cpu=True, lora_r=16, max_shard_size=a.shard))
    return r, load_tokenizer(r)

def make_adapter(a):
    "A LoRA adapter with random weights"
    import torch
    from peft import LoraConfig, get_peft_model
    from ftnb.load import load_model
    torch.manual_seed(0)
    r, _ = settings(a)
    m = get_peft_model(load_model(r, dtype=torch.float32), LoraConfig(r=16, target_modules='all-linear', init_lora_weights=False, task_type='CAUSAL_LM'))
    for n,p in m.named_parameters():
        if 'lora_B' in n: p.data *= .05
    m.save_pretrained(a.adapter)

def merge(a):
    "Merge one way, and print the memory"
    import torch
    from ftnb.load import load_model
    from ftnb.shards import Parts, stored_folder, write_shards
    from ftnb.tune import with_adapter
    r, tok = settings(a)
    torch.zeros(8).bfloat16()@torch.zeros(8).bfloat16() # what a first product loads is there before the count
    start, t = peak(), time.perf_counter()
    if a.way=='shards':
        parts = Parts(r, stored_folder(r), tok, a.adapter)
        write_shards(parts, parts.hull(torch.bfloat16), a.to, r.max_shard_size)
    else: with_adapter(load_model(r, dtype=torch.float32), a.adapter).merge_and_unload(safe_merge=True).to(torch.bfloat16).save_pretrained(a.to, max_shard_size=r.max_shard_size)
    print(json.dumps(dict(start=start, peak=peak(), seconds=round(time.perf_counter()-t, 1))))

def noise(a):
    "How far the model is from itself in float32 if it is held in 16 bits, before and after a merge; on the demo's test rows"
    import torch
    from ftnb.load import load_model
    from ftnb.runs import Run
    from ftnb.prepare import prepare
    from ftnb.trained import distance, logits_of, prompts
    from ftnb.tune import with_adapter
    r, tok = settings(a)
    run = Run(Path(a.to)/'run', r).save()
    prepare(run)
    say = lambda m: logits_of(m, rows)
    rows = prompts(run, len(tok))
    ref = say(with_adapter(load_model(r, dtype=torch.float32), a.adapter))
    out = dict(rows=len(rows), tokens=sum(map(len, rows)))
    for t in (torch.bfloat16, torch.float16):
        held = say(with_adapter(load_model(r, dtype=t), a.adapter))
        again = say(with_adapter(load_model(r, dtype=t), a.adapter))
        merged = say(load_model(r, dtype=t, path=a.merged))
        exact = say(load_model(r, dtype=torch.float32, path=a.merged))
        pick = lambda d: {k: float(f'{v:.3g}') for k,v in d.items()}
        out[str(t).removeprefix('torch.')] = dict(held_to_float32=pick(distance(ref, held)), loaded_again=pick(distance(held, again)), merged_to_held=pick(distance(held, merged)), merged_in_float32_to_held=pick(distance(held, exact)))
    print(json.dumps(out))

def child(a, do, **kw):
    args = [f'--{k}={v}' for k,v in {**vars(a), 'do': do, **kw}.items() if v is not None]
    p = subprocess.run([sys.executable, __file__, *args], capture_output=True, text=True)
    if p.returncode: sys.exit(p.stderr[-3000:])
    return json.loads(p.stdout.strip().splitlines()[-1]) if p.stdout.strip() else None

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--model', default='smollm2-135m'); p.add_argument('--shard', default='50MB'); p.add_argument('--out', default='bench/results/merge.json')
    for k in ('do', 'way', 'adapter', 'to', 'merged'): p.add_argument(f'--{k}')
    a = p.parse_args()
    if a.do: return dict(make_adapter=make_adapter, merge=merge, noise=noise)[a.do](a)
    from safetensors.torch import load_file
    from ftnb.base import write_json
    from ftnb.runs import hardware, versions
    with tempfile.TemporaryDirectory() as d:
        child(a, 'make_adapter', adapter=f'{d}/adapter')
        res = {w: child(a, 'merge', way=w, adapter=f'{d}/adapter', to=f'{d}/{w}') for w in ('whole', 'shards')}
        files = {w: {k: v for f in sorted(Path(d, w).glob('*.safetensors')) for k,v in load_file(f).items()} for w in res}
        res['equal'] = {*files['whole']}=={*files['shards']} and all((v==files['shards'][k]).all().item() for k,v in files['whole'].items())
        res['files'], res['bytes'] = len([*Path(d, 'shards').glob('*.safetensors')]), sum(f.stat().st_size for f in Path(d, 'shards').glob('*.safetensors'))
        res['noise'] = child(a, 'noise', adapter=f'{d}/adapter', to=d, merged=f'{d}/shards')
    res.update(model=a.model, shard=a.shard, versions=versions(), hardware={k: v for k,v in hardware().items() if k in ('cpu', 'cores', 'gpus')}, command='python bench/merge.py')
    write_json(a.out, res)
    print(json.dumps({k: v for k,v in res.items() if k!='versions'}, indent=1))

if __name__=='__main__': main()
