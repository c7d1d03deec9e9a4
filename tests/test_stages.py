"The contract of the stage notebooks, what ships, and the command line around them"
import ast, json, os, re, shutil, subprocess, sys, zipfile
from pathlib import Path

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
from ftnb import cli
from ftnb.base import UserError, shipped
from ftnb.cli import main
from ftnb.opening import open_run
from ftnb.fields import help_of, names, types
from ftnb.runs import Run, begin, end, stages
from ftnb.stages import parameters_of, plan_stages, stage_notebook, start_stage

ROOT = Path(__file__).parents[1]
paths = sorted((ROOT/'nbs/stages').glob('*.ipynb'))
each = pytest.mark.parametrize('path', paths, ids=lambda p: p.stem)

def cells(path): return json.loads(path.read_text())['cells']
def source(cell): return ''.join(cell['source'])
def code(path): return [c for c in cells(path) if c['cell_type']=='code']
def tagged(path): return [i for i,c in enumerate(cells(path)) if 'parameters' in c['metadata'].get('tags', [])]
def lines(path): return [l for l in source(cells(path)[tagged(path)[0]]).splitlines() if l.strip()]
form = re.compile(r'(\w+):(.+?) = (.+?) # (\S.*)$')

def test_there_is_one_notebook_per_stage():
    assert [p.stem for p in paths]==[f'{i}_{s}' for i,s in enumerate(stages, 1)]
    for s,p in zip(stages, paths): assert stage_notebook(s).resolve()==p.resolve()

@each
def test_one_cell_holds_the_parameters_and_nothing_else(path):
    assert len(tagged(path))==1
    assert not [l for l in lines(path) if not form.match(l)]
    assert all(isinstance(n, ast.AnnAssign) for n in ast.parse(source(cells(path)[tagged(path)[0]])).body)

@each
def test_name_type_and_help_of_a_parameter_are_those_of_the_recipe(path):
    import typing
    scope, helps = dict(vars(typing)), help_of()
    got = [form.match(l).groups() for l in lines(path)]
    assert len({n for n,*_ in got})==len(got)
    for name,type_,value,text in got:
        assert name in names, name
        assert eval(type_, scope)==types[name], f'{name}: {type_}'
        assert text==helps[name], name
        ast.literal_eval(value)
    assert {'output_dir', 'run_name'} <= {n for n,*_ in got}
    assert list(parameters_of(path))==[n for n,*_ in got]

@each
def test_papermill_lists_every_line_with_its_help(path):
    papermill = pytest.importorskip('papermill')
    seen = papermill.inspect_notebook(str(path))
    assert list(seen)==[form.match(l)[1] for l in lines(path)]
    for l in lines(path):
        name, type_, value, text = form.match(l).groups()
        assert seen[name]['help'].strip()==text and seen[name]['default']==value, name

@each
def test_a_stage_reads_like_a_checklist(path):
    assert len(code(path))<=14
    for c in code(path):
        tree = ast.parse(source(c))
        assert not [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda))], source(c)

@each
def test_types_are_imported_before_the_parameters(path):
    before = '\n'.join(source(c) for c in cells(path)[:tagged(path)[0]] if c['cell_type']=='code')
    got = {a.name for n in ast.walk(ast.parse(before)) if isinstance(n, ast.ImportFrom) and n.module=='typing' for a in n.names}
    assert {'Optional', 'Union'} <= got

@each
def test_a_stage_is_not_executed_by_the_docs_and_ends_with_finish_stage(path):
    assert any(c['cell_type']=='raw' and re.search(r'^skip_exec:\s*true\s*$', source(c), re.M) for c in cells(path)[:3])
    stage = path.stem.split('_')[1]
    assert source(code(path)[-1]).strip().splitlines()[-1].startswith(f"finish_stage(run, '{stage}', ")
    assert f"start_stage('{stage}', globals())" in '\n'.join(source(c) for c in code(path))

@pytest.fixture
def work(tmp_path, monkeypatch):
    "A workspace with one data file and one recipe"
    monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path/'none'))
    monkeypatch.chdir(tmp_path)
    (tmp_path/'my.jsonl').write_text(''.join(json.dumps(dict(prompt=f'a{i}', completion=f'b{i}'))+'\n' for i in range(9)))
    (tmp_path/'r.yaml').write_text('dataset: my.jsonl\nlora_r: 4\n')
    return tmp_path

