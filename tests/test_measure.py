"What a step really took, what is said when memory runs out, and that retrying trains the same"
import csv, json
import pytest

torch = pytest.importorskip('torch')
from ftnb.base import UserError
from ftnb.measure import Meter, OutOfMemory, append_row, columns, is_oom, memory_report, oom_sentence, smaller_batch
from ftnb.recipe import make_recipe
from ftnb.loss import Trainer
from ftnb.train import make_trainer, train
from test_training import STEADY, weights

def test_a_real_allocation_that_fails_is_recognised():
    with pytest.raises(RuntimeError) as e: torch.empty(1<<50)
    assert is_oom(e.value) and is_oom(torch.OutOfMemoryError('CUDA out of memory')) and not is_oom(RuntimeError('mat1 and mat2 shapes cannot be multiplied'))

@pytest.mark.parametrize('b, acc', [(8, 1), (6, 2), (5, 3), (7, 1), (16, 4)])
def test_a_smaller_batch_keeps_the_effective_one(b, acc):
    less = smaller_batch(b, acc)
    assert less[0]<b and less[0]*less[1]==b*acc

def run_out(monkeypatch, above, at=2):
    "Make training run out of memory when a forward pass has more rows than `above`, after `at` steps"
    real = Trainer._short_loss
    def loss(self, model, inputs, n):
        if self.state.global_step>=at and len(inputs['input_ids'])>above: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
        return real(self, model, inputs, n)
    monkeypatch.setattr(Trainer, '_short_loss', loss)

def test_retrying_with_smaller_pieces_trains_the_same(made, monkeypatch, capsys):
    how = dict(STEADY, per_device_train_batch_size=4, max_steps=6, save_strategy='steps', save_steps=2)
    want = made(**how)
    train(want)
    run = made(**how, on_oom='retry')
    run_out(monkeypatch, above=1, at=3)
    rep = train(run)
    assert rep['batch']==[1, 4] and rep['steps']==6 and rep['resumed_from']=='checkpoint-2'
    a, b = weights(want), weights(run)
    assert max((a[k]-b[k]).abs().max()/(a[k].abs().max()+1e-9) for k in a)<1e-5
    assert [e['batch'] for e in run.events() if e['event']=='out_of_memory']==[4, 2] and 'Going on with batch 2 x 2' in capsys.readouterr().out

def test_without_leave_to_retry_the_sentence_says_what_to_change(made, monkeypatch):
    run = made(**STEADY, per_device_train_batch_size=4, max_steps=6)
    run.save_report('plan', dict(memory=dict(peak=3<<30, by_owner=dict(activations=1<<30))))
    run_out(monkeypatch, above=1)
    with pytest.raises(OutOfMemory) as e: train(run)
    for part in ('in the forward pass after step 2', 'batch 4 of up to', 'the forecast was 3.0 GiB, 2.0 GiB of it held', 'per_device_train_batch_size: 2 with gradient_accumulation_steps: 2', 'activation_checkpointing: true'):
        assert part in str(e.value), str(e.value)
    assert '\n' not in str(e.value)

def test_a_single_row_that_does_not_fit_stops(made, monkeypatch):
    run = made(**STEADY, per_device_train_batch_size=2, max_steps=6, on_oom='retry')
    run_out(monkeypatch, above=0)
    with pytest.raises(OutOfMemory, match='batch 1 of up to'): train(run)

def test_on_a_cpu_resident_memory_is_held_against_resident_memory(made):
    meter = Meter(cuda=False)
    meter.enter('forward')
    run = made(**STEADY)
    run.save_report('plan', dict(memory=dict(peak=2**30, by_phase={}, resident=[2**31, 3*2**30, 2**32])))
    m = memory_report(run, meter, 'CPU')
    assert m['metric']=='resident' and m['forecast']==3*2**30 and m['forecast_by_phase'] is None and m['row']['forecast_gb']==3

def test_the_report_holds_forecast_and_fact(made, tmp_path):
    run = made(**STEADY, per_device_train_batch_size=2, max_steps=2)
    run.save_report('plan', dict(memory=dict(peak=1<<30, by_owner={}, by_phase={})))
    m = train(run)['memory']
    assert {'forward', 'backward', 'optimizer step', 'between steps'}<=set(m['measured']) and m['metric']=='resident'
    assert m['peak']==max(m['measured'].values()) and m['ratio']==round(m['peak']/2**30, 4)
    append_row(tmp_path/'rows.csv', m['row'])
    row, = csv.DictReader((tmp_path/'rows.csv').open())
    assert list(row)==list(columns) and float(row['peak_gb'])>.1 and '/' not in row['model']
    assert json.loads(json.dumps(m))==m
