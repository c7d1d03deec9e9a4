"""Every method of `ftnb.methods` on the demo data with the same budget, each in a process of its own.

Same model, rows, order, steps and tokens; what differs is what is trained, and its learning rate. Rates: ten times
those of PEFT's own comparison (method_comparison/MetaMathQA, Llama 3.2 3B, 5,000 steps), as the demo's rate of LoRA
is ten times the one there: this model is twenty times smaller and the run shorter; exceptions stand in `rates` with
their reason. With --rates 0.3,1,3 each of three multiples is tried with a third of the steps, and the one with the
lowest loss on the validation rows is taken; the held-out rows decide nothing.

Measured: trained share, peak resident memory in training, tokens per second from step 3 on, fields right and
perplexity on held-out rows, size of the saved weights. The file is written after each method; the same command goes
on where it stopped, and tries again what failed. One method of 24 steps takes 60 to 90 s on two quiet cores. On a
machine that others use too, OMP_NUM_THREADS=1 with --cpu counts the seconds of one core, not those of the clock.

    python bench/methods.py [--methods lora,ia3] [--steps 24] [--rows 40] [--rates 1] [--out bench/results/methods.json]
"""
import argparse, json, math, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

from ftnb.base import read_json, write_json
from ftnb.methods import methods

_peft = {k: 1e-4 for k in 'lora qlora dora adalora boft hra loha miss oft randlora fourierft waveft delora ln_tuning glora psoft peanut deft beft'.split()} | dict(full=1e-5, ia3=5e-3, lokr=3e-3, gralora=2e-4, road=1e-3, shira=3e-4, vblora=5e-4, prompt=1e-3, ptuning=1e-3, prefix=5e-3, llama_adapter=5e-4, unilora=2e-3)
rates = {k: (1e-3, 'LoRA\'s; none of its own is known here') for k in methods} | {k: (10*v, 'ten times that of PEFT\'s comparison') for k,v in _peft.items()} | dict(
    rslora=(2.5e-4, 'LoRA\'s over sqrt(r): its update is scaled up by as much'), vera=(1e-2, 'ten times LoRA\'s, as in its paper'), pvera=(1e-2, 'VeRA\'s'), hira=(4.5e-3, 'that of PEFT\'s comparison, which is 45 times LoRA\'s there'), c3a=(.3, 'that of PEFT\'s comparison, which is 3,000 times LoRA\'s there'),
    trainable_tokens=(.2, 'that of PEFT\'s comparison, which is 2,000 times LoRA\'s there'), bottleneck=(1e-3, 'LoRA\'s'))
more = dict(trainable_tokens=dict(trainable_token_indices=[1, 2])) # the two tokens that begin and end a turn in smollm2

def one_core(a):
    "Whether a method computes on one core, whose own seconds are counted: they do not grow when the other cores have work"
    return a.cpu and os.environ.get('OMP_NUM_THREADS')=='1'

def recipe(method, a, steps, multiple):
    "The recipe of a method"
    from ftnb.recipe import make_recipe
    rate = rates[method][0]*multiple
    return make_recipe(dict(dataset='demo', model_name_or_path=a.model, peft=method, learning_rate=rate, max_steps=steps, per_device_train_batch_size=a.batch, gradient_accumulation_steps=1, per_device_eval_batch_size=a.rows, max_eval_samples=a.rows, max_length=512, seed=a.seed,
        eval_strategy='no', save_strategy='no', report_to='none', logging_steps=1, resume_from_checkpoint=False, use_cpu=a.cpu, train_sampling_strategy='random', lr_scheduler_type='cosine', **more.get(method, {})))

def answered(run, which):
    "Loss, fields and answers of one model on held-out rows"
    from ftnb.chat import prompt_of
    from ftnb.evaluate import answer_limit, held_out
    from ftnb.generate import Pair, answers, row_losses
    from ftnb.metrics import json_scores
    pair, (_, recs, toks) = Pair(run, which), held_out(run)
    asked, r = [prompt_of(pair.tok, o, run.recipe.think) for o in recs], run.recipe
    refs = [x for _,x in asked]
    with pair.using(which) as model:
        losses = row_losses(model, toks, pair.tok.pad_token_id, r.per_device_eval_batch_size)
        said = answers(model, pair.tok, [p for p,_ in asked], r, answer_limit(run, pair.tok, refs), r.per_device_eval_batch_size)
    return dict(rows=[o['field_accuracy'] for o in json_scores(said, refs)], losses=[[round(l, 4), k] for l,k in losses])

def valid_loss(run, trainer):
    "Loss on the validation rows, which choose the rate"
    from ftnb.generate import row_losses
    from ftnb.train import token_data
    v = token_data(run, 'valid')
    ls = row_losses(trainer.accelerator.unwrap_model(trainer.model), [(o['input_ids'], o['labels']) for o in v], 0, 8)
    return sum(l for l,_ in ls)/sum(k for _,k in ls)