def test_a_misspelt_injected_parameter_gets_the_nearest_name(work):
    with pytest.raises(UserError, match="learnig_rate.*Did you mean 'learning_rate'"):
        start_stage('prepare', {'In': ['', '# Parameters\nlearnig_rate = 1\n'], 'learnig_rate': 1, 'dataset': 'my.jsonl'})
    assert not (work/'runs').exists()

def test_a_misspelt_injected_parameter_needs_no_value_in_the_namespace(work):
    with pytest.raises(UserError, match="learnig_rate"): start_stage('prepare', {'In': ['# Parameters\nlearnig_rate = 1']})

def test_injected_values_and_names_of_the_notebook_make_the_run(work):
    run = start_stage('prepare', {'In': ['# Parameters\nlora_r = 8\n'], 'lora_r': 8, 'dataset': 'my.jsonl', 'output_dir': 'out', 'Path': Path, '_': 1})
    assert run.folder==work/'out' and run.recipe.lora_r==8 and run.state['prepare']['status']=='running'

def test_a_stage_without_what_comes_before_says_what_to_run(work):
    with pytest.raises(UserError, match='run 1_prepare'): start_stage('plan', {})

inside = ['_stages/3_train.ipynb', '_data/demo/train.jsonl', '_data/models/smollm2-135m.json', '_data/templates/chatml.jinja']
find = f'import ftnb; from ftnb.base import shipped; print(ftnb.__file__)\nfor f in {inside!r}: ' + 'k, *parts = f[1:].split("/"); ' + 'assert shipped(k, *parts).is_file(); print(shipped(k, *parts))'

@pytest.mark.parametrize('file', inside)
def test_what_ships_is_found_in_the_working_tree(file, work):
    kind, *parts = file[1:].split('/')
    assert shipped(kind, *parts).is_file()

def test_what_ships_is_found_in_an_editable_install(tmp_path):
    env = {k:v for k,v in os.environ.items() if k!='PYTHONPATH'}
    p = subprocess.run([sys.executable, '-c', find], cwd=tmp_path, env=env, capture_output=True, text=True)
    if 'No module named' in p.stderr and "'ftnb'" in p.stderr: pytest.skip('ftnb is not installed')
    assert not p.returncode, p.stderr
    if not Path(p.stdout.split()[0]).is_relative_to(ROOT): pytest.skip('ftnb is not installed as editable')

def test_what_ships_is_in_the_wheel_and_is_found_there(tmp_path):
    src, out, there = tmp_path/'src', tmp_path/'whl', tmp_path/'there'
    leave = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for d in ('ftnb', 'nbs/stages', 'data'): shutil.copytree(ROOT/d, src/d, ignore=leave)
    for f in ('pyproject.toml', 'README.md', 'LICENSE'): shutil.copy(ROOT/f, src/f)
    p = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '--no-index', '-w', str(out), '.'],
        cwd=src, capture_output=True, text=True)
    assert not p.returncode, p.stderr[-800:]
    whl, = out.glob('ftnb-*.whl')
    with zipfile.ZipFile(whl) as z:
        have = set(z.namelist())
        z.extractall(there)
    assert not {f'ftnb/{f}' for f in inside}-have
    data = {f'ftnb/_data/{f.relative_to(ROOT/"data")}' for d in ('demo', 'models', 'templates') for f in (ROOT/'data'/d).iterdir() if f.is_file()}
    assert not data-have
    p = subprocess.run([sys.executable, '-c', find], cwd=there, env={**os.environ, 'PYTHONPATH': str(there)}, capture_output=True, text=True)
    assert not p.returncode, p.stderr
    assert all(Path(l).is_relative_to(there) for l in p.stdout.split())

def test_a_missing_recipe_is_exit_2(work, capsys):
    assert main(['run', 'no.yaml'])==2
    err = capsys.readouterr().err
    assert 'There is no recipe no.yaml' in err and 'ftnb new' in err and 'Traceback' not in err

def test_a_missing_run_is_exit_2_with_the_nearest_name(work, capsys):
    open_run('r.yaml', name='tickets')
    assert main(['run', 'tikets'])==2
    assert "Did you mean 'tickets'?" in capsys.readouterr().err

def test_an_unknown_key_is_exit_2_with_its_line(work, capsys):
    (work/'r.yaml').write_text('dataset: my.jsonl\n\nlearnig_rate: 1\n')
    assert main(['run', 'r.yaml'])==2
    err = capsys.readouterr().err
    assert 'r.yaml, line 3' in err and "Did you mean 'learning_rate'?" in err and len(err.strip().splitlines())==1

