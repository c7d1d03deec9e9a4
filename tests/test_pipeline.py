"The whole way through the command line, on the real small model, in kernels of their own"
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest

FTNB = [sys.executable, '-c', 'from ftnb.cli import main; main()']
SMALL = dict(max_train_samples=8, max_steps=2, per_device_train_batch_size=2, lora_r=4, max_eval_samples=3, max_new_tokens=6, logging_steps=1, use_cpu='true')

def ftnb(*args, cwd, code=0, **kw):
    p = subprocess.run([*FTNB, *args], cwd=cwd, capture_output=True, text=True, timeout=500, env={**os.environ, 'HF_HUB_OFFLINE': '1'}, **kw)
    assert p.returncode==code, f'{args}: exit {p.returncode}\n{p.stdout}\n{p.stderr}'
    assert 'Traceback' not in p.stderr, p.stderr
    return p

def pairs(**kw): return [x for k,v in {**SMALL, **kw}.items() for x in ('-p', f'{k}={v}')]

@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "A workspace with one finished run"
    d = tmp_path_factory.mktemp('work')
    (d/'settings.ini').write_text('[ftnb]\nruns = runs\n')
    p = ftnb('run', 'demo', *pairs(), cwd=d)
    return d, p.stdout

def test_every_stage_says_one_line_and_the_table_stands_at_the_end(work):
    d, out = work
    for n,s in enumerate('prepare plan train evaluate export'.split(), 1): assert f'  {n} {s}' in out
    assert 'fields right' in out and 'Base against tuned' in out and 'evaluate.html' in out

def test_the_run_folder_holds_all_of_it(work):
    d, _ = work
    run = d/'runs/demo'
    for f in ('recipe.yaml', 'manifest.json', 'state.json', 'events.jsonl', 'requirements.lock', '1_prepare.ipynb', '5_export.ipynb', 'data/train.jsonl', 'data/set_aside.jsonl',
        'adapter/adapter_model.safetensors', 'adapter/tokenizer.json', 'merged/model.safetensors', 'reports/evaluate.json', 'reports/evaluate.html'): assert (run/f).exists(), f
    m = json.loads((run/'manifest.json').read_text())
    assert set(m['stages'])=={'prepare', 'plan', 'train', 'evaluate', 'export'} and m['template'] and m['data']['train'] and m['versions']['torch']
    assert all(s['peak_ram']>0 for s in m['stages'].values())

def test_plots_survive_in_the_executed_notebooks(work):
    d, _ = work
    for n in ('1_prepare', '2_plan', '3_train', '4_evaluate'):
        cells = json.loads((d/f'runs/demo/{n}.ipynb').read_text())['cells']
        assert any('image/png' in o.get('data', {}) for c in cells for o in c.get('outputs', [])), n
        assert not any(c['id'].startswith('colab-') for c in cells), n # what only Colab needs is no part of the record

def test_the_same_command_again_skips_every_stage(work):
    d, _ = work
    p = ftnb('run', 'demo', *pairs(), cwd=d)
    assert p.stdout.count('unchanged, skipped')==5

def test_a_generation_value_reruns_evaluation_only(work):
    d, _ = work
    p = ftnb('run', 'demo', *pairs(max_new_tokens=5), cwd=d)
    assert p.stdout.count('unchanged, skipped')==4 and '4 evaluate  unchanged' not in p.stdout

def test_other_training_values_make_a_second_run_from_train_on(work):
    d, _ = work
    p = ftnb('run', 'demo', '--to', 'train', *pairs(lora_r=2), cwd=d)
    assert 'demo-2' in p.stdout and '1 prepare   unchanged, skipped' in p.stdout
    assert json.loads((d/'runs/demo/adapter/adapter_config.json').read_text())['r']==4
    q = json.loads(ftnb('diff', 'demo', 'demo-2', '--json', cwd=d).stdout)
    assert [r['field'] for r in q['recipe'] if r['field']=='lora_r'] and not q['data']

def test_show_ls_and_chat_answer(work):
    d, _ = work
    assert 'lora_r' in ftnb('show', 'demo', cwd=d).stdout
    assert any(r['run']=='demo' for r in json.loads(ftnb('ls', '--json', cwd=d).stdout)['runs'])
    assert set(json.loads(ftnb('chat', 'demo', '--json', 'My kettle leaks', cwd=d).stdout))=={'prompt', 'base', 'tuned'}

def test_a_killed_kernel_is_said_and_the_next_call_goes_on(work, tmp_path):
    (tmp_path/'settings.ini').write_text('[ftnb]\nruns = runs\n')
    args = ['run', 'demo', '--to', 'train', *pairs(max_steps=14, save_steps=1, max_train_samples=40)]
    p = subprocess.Popen([*FTNB, *args], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'HF_HUB_OFFLINE': '1'})
    state, t = tmp_path/'runs/demo/state.json', time.time()
    while time.time()-t<240 and not list((tmp_path/'runs/demo/checkpoints').glob('checkpoint-*/trainer_state.json')): time.sleep(.2)
    os.kill(json.loads(state.read_text())['train']['pid'], signal.SIGKILL)
    out, err = p.communicate(timeout=120)
    assert p.returncode==137 and 'killed' in err and 'memory' in err, err
    ftnb(*args, cwd=tmp_path)
    rep = json.loads((tmp_path/'runs/demo/reports/train.json').read_text())
    assert rep['resumed_from'] and rep["steps"]==14

def test_ctrl_c_keeps_a_checkpoint_and_exits_130(tmp_path):
    (tmp_path/'settings.ini').write_text('[ftnb]\nruns = runs\n')
    args = ['run', 'demo', '--to', 'train', *pairs(max_steps=200, save_steps=100, max_train_samples=40)]
    p = subprocess.Popen([*FTNB, *args], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'HF_HUB_OFFLINE': '1'})
    ev, t = tmp_path/'runs/demo/events.jsonl', time.time()
    while time.time()-t<240 and not (ev.exists() and '"log"' in ev.read_text()): time.sleep(.2)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=120)
    assert p.returncode==130 and 'is kept' in err, (p.returncode, err)
    assert list((tmp_path/'runs/demo/checkpoints').glob('checkpoint-*/trainer_state.json'))

def test_a_mistake_is_one_sentence(tmp_path):
    (tmp_path/'my.yaml').write_text('dataset: none.jsonl\n')
    p = ftnb('run', 'my.yaml', cwd=tmp_path, code=3)
    assert len(p.stderr.strip().splitlines())==1 and 'none.jsonl' in p.stderr
    (tmp_path/'my.yaml').write_text('learnig_rate: 1\n')
    p = ftnb('run', 'my.yaml', cwd=tmp_path, code=2)
    assert "line 1: unknown key 'learnig_rate'. Did you mean 'learning_rate'?" in p.stderr

@pytest.mark.soak
def test_the_demo_is_better_than_its_base(tmp_path):
    (tmp_path/'settings.ini').write_text('[ftnb]\nruns = runs\n')
    ftnb_ = subprocess.run([*FTNB, 'run', 'demo', '--json'], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'HF_HUB_OFFLINE': '1'})
    assert ftnb_.returncode==0, ftnb_.stderr
    ms = {m['metric']: m for m in json.loads(ftnb_.stdout)['metrics']}
    assert ms['valid_json']['tuned']>=.98 and ms['field_accuracy']['tuned']>=.8 and ms['whole_answer']['tuned']>=.5
    assert ms['perplexity']['tuned']<=ms['perplexity']['base']/2 and all(ms[k]['better']=='better' for k in ('field_accuracy', 'whole_answer', 'perplexity'))
