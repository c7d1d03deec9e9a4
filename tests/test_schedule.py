"Steps and learning rates against the real Trainer, accelerate's sharding and every scheduler of transformers"
import os

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
torch = pytest.importorskip('torch')
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import Trainer, TrainingArguments, get_scheduler

from ftnb.base import UserError
from ftnb.schedule import Schedule, lr_at, lr_curve, schedules, steps_per_epoch, total_steps, warmup


def args(tmp_path, **k): return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to='none', save_strategy='no', logging_strategy='no', disable_tqdm=True, **k)

def rows(n): return [dict(x=torch.ones(2), labels=torch.ones(1)) for _ in range(n)]

class Net(torch.nn.Module):
    def __init__(self): super().__init__(); self.w = torch.nn.Linear(2, 1)
    def forward(self, x, labels=None): return dict(loss=(self.w(x)-labels).pow(2).mean())

@pytest.mark.parametrize('n', [1, 7, 8, 9, 31, 32, 33, 100])
@pytest.mark.parametrize('batch,accum', [(1, 1), (8, 1), (8, 4), (3, 5), (4, 64)])
def test_counts_of_the_trainer(tmp_path, n, batch, accum):
    for epochs,max_steps,drop in [(1, -1, False), (3, -1, False), (.5, -1, False), (2.3, -1, False), (3, 5, False), (2, -1, True)]:
        a = args(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accum, num_train_epochs=epochs, max_steps=max_steps, dataloader_drop_last=drop)
        if drop and n<batch:
            with pytest.raises(UserError, match='fill no batch'): total_steps(n, batch, dataloader_drop_last=True)
            continue
        t = Trainer(model=Net(), args=a, train_dataset=rows(n))
        real = t.set_initial_training_values(a, t.get_train_dataloader())
        assert steps_per_epoch(n, batch, accum, dataloader_drop_last=drop)==real[1]
        assert total_steps(n, batch, accum, epochs, max_steps, dataloader_drop_last=drop)==real[-1]
        assert Schedule(n, batch, accum).batch_size==real[4]==t.get_total_train_batch_size(a)

@pytest.mark.parametrize('n,batch,accum,epochs', [(9, 2, 2, 2), (10, 3, 4, 1.5), (5, 8, 2, 3)])
def test_steps_a_real_run_takes(tmp_path, n, batch, accum, epochs):
    "Trained for real: the optimizer steps taken, and the learning rate of each"
    seen = []
    class Seen(Trainer):
        def training_step(self, *a, **k):
            if not seen or seen[-1][0]!=self.state.global_step: seen.append((self.state.global_step, self.optimizer.param_groups[0]['lr']))
            return super().training_step(*a, **k)
    t = Seen(model=Net(), args=args(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accum, num_train_epochs=epochs,
        learning_rate=2e-4, lr_scheduler_type='cosine', warmup_steps=.3), train_dataset=rows(n))
    t.train()
    s = Schedule(n, batch, accum, epochs, learning_rate=2e-4, warmup_steps=.3)
    assert t.state.global_step==s.total
    assert seen==[(i, pytest.approx(lr, rel=1e-12, abs=1e-18)) for i,lr in s.curve()]

@pytest.mark.parametrize('world', [2, 3, 8])
@pytest.mark.parametrize('drop', [False, True])
def test_processes_share_the_batches(world, drop):
    for n in (48, 49, 55, 100):
        shard = BatchSamplerShard(BatchSampler(SequentialSampler(range(n)), 2, drop), world, 0)
        assert steps_per_epoch(n, 2, 1, world, drop)==len(shard)==len(list(DataLoader(range(n), batch_sampler=shard)))

@pytest.mark.parametrize('w', [0, .03, .1, .5, .999, 1, 1., 7, 12.6])
def test_warmup(tmp_path, w):
    for total in (1, 10, 33, 1000): assert warmup(w, total)==args(tmp_path, warmup_steps=w).get_warmup_steps(total)

kwargs = dict(linear=[None], constant=[None], constant_with_warmup=[None], cosine=[None, dict(num_cycles=1.5)], cosine_with_restarts=[None, dict(num_cycles=3)],
    polynomial=[None, dict(lr_end=1e-5, power=2.)], inverse_sqrt=[None, dict(timescale=20)], cosine_with_min_lr=[dict(min_lr=1e-5), dict(min_lr_rate=.1, num_cycles=1.)],
    warmup_stable_decay=[dict(num_decay_steps=9), dict(num_decay_steps=5, num_stable_steps=4, decay_type='linear', min_lr_ratio=.1), dict(num_decay_steps=5, decay_type='1-sqrt')])

@pytest.mark.parametrize('name', schedules)
def test_learning_rates(name):
    for kw in kwargs[name]:
        for total,warm in [(40, 0), (40, 7), (40, .1), (1, 0), (25, 24)]:
            if name=='warmup_stable_decay' and total!=40: continue
            opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=3e-4)
            sched = get_scheduler(name, opt, num_warmup_steps=warmup(warm, total), num_training_steps=total, scheduler_specific_kwargs=kw)
            for step in range(total):
                assert lr_at(step, 3e-4, total, name, warm, kw)==pytest.approx(opt.param_groups[0]['lr'], rel=1e-12, abs=1e-18), (name, kw, warm, step)
                opt.step(); sched.step()

def test_curve_ends():
    for total in (1, 2, 999, 1000, 1001, 12345):
        c = lr_curve(1e-4, total, 'linear', .1)
        assert (c[0][0], c[-1][0])==(0, total-1) and len(c)<=1000 and [s for s,_ in c]==sorted({s for s,_ in c})

def test_mistakes_are_sentences():
    for bad in (dict(rows=0), dict(rows=5, per_device_train_batch_size=0), dict(rows=5, gradient_accumulation_steps=-1), dict(rows='5')):
        with pytest.raises(UserError): total_steps(**bad)
    with pytest.raises(UserError, match='evaluation'): lr_at(0, 1., 5, 'reduce_lr_on_plateau')
    with pytest.raises(UserError, match='min_lr'): lr_at(0, 1., 5, 'cosine_with_min_lr')
    with pytest.raises(UserError, match='warmup_steps=-1'): warmup(-1, 5)