@pytest.mark.parametrize('value', ['lora_r', 'lorar=3', 'lora_r=0'])
def test_a_wrong_value_on_the_command_line_is_exit_2(work, capsys, value):
    assert main(['run', 'r.yaml', '-p', value])==2
    assert 'lora' in capsys.readouterr().err and not (work/'runs').exists()

def test_from_after_to_is_exit_2(work, capsys):
    assert main(['run', 'r.yaml', '--from', 'train', '--to', 'plan'])==2
    assert '--from train comes after --to plan' in capsys.readouterr().err

def test_from_after_to_leaves_no_run_behind(work):
    main(['run', 'r.yaml', '--from', 'train', '--to', 'plan'])
    assert not (work/'runs/r').exists()

def test_an_unknown_stage_is_exit_2_with_the_nearest_name(work, capsys):
    assert main(['run', 'r.yaml', '--to', 'trian'])==2
    assert "Did you mean 'train'?" in capsys.readouterr().err

def test_ls_as_json(work, capsys):
    open_run('r.yaml')
    assert not main(['ls', '--json'])
    out = json.loads(capsys.readouterr().out)
    assert [s['stage'] for s in out['stages']]==list(stages) and [r['run'] for r in out['runs']]==['r'] and {r['recipe'] for r in out['recipes']} == {'r.yaml', 'demo'}

subs = next(a.choices for a in cli.parser()._actions if hasattr(a, 'choices') and isinstance(a.choices, dict))

@pytest.mark.parametrize('command', ['', *subs])
def test_help_names_every_option(command, capsys):
    with pytest.raises(SystemExit) as e: main([*([command] if command else []), '--help'])
    assert not e.value.code
    out = capsys.readouterr().out
    assert command or not [c for c in subs if c not in out]
    for a in (subs[command] if command else cli.parser())._actions:
        assert a.help or not a.option_strings, f'{command}: {a.dest} has no help'
        assert all(o in out for o in a.option_strings)

def train(run, *done):
    "As if these stages had finished"
    for s in done or ('prepare', 'train'): begin(run, s); end(run, s, line=f'{s} done')
    return run

def test_the_same_values_keep_the_run_and_other_values_make_a_second(work):
    said = []
    one = train(open_run('r.yaml'))
    assert one.name=='r' and open_run('r.yaml').folder==one.folder and open_run('r').folder==one.folder
    two = open_run('r.yaml', {'lora_r': 32}, say=said.append)
    assert two.name=='r-2' and two.recipe.lora_r==32 and 'r-2' in said[-1]
    assert Run(one.folder).recipe.lora_r==4 and Run(one.folder).done('train')
    assert two.done('prepare') and not two.done('train') and two.manifest['parent']=='r'
    assert open_run('r.yaml', {'lora_r': 32}).name=='r-2' and open_run('r.yaml', {'lora_r': 16}).name=='r-3'
    assert open_run('r.yaml').name=='r'

def test_by_the_name_of_a_run_the_same_holds(work):
    train(open_run('r.yaml'))
    assert open_run('r', {'lora_r': 32}).name=='r-2' and open_run('r', {'logging_steps': 3}).name=='r'

def test_in_place_replaces_a_finished_training(work):
    train(open_run('r.yaml'))
    run = open_run('r.yaml', {'lora_r': 32}, in_place=True)
    assert run.name=='r' and Run(run.folder).recipe.lora_r==32 and run.done('prepare') and not run.done('train')
    assert [p.name for p in (work/'runs').iterdir()]==['r']

def test_values_without_effect_on_training_keep_the_run(work):
    train(open_run('r.yaml'))
    run = open_run('r.yaml', {'max_new_tokens': 9})
    assert run.name=='r' and run.done('train')

def test_an_unfinished_training_goes_on_with_other_values_in_the_same_run(work):
    train(open_run('r.yaml'), 'prepare')
    assert open_run('r.yaml', {'lora_r': 32}).name=='r'

def test_other_data_takes_nothing_over(work):
    train(open_run('r.yaml'))
    run = open_run('r.yaml', {'seed': 1})
    assert run.name=='r-2' and not run.done('prepare')

def test_only_changed_stages_must_run(work):
    run = train(open_run('r.yaml'), *stages)
    assert not any(must for _,must in plan_stages(run))
    assert [s for s,must in plan_stages(open_run('r.yaml', {'max_new_tokens': 9})) if must]==['evaluate']
    (work/'my.jsonl').write_text('{"prompt": "x", "completion": "y"}\n')
    assert all(must for _,must in plan_stages(Run(run.folder)))
    assert all(must for _,must in plan_stages(Run(run.folder), force=True))
