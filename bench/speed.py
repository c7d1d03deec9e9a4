"""Training speed on the demo: ftnb's trainer against plain SFTTrainer with its defaults.

Same labels, adapter, batch, rows, order and token budget; only what ftnb sets differs (weights in the type the
device computes well, no activation checkpointing on a CPU, loss at the trained positions only).
Trained tokens (labels that are not -100) per second inside train(), from step 3 on; runs alternate; medians.

    python bench/speed.py [--runs 5] [--steps 12] [--out bench/results/speed.json]
"""
import argparse, gc, json, os, statistics, sys, tempfile, time
os.environ.setdefault('HF_HUB_OFFLINE', '1')
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer
from ftnb.generate import row_losses
from ftnb.load import quiet
from ftnb.models import model_path
from ftnb.prepare import prepare
from ftnb.recipe import make_recipe
from ftnb.runs import Run, hardware, versions
from ftnb.train import make_trainer, token_data

class Clock(TrainerCallback):
    "Time at each step's end"
    def __init__(self): self.t = []
    def on_step_end(self, *a, **k): self.t.append(time.perf_counter())

def counted(cls):
    "A trainer that notes how many labels each step trains"
    class Counted(cls):
        def training_step(self, model, inputs, *a, **k):
            self.counts.append(int((inputs['labels'][:, 1:]!=-100).sum()))
            return super().training_step(model, inputs, *a, **k)
    return Counted

def ours(run):
    from ftnb import train as T
    old, T.Trainer = T.Trainer, counted(T.Trainer)
    try: return make_trainer(run)
    finally: T.Trainer = old

def plain(run):
    r = run.recipe
    args = SFTConfig(output_dir=str(run.path('plain')), per_device_train_batch_size=r.per_device_train_batch_size, max_steps=r.max_steps, learning_rate=r.learning_rate,
        lr_scheduler_type=r.lr_scheduler_type, warmup_steps=r.warmup_steps, report_to='none', use_cpu=r.use_cpu, save_strategy='no', disable_tqdm=True, seed=r.seed)
    config = LoraConfig(r=r.lora_r, lora_alpha=r.lora_alpha, lora_dropout=r.lora_dropout, target_modules=r.lora_target_modules, task_type='CAUSAL_LM')
    torch.manual_seed(r.seed)
    return counted(SFTTrainer)(model=model_path(r.model_name_or_path), args=args, train_dataset=token_data(run, 'train'), peft_config=config)

def one(make, run, steps):
    t = make(run)
    t.counts, clock = [], Clock()
    t.add_callback(clock)
    t.train()
    rate = sum(t.counts[2:steps])/(clock.t[steps-1]-clock.t[1])
    valid = token_data(run, 'valid')
    model = t.accelerator.unwrap_model(t.model)
    ls = row_losses(model, [(o['input_ids'], o['labels']) for o in valid], 0, 8)
    out = dict(tokens_per_second=round(rate, 1), trained=sum(t.counts), heldout_loss=round(sum(l for l,_ in ls)/sum(k for _,k in ls), 5))
    del t, model; gc.collect()
    return out

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--runs', type=int, default=5); p.add_argument('--steps', type=int, default=12); p.add_argument('--out', default='bench/results/speed.json')
    a = p.parse_args()
    quiet()
    got = dict(ftnb=[], plain=[])
    with tempfile.TemporaryDirectory() as d:
        run = Run(d, make_recipe(dict(dataset='demo', max_steps=a.steps, learning_rate=1e-3, use_cpu=not torch.cuda.is_available(), save_strategy='no', eval_strategy='no', max_length=512, resume_from_checkpoint=False)))
        prepare(run)
        for i in range(a.runs):
            for name,f in (('plain', plain), ('ftnb', ours)):
                got[name].append(one(f, run, a.steps))
                print(name, got[name][-1], flush=True)
    med = {k: statistics.median(o['tokens_per_second'] for o in v) for k,v in got.items()}
    loss = {k: statistics.median(o['heldout_loss'] for o in v) for k,v in got.items()}
    res = dict(ratio=round(med['ftnb']/med['plain'], 2), ratios=[round(a['tokens_per_second']/b['tokens_per_second'], 2) for a,b in zip(got['ftnb'], got['plain'])], tokens_per_second=med,
        heldout_loss=loss, loss_ratio=round(loss['ftnb']/loss['plain'], 4), steps=a.steps, runs=got, versions=versions(), hardware={k:v for k,v in hardware().items() if k in ('cpu', 'cores', 'gpus')}, command=' '.join(['python', *sys.argv]))
    os.makedirs(os.path.dirname(a.out) or '.', exist_ok=True)
    json.dump(res, open(a.out, 'w'), indent=1)
    print('ratio', res['ratio'], 'held-out loss', loss)

if __name__=='__main__': main()
