"The plan as a user meets it: from the command line, in stage 2, before and after the data is known"
import json, subprocess, sys
import pytest

from conftest import short_rows, write_rows
from ftnb.base import UserError
from ftnb.cli import main
from ftnb.fit import fits
from ftnb.forecast import forecast
from ftnb.plan import plan, plan_run
from ftnb.prepare import prepare
from ftnb.recipe import make_recipe
from ftnb.runs import Run

def recipe(**kw): return make_recipe(dict(model_name_or_path='llama-3.1-8b', max_length=2048, per_device_train_batch_size=1, **kw))

def test_three_numbers_grow_from_allocated_to_device_and_owners_sum_to_the_peak():
    m = plan(recipe(peft='qlora'), 'T4', rows=100).report['memory']
    assert m['allocated'][1]<m['reserved'][1]<m['need'][1] and all(list(m[k])==sorted(m[k]) for k in ('allocated', 'reserved', 'need'))
    assert sum(m['by_owner'].values())==m['peak']==max(m['by_phase'].values()) and m['by_phase'][m['phase']]==m['peak']

@pytest.mark.parametrize('peft, gpu, verdict', [('qlora', 'T4', 'fits'), ('lora', 'T4', 'does not fit'), ('lora', 'RTX 4090', 'fits'), ('full', 'A100 80GB', 'does not fit'), ('full', 'B200', 'fits')])
def test_8b_on_known_cards(peft, gpu, verdict): assert plan(recipe(peft=peft), gpu, rows=100).report['verdict']==verdict

def test_the_ways_out_really_fit():
    p = plan(recipe(peft='full'), 'RTX 4090', rows=100)
    assert p.report['changes'] and len(p.ways)==len(p.report['changes'])
    for c in p.fit(): assert fits(forecast(c.step), p.device).verdict=='fits'
    for c in p.report['changes']: assert plan(recipe(**{'peft': 'full', **c['settings']}), 'RTX 4090', rows=100).report['verdict']=='fits', c

def test_the_largest_length_fits_and_one_more_does_not():
    p = plan(recipe(peft='qlora'), 'T4', rows=100)
    n = p.report['largest_length']
    assert fits(forecast(p.step.but(length=n)), p.device).verdict=='fits' and fits(forecast(p.step.but(length=n+1)), p.device).verdict!='fits'

def test_without_rows_nothing_is_said_of_steps_time_and_price():
    r = plan(recipe(peft='qlora'), 'T4').report
    assert not r['steps'] and not r['time'] and not r['price'] and r['memory'] and any('give rows' in n for n in r['notes'])

def test_an_unknown_architecture_says_so_and_still_plans_steps(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(dict(model_type='banana')))
    r = plan(make_recipe(dict(model_name_or_path=str(tmp_path))), 'T4', rows=80).report
    assert r['verdict']=='unknown' and r['memory'] is None and r['steps']==30 and any("'banana'" in n for n in r['notes'])

def test_a_run_is_planned_with_the_lengths_of_its_rows(tiny, tmp_path):
    data = write_rows(tmp_path/'a.jsonl', short_rows(60))
    run = Run(tmp_path/'run', make_recipe(dict(dataset=data, model_name_or_path=tiny, use_cpu=True, max_length=500)))
    prep = prepare(run.save()).report
    r = plan_run(run).report
    assert r['longest']==prep['lengths']['train']['max']<100 and r['rows']==prep['lengths']['train']['n'] and r['tokens']==3*prep['lengths']['train']['sum']
    assert run.report('plan')['memory']['peak']==r['memory']['peak'] and r['seconds'][0]<r['seconds'][1]<r['seconds'][2]

