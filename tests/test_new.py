"""`ftnb new`: every field stands in the file, it loads as meant, and git is asked what it ignores"""
import re, subprocess
from pathlib import Path

import pytest

from ftnb.base import UserError
from ftnb.fields import groups, help_of, names
from ftnb.new import gitignore, never_in_git, new_recipe
from ftnb.recipe import load_recipe, make_recipe

ROOT = Path(__file__).parents[1]
unwanted = ['.env', '.credentials', 'runs/demo/state.json', 'checkpoints/checkpoint-5/trainer_state.json', 'model.safetensors', 'pytorch_model.bin',
    'sub/optimizer.pt', 'a.pth', 'sub/sub/q4_k_m.gguf', 'sub/.env']
wanted = ['my.yaml', 'notes.ipynb', 'sub/more.yaml', 'run.py', 'README.md', '.gitignore', 'environment.md', 'data/other.jsonl']

def git(folder, *args): return subprocess.run(['git', '-C', str(folder), *args], capture_output=True, text=True)
def ignored(folder, path): return git(folder, 'check-ignore', '-q', '--no-index', '--', path).returncode==0

@pytest.fixture
def work(tmp_path, monkeypatch):
    "An empty repository that is the current folder, with one data file"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path/'none'))
    assert git(tmp_path, 'init', '-q').returncode==0
    (tmp_path/'tickets.jsonl').write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path

chosen = [dict(), dict(dataset='tickets.jsonl'), dict(dataset='demo', lora_r=32), dict(peft='qlora'), dict(load_in_4bit=True), dict(load_in_8bit=True),
    dict(peft='full', learning_rate='2e-5', optim='adafactor'), dict(lora_target_modules=['q_proj', 'v_proj'], rank_pattern={'q_proj': 4}),
    dict(system_prompt='Be brief: "yes", \'no\' # or {none}\n\nSecond: ünïcode \U0001F600 \u2028 end '), dict(eval_strategy='no', save_strategy='no'),
    dict(early_stopping_patience=2), dict(do_sample=True, temperature=0.7, top_p=0.9), dict(lr_scheduler_kwargs={'min_lr': 1e-8}, lr_scheduler_type='cosine_with_min_lr'),
    dict(dataset=[{'path': 'tickets.jsonl', 'split': 'train', 'weight': 0.5}, {'path': 'tickets.jsonl', 'split': 'test', 'mapping': {'prompt': 'a, b'}}]),
    dict(dataset='owner/name'), dict(mapping={'prompt': 'no', 'completion': '1'}), dict(pad_token='<|pad|>', run_name='2024-01-01'), dict(torch_dtype='float32', epochs='1'),
    dict(spec_id='R-1', spec=[{'id': 'a', 'text': 'The run shall train: always.', 'proof': 'stage:train'}]), dict(seed=42, report_to=['tensorboard', 'wandb']),
    dict(init_lora_weights='pissa', resume_from_checkpoint='false', max_eval_samples='none')]

@pytest.mark.parametrize('values', chosen, ids=lambda v: ','.join(v) or 'nothing')
def test_round_trip_as_written_and_uncommented(work, values):
    p = new_recipe('my.yaml', **values)
    meant = make_recipe({k:v for k,v in values.items()})
    assert load_recipe(p)==meant
    text = p.read_text()
    p.write_text(re.sub(r'(?m)^#(?=\w)', '', text))
    assert load_recipe(p)==meant
    assert set(re.findall(r'(?m)^(\w+):', p.read_text()))==set(names)

def test_every_field_once_in_its_group_with_its_help(work):
    text = new_recipe('my.yaml', 'tickets.jsonl', seed=42).read_text()
    assert re.findall(r'(?m)^#?(\w+):', text)==names
    assert re.findall(r'(?m)^# ---- (\w+) ----$', text)==list(groups)
    for k,h in help_of().items(): assert re.search(rf'(?m)^#?{k}: .*  # {re.escape(h)}$', text), k
    assert re.findall(r'(?m)^(\w+):', text)==['dataset', 'seed']  # chosen, even where it is the default
    assert 'dataset: tickets.jsonl ' in text  # as given, to be found from where ftnb run is called

def test_refuses_to_overwrite(work):
    new_recipe('my.yaml', 'tickets.jsonl')
    before = Path('my.yaml').read_text()
    with pytest.raises(UserError, match=r'my\.yaml is there already.*--force'): new_recipe('my.yaml', 'demo')
    assert Path('my.yaml').read_text()==before
    assert load_recipe(new_recipe('my.yaml', 'demo', force=True)).dataset=='demo'

@pytest.mark.parametrize('dataset,says', [('tikets.jsonl', "no file tikets.jsonl .*Did you mean 'tickets.jsonl'"), ('./tickets.json', "Did you mean 'tickets.jsonl'"),
    ('nowhere', 'no file nowhere'), ([{'path': 'tikets.jsonl'}], "Did you mean 'tickets.jsonl'")])
def test_missing_data_is_named_and_nothing_is_written(work, dataset, says):
    with pytest.raises(UserError, match=says): new_recipe('my.yaml', dataset)
    assert sorted(o.name for o in work.iterdir())==['.git', 'tickets.jsonl']

