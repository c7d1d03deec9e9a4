"The page of measured methods: written from the figures of the bench, complete, and plain about what was not measured"
import importlib.util, json, sys
from pathlib import Path
import pytest

from ftnb.methods import methods

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import measured_methods as maker # noqa: E402
spec = importlib.util.spec_from_file_location('bench_methods', ROOT/'bench/methods.py')
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

def row(right, n=40, **more): return dict(dict(rows=[1.]*right+[0.]*(n-right), losses=[[2., 4]]*n, trained=10, total=1000, peak=2**31, before=2**29, tokens=99, steps=3, tokens_per_second=50., weights=1000, learning_rate=1e-3), **more)
def results(**rows): return dict(budget=dict(model='m', steps=3, batch=4, rows=40, rates=[1.], seed=42, cpu=True), rows=rows, rates={k: dict(rate=1e-3, why='so') for k in rows}, hardware=dict(cpu='c', cores=2, gpus=[]), versions=dict(torch='1', transformers='2', peft='3'), command='python bench/methods.py')

def test_every_method_has_a_learning_rate_with_a_reason():
    assert set(bench.rates)==set(methods) # a rate of a method that is gone is a leftover
    assert all(0<v<1 and w for v,w in bench.rates.values()) and set(bench.more)<=set(methods)

def test_every_method_makes_a_valid_recipe_with_the_same_budget():
    import argparse
    a = argparse.Namespace(model='smollm2-135m', batch=4, rows=8, seed=1, cpu=True)
    rs = [bench.recipe(m, a, 5, 1.) for m in methods]
    assert {(r.max_steps, r.per_device_train_batch_size, r.seed, r.train_sampling_strategy, r.max_length) for r in rs}=={(5, 4, 1, 'random', 512)}

def test_a_worse_method_is_called_worse_and_a_like_one_is_not():
    page = maker.page(results(full=row(30), lora=row(29), ia3=row(5), prefix=dict(error='it broke')))
    line = {k: next(l for l in page.splitlines() if l.startswith('|') and f'`{k}`' in l) for k in ('full', 'lora', 'ia3', 'prefix')}
    assert 'is full' in line['full'] and 'as good' in line['lora'] and ': worse' in line['ia3'] and 'it broke' in line['prefix']
    assert page.index('`lora`')<page.index('`ia3`')

@pytest.mark.parametrize('kind', ['PromptTuningConfig', 'PrefixTuningConfig'])
def test_virtual_tokens_do_not_shift_the_loss_of_held_out_rows(tiny, kind):
    import peft, torch
    from transformers import AutoModelForCausalLM
    from ftnb.generate import row_losses
    m = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), getattr(peft, kind)(task_type='CAUSAL_LM', num_virtual_tokens=5)).eval()
    ids = list(range(10, 30))
    labels = [-100]*8+ids[8:]
    loss, n = row_losses(m, [(ids, labels), (ids[:12], labels[:12])], 0)[0]
    with torch.no_grad(): want = m(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, 20, dtype=torch.long), labels=torch.tensor([labels])).loss.item()
    assert n==12 and loss/n==pytest.approx(want, rel=1e-4)

def test_without_full_nothing_is_set_against_it(): assert 'was not measured' in maker.page(results(lora=row(29))) and ': worse' not in maker.page(results(lora=row(29)))

def test_the_page_is_what_its_maker_writes():
    if not maker.source.exists(): pytest.skip('the bench was not run yet')
    assert (ROOT/'guides/methods.qmd').read_text()==maker.page(maker.load()), 'run python tools/measured_methods.py'