def one(a):
    "Train and measure one method in this process; one line of JSON at the end"
    import psutil
    from ftnb.load import quiet
    from ftnb.opening import open_at
    from ftnb.prepare import prepare
    from ftnb.runs import Run, begin, end
    base = Run(Path(a.folder)/'data')
    r = recipe('lora' if a.one in ('base', 'data') else a.one, a, a.steps, a.multiple)
    if a.one=='data':
        run = Run(base.folder, r).save()
        begin(run, 'prepare'); end(run, 'prepare', line=prepare(run).line)
        return print('{}')
    run = open_at(Path(a.folder)/f'{a.one}-{a.multiple:g}-{a.steps}', r, base, in_place=True)
    if a.one=='base': return print(json.dumps(answered(run, 'base')))
    from transformers import TrainerCallback
    from ftnb.ranking import weights_of
    from ftnb.train import make_trainer, train
    now = time.process_time if one_core(a) else time.perf_counter
    class Clock(TrainerCallback):
        "Time and tokens at each step's end"
        def __init__(self): self.at = []
        def on_step_end(self, *_, **k): self.at.append((now(), trainer.seen_tokens))
    quiet()
    before, trainer = psutil.Process().memory_info().rss, make_trainer(run)
    clock = Clock()
    trainer.add_callback(clock)
    rep = train(run, trainer)
    (t0, n0), (t1, n1) = clock.at[min(1, len(clock.at)-2)], clock.at[-1]
    out = dict(learning_rate=r.learning_rate, trained=rep['params_trained'], total=rep['params_total'], peak=rep['memory']['peak'], before=before, metric=rep['memory']['metric'], tokens=rep['tokens'], steps=rep['steps'], tokens_per_second=round((n1-n0)/(t1-t0), 1), train_loss=rep['train_loss'], weights=weights_of(run))
    if a.search: out['valid_loss'] = valid_loss(run, trainer)
    else:
        del trainer, clock
        out.update(answered(run, 'tuned'))
    print(json.dumps(out))

def call(a, folder, name, steps, multiple=1., search=False):
    "One process of this script; its result, or {error: sentence}"
    args = [f'--{k}={getattr(a, k)}' for k in ('model', 'rows', 'batch', 'seed')]+['--cpu']*a.cpu+['--search']*search
    try: p = subprocess.run([sys.executable, __file__, '--one', name, '--folder', folder, f'--steps={steps}', f'--multiple={multiple}', *args], capture_output=True, text=True, timeout=a.timeout)
    except subprocess.TimeoutExpired: return dict(error=f'not done after {a.timeout} s')
    line = next((l for l in reversed(p.stdout.splitlines()) if l.startswith('{')), None)
    return json.loads(line) if p.returncode==0 and line else dict(error=(p.stderr.strip().splitlines() or [f'exit {p.returncode}'])[-1][:500])

def measure(a, folder, name):
    "The row of one method: its rate, chosen if there are several, then the whole budget"
    if name=='base': return call(a, folder, name, 1)
    tried = {m: call(a, folder, name, max(2, a.steps//3), m, True) for m in a.rates} if len(a.rates)>1 else {}
    good = {m: o['valid_loss'] for m,o in tried.items() if math.isfinite(o.get('valid_loss', math.inf))}
    if tried and not good: return next(iter(tried.values())) if 'error' in next(iter(tried.values())) else dict(error='every rate diverged')
    best = min(good, key=good.get) if good else a.rates[0]
    return dict(call(a, folder, name, a.steps, best), **(dict(tried={f'{rates[name][0]*m:g}': round(v, 4) for m,v in good.items()}) if good else {}))

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--methods', help='names, separated by commas; default: all'); p.add_argument('--model', default='smollm2-135m')
    p.add_argument('--steps', type=int, default=24); p.add_argument('--rows', type=int, default=40, help='held-out rows'); p.add_argument('--batch', type=int, default=4); p.add_argument('--seed', type=int, default=42)
    p.add_argument('--rates', default='1', help='multiples of the learning rate to choose from by the validation loss'); p.add_argument('--timeout', type=int, default=1800, help='seconds for one process')
    p.add_argument('--cpu', action='store_true', help='stay on the CPU even if there is a GPU'); p.add_argument('--again', action='store_true', help='measure anew what the file has'); p.add_argument('--out', default='bench/results/methods.json')
    for k,t in (('one', str), ('folder', str), ('multiple', float)): p.add_argument(f'--{k}', type=t, default=1. if t is float else None, help=argparse.SUPPRESS)
    p.add_argument('--search', action='store_true', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one: return one(a)
    a.rates = [float(x) for x in a.rates.split(',')]
    names = ['base', *(a.methods.split(',') if a.methods else methods)]
    if bad := [n for n in names[1:] if n not in methods]: sys.exit(f'There is no method {bad[0]!r}; there are {", ".join(methods)}.')
    from ftnb.runs import hardware, versions
    budget = dict(model=a.model, steps=a.steps, batch=a.batch, rows=a.rows, rates=a.rates, seed=a.seed, cpu=a.cpu)
    old = read_json(a.out, {})
    res = dict(budget=budget, rows=old['rows'] if old.get('budget')==budget and not a.again else {})
    with tempfile.TemporaryDirectory() as d:
        for name in names:
            if name in res['rows'] and 'error' not in res['rows'][name]: print(f'{name}: done before', flush=True); continue
            if not Path(d, 'data').exists() and (bad := call(a, d, 'data', 1).get('error')): sys.exit(bad)
            t = time.time()
            res['rows'][name] = got = measure(a, d, name)
            got['seconds'] = round(time.time()-t, 1)
            res.update(rates={k: dict(rate=v, why=w) for k,(v,w) in rates.items() if k in res['rows']}, versions=versions(), hardware={k: v for k,v in hardware().items() if k in ('cpu', 'cores', 'gpus')}, threads=os.environ.get('OMP_NUM_THREADS'), clock='one core' if one_core(a) else 'wall', command=' '.join(['OMP_NUM_THREADS=1']*one_core(a)+['python', 'bench/methods.py', *[x for x in sys.argv[1:] if x!='--again']]))
            write_json(a.out, res)
            print(f'{name}: {got.get("error") or {k: v for k,v in got.items() if k not in ("rows", "losses")}}', flush=True)
            for f in Path(d).glob(f'{name}-*'): shutil.rmtree(f)
    return 1 if any('error' in o for o in res['rows'].values()) else 0

if __name__=='__main__': sys.exit(main())