@pytest.mark.parametrize('path,values,says', [('tickets.jsonl', {}, 'ends in .yaml'), ('my.yaml', dict(learnig_rate=1), "learning_rate"), ('my.yaml', dict(lora_r=0), 'lora_r: 0 is below 1'),
    ('my.yaml', dict(hf_token='hf_x'), 'a token never stands in a recipe')])
def test_wrong_values_are_refused_before_writing(work, path, values, says):
    with pytest.raises(UserError, match=says): new_recipe(path, force=True, **values)
    assert sorted(o.name for o in work.iterdir())==['.git', 'tickets.jsonl'] and 'prompt' in Path('tickets.jsonl').read_text()

@pytest.mark.parametrize('path', [*unwanted, 'tickets.jsonl'])
def test_git_ignores_in_a_users_project(work, path):
    assert not ignored(work, path)
    new_recipe('my.yaml', 'tickets.jsonl')
    assert ignored(work, path)

@pytest.mark.parametrize('path', wanted)
def test_git_keeps_a_users_own_files(work, path):
    new_recipe('my.yaml', 'tickets.jsonl')
    assert not ignored(work, path)

@pytest.mark.skipif(not (ROOT/'.git').exists(), reason='not a clone of the repository')
@pytest.mark.parametrize('path', unwanted)
def test_git_ignores_in_this_project(path): assert ignored(ROOT, path)

@pytest.mark.skipif(not (ROOT/'.git').exists(), reason='not a clone of the repository')
@pytest.mark.parametrize('path', ['my.yaml', 'nbs/01_settings.ipynb', 'nbs/stages/1_prepare.ipynb', 'ftnb/runs.py', 'data/demo/train.jsonl', 'settings.ini'])
def test_git_keeps_this_projects_files(path): assert not ignored(ROOT, path)

def test_status_shows_only_what_a_person_would_commit(work):
    (work/'runs'/'my').mkdir(parents=True)
    for f in ('.env', 'runs/my/state.json', 'a.safetensors'): (work/f).write_text('x')
    new_recipe('my.yaml', 'tickets.jsonl')
    assert git(work, 'status', '--porcelain', '-uall').stdout.split()[1::2]==['.gitignore', 'my.yaml']

@pytest.mark.parametrize('name', ['what[1]?.jsonl', 'a*b.jsonl', '#first.jsonl', '!not.jsonl', 'blank .jsonl', 'ends ', 'back\\slash.jsonl', 'ünï.jsonl', '[a-z].jsonl', 'a\nb.jsonl'])
def test_odd_names_of_data_mean_themselves_only(work, name):
    (work/name).write_text('x')
    for other in ('axb.jsonl', 'b.jsonl', 'what1x.jsonl', 'first.jsonl', 'not.jsonl', 'ends', 'slash.jsonl'): assert not ignored(work, other)
    gitignore(work, [work/name])
    assert ignored(work, name)
    for other in ('axb.jsonl', 'b.jsonl', 'what1x.jsonl', 'first.jsonl', 'not.jsonl', 'ends', 'slash.jsonl', 'sub/b.jsonl'): assert not ignored(work, other)

def test_a_data_folder_and_data_outside(work):
    (work/'data').mkdir()
    (work/'data'/'train.jsonl').write_text('{}')
    gitignore(work, ['data', '/elsewhere/x.jsonl', '..', '.'])
    assert ignored(work, 'data/train.jsonl') and not ignored(work, 'sub/data/train.jsonl') and not ignored(work, 'my.yaml')
    assert (work/'.gitignore').read_text().splitlines()[1:]==[*never_in_git, '/data/']

@pytest.mark.parametrize('old', [b'', b'*.log', b'*.log\n', b'*.log\r\n*.pt\r\n', b'caf\xe9\n', b'*.pt\n!keep.pt\n'])
def test_lines_are_added_below_once(work, old):
    p = work/'.gitignore'
    p.write_bytes(old)
    added = gitignore(work, ['tickets.jsonl'])
    new = p.read_bytes()
    assert new.startswith(old) and new.endswith(b'\n') and b'\n\n' not in new
    lines = [l.strip() for l in new.split(b'\n')]
    for l in [*never_in_git, '/tickets.jsonl']: assert lines.count(l.encode())==1
    assert ('*.pt' in added)==(b'*.pt' not in old)
    assert gitignore(work, ['tickets.jsonl'])==[] and p.read_bytes()==new
    (work/'b.jsonl').write_text('{}')
    assert gitignore(work, ['b.jsonl'])==['/b.jsonl'] and p.read_bytes()==new+b'/b.jsonl\n'

def test_an_exception_below_is_kept(work):
    gitignore(work)
    with (work/'.gitignore').open('a') as f: f.write('!keep.bin\n')
    gitignore(work, ['tickets.jsonl'])
    assert not ignored(work, 'keep.bin') and ignored(work, 'other.bin')

def test_a_recipe_in_a_subfolder(work):
    new_recipe('recipes/my.yaml', 'tickets.jsonl')
    for path in ('tickets.jsonl', 'runs/my/state.json', 'recipes/.env'): assert ignored(work, path)
    assert not ignored(work, 'recipes/my.yaml')
