"An ejected run is plain TRL, and its losses are the run's"
import ast, dataclasses, json, os, subprocess, sys
from pathlib import Path
import pytest

trl = pytest.importorskip('trl')
from conftest import make_tiny, short_rows
from ftnb.base import UserError
from ftnb.eject import eject
from ftnb.fields import names
from ftnb.recipe import make_recipe
from ftnb.runs import Run
from ftnb.train import sampling, train, training_args
from ftnb.trl_script import script, trainer_values, trl_assumes, trl_yaml

def losses(logs): return [h['loss'] for h in logs if 'loss' in h]
def run_python(*args, cwd):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': '', 'HF_HOME': str(Path(cwd)/'.hf')}
    p = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert p.returncode==0, p.stderr[-2000:]
    return p
def ejected_losses(folder, out):
    "Losses of the folder's script, run in a process of its own"
    run_python('train.py', str(out), cwd=folder)
    return losses(json.loads((Path(out)/'trainer_state.json').read_text())['log_history'])

def furthest(a, b):
    assert len(a)==len(b)>=10
    return max(abs(x-y) for x,y in zip(a, b))

TEN = dict(max_steps=10, logging_steps=1, learning_rate=1e-2)

@pytest.mark.parametrize('kw', [dict(peft='full', learning_rate=1e-3, optim='adamw_torch', weight_decay=.1), dict(peft='lora', lora_r=4, lora_dropout=.1, train_sampling_strategy='group_by_length')], ids=['full', 'lora'])
def test_the_first_ten_losses_of_the_script_are_those_of_the_run(made, tmp_path, kw):
    run = made(rows=short_rows(40), **{**TEN, **kw})
    mine = losses(train(run)['logs'])
    eject(run, tmp_path/'plain')
    its = ejected_losses(tmp_path/'plain', tmp_path/'out')
    print(kw['peft'], 'largest difference of a loss:', furthest(mine, its))
    assert furthest(mine, its)<1e-5 and mine[0]!=mine[-1]
    assert (tmp_path/'out'/('model.safetensors' if kw['peft']=='full' else 'adapter_model.safetensors')).exists()