def test_stage_2_stops_what_does_not_fit_and_names_a_way(tiny, tmp_path):
    data = write_rows(tmp_path/'a.jsonl', short_rows(60))
    run = Run(tmp_path/'run', make_recipe(dict(dataset=data, model_name_or_path=tiny, max_length=500, per_device_train_batch_size=30)))
    prepare(run.save())
    need = plan(run, 'T4').report['memory']['need']
    from ftnb.devices import Device, device
    small = device('T4').with_memory(int(need[0])-1)
    with pytest.raises(UserError, match='does not|needs .* T4 has') as e: plan_run(run, small)
    assert '\n' not in str(e.value) and run.report('plan')['verdict']=='does not fit'

def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'my.yaml').write_text('model_name_or_path: llama-3.1-8b\npeft: qlora\nmax_length: 2048\nper_device_train_batch_size: 1\n')
    assert main(['plan', 'my.yaml', '--gpu', 'T4', '--rows', '1000', '--json'])==0
    r = json.loads(capsys.readouterr().out)
    assert r['verdict']=='fits' and r['steps']==3000 and r['device']=='T4'
    assert main(['plan', 'my.yaml', '--gpu', 'T4', '-p', 'peft=full', '--rows', '10'])==3
    out = capsys.readouterr().out
    assert 'does not fit' in out and 'Memory at the peak' in out
    assert main(['plan', 'my.yaml', '--gpu', 'T44'])==2
    assert "Did you mean 'T4'?" in capsys.readouterr().err
    assert not (tmp_path/'runs').exists()

def test_every_stage_is_in_the_plan_and_the_disk_is_their_sum():
    r = plan(recipe(peft='qlora'), 'T4', rows=100).report
    at = {x['stage']: x for x in r['stages']}
    assert list(at)==['load', 'train', 'evaluate', 'merge', 'convert'] and at['train']['gpu']==r['memory']['peak'] and r['disk']==at['train']['disk']+at['merge']['disk']
    assert at['merge']['gpu']==0 and at['merge']['ram']>2**34 # 8B in float32 is no load for a T4
    big = plan(recipe(peft='full', per_device_eval_batch_size=64), 'RTX 4090', rows=100)
    assert any(n.startswith('evaluate: ') and 'per_device_eval_batch_size' in n for n in big.report['notes'])
    assert {o['way'] for o in big.report['offload']}=={'paged', 'zero2', 'zero3', 'device_map'} and 'What offloading would move' in repr(big)

def test_on_a_cpu_what_must_fit_is_resident_memory():
    r = plan(make_recipe(dict(use_cpu=True, max_length=512, per_device_train_batch_size=4)), rows=400)
    m, has = r.report['memory'], r.report['device_bytes']
    assert m['need']==m['resident'] and m['resident'][0]>m['peak'] and sum(v[1] for v in r.report['resident'].values())==pytest.approx(m['resident'][1], abs=9)
    more = plan(make_recipe(dict(use_cpu=True, max_length=8192, per_device_train_batch_size=64)), rows=400).report
    assert more['memory']['need'][0]>has and more['verdict']=='does not fit' and more['changes']

def test_packed_rows_are_counted_as_sequences(tiny, tmp_path):
    data = write_rows(tmp_path/'a.jsonl', short_rows(60))
    run = Run(tmp_path/'run', make_recipe(dict(dataset=data, model_name_or_path=tiny, use_cpu=True, max_length=500, packing=True, per_device_train_batch_size=1)))
    prep = prepare(run.save()).report
    p = plan(run)
    seqs = p.report['rows']
    assert prep['train_tokens']/500<=seqs<prep['lengths']['train']['n']/2 and p.report['steps']==3*seqs and p.step.packed and p.step.length==500
    assert p.report['tokens']==pytest.approx(3*prep['train_tokens'], rel=.001)

def test_planning_loads_no_torch(tmp_path):
    code = "import sys\nfrom ftnb.plan import plan\nfrom ftnb.recipe import make_recipe\nprint(plan(make_recipe(dict(model_name_or_path='llama-3.1-8b')), 'T4', rows=9))\nassert not {'torch', 'transformers', 'datasets', 'pandas', 'numpy'}&set(sys.modules)"
    p = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode==0, p.stderr
