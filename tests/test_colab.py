"Colab: the cells that open the notebooks there, the copy that survives a disconnect, and Colab's own versions in a second environment"
import ast, hashlib, importlib.util, json, os, re, shutil, subprocess, sys, time
from pathlib import Path
import pytest

from conftest import ROOT, short_rows, write_rows
from ftnb.copies import Copy, whole_checkpoints
from ftnb.recipe import load_recipe, make_recipe
from ftnb.runs import Run, begin, end, stages

spec = importlib.util.spec_from_file_location('front_door', ROOT/'tools/front_door.py')
front = importlib.util.module_from_spec(spec)
spec.loader.exec_module(front)
url, branch, version = front.project()
books = front.books()
each = pytest.mark.parametrize('path', books, ids=lambda p: p.stem)
STUB = ROOT/'tests/colab/stub'

def cells(path): return json.loads(Path(path).read_text())['cells']
def source(path, id): return next(''.join(c['source']) for c in cells(path) if c.get('id')==id)
def ref_of(path): return re.search(r'@(\S+?)"', source(path, 'colab-install'))[1]
def env(**kw): return {**{k:v for k,v in os.environ.items() if not k.startswith(('COLAB_', 'FTNB_DOOR', 'STUB_'))}, 'PYDEVD_DISABLE_FILE_VALIDATION': '1', **kw}

# The cells

def test_every_stage_and_the_launcher_have_the_door_of_this_repository():
    assert len(books)==len(stages)+1 and len({ref_of(p) for p in books})==1
    assert ref_of(books[0]) in (branch, f'v{version}')
    assert not front.stale(ref_of(books[0])), 'run tools/front_door.py'

def test_another_address_or_release_makes_every_door_stale(tmp_path):
    for f in ('pyproject.toml', 'ftnb/__init__.py', *(p.relative_to(ROOT) for p in books)):
        (tmp_path/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/f, tmp_path/f)
    assert len(front.stale('v9', tmp_path))==len(books)
    p = tmp_path/'pyproject.toml'
    p.write_text(p.read_text().replace(url, 'https://github.com/me/mine'))
    assert len(front.stale(branch, tmp_path, write=True))==len(books) and not front.stale(branch, tmp_path)
    for b in front.books(tmp_path): assert 'me/mine' in source(b, 'colab-install') and url not in b.read_text()

@each
def test_the_badge_stands_under_the_title_and_leads_to_this_notebook(path):
    cs = cells(path)
    assert cs[0]['cell_type']==cs[1]['cell_type']=='markdown' and cs[1]['id']=='colab-badge' and len(cs[1]['source'])==1
    repo, ref, file = re.search(r'\]\(https://colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/([^/]+)/(.+)\)$', ''.join(cs[1]['source'])).groups()
    assert f'https://github.com/{repo}'==url and (ROOT/file).samefile(path)

@each
def test_no_placeholder_ships(path):
    assert not re.search(r'OWNER|github\.com/(example|user|your)|example\.(com|org)', path.read_text())

@each
def test_a_gpu_that_is_free_is_asked_for_and_cleaning_keeps_that(path, tmp_path):
    clean = Path(sys.executable).parent/'nbdev-clean'
    if not clean.exists(): pytest.skip('nbdev is not installed')
    for f in ('pyproject.toml', path.relative_to(ROOT)):
        (tmp_path/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/f, tmp_path/f)
    q = tmp_path/path.relative_to(ROOT)
    subprocess.run([str(clean), '--fname', str(q)], cwd=tmp_path, check=True, capture_output=True)
    m = json.loads(q.read_text())['metadata']
    assert m['accelerator']=='GPU' and m['colab']['gpuType']=='T4' and m['kernelspec']['language']=='python'
    assert q.read_text()==path.read_text()

def test_the_install_cell_is_plain_code_before_the_first_import_of_ftnb():
    for p in books:
        src = [''.join(c['source']) for c in cells(p) if c['cell_type']=='code']
        first = next(i for i,s in enumerate(src) if 'ftnb' in s)
        assert src[first]==source(p, 'colab-install') and len(src[first].splitlines())<20
        ast.parse(src[first])

INSTALL = source(books[0], 'colab-install')
def run_cell(src, tmp_path, *, before='', after='', **more):
    "What a process says that runs the cell"
    code = f'{before}\nns = {{}}\nexec({src!r}, ns)\n{after}'
    p = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env(**more), capture_output=True, text=True)
    assert not p.returncode, p.stderr[-2000:]
    return p.stdout

def test_outside_colab_the_install_cell_does_nothing(tmp_path):
    out = run_cell(INSTALL, tmp_path, after='import sys; print(sorted(k for k in ns if k!="__builtins__"), "ftnb" in sys.modules, "subprocess" in sys.modules)')
    assert out.strip()=="['drive', 'os', 'sys'] False False" and not list(tmp_path.iterdir())

@pytest.mark.parametrize('uv', ['works', 'fails', 'is not there'])
def test_on_colab_it_installs_beside_what_is_there(uv, tmp_path):
    said, tools = tmp_path/'said', tmp_path/'bin'
    tools.mkdir()
    def tool(name, code):
        (tools/name).write_text(f'#!/bin/sh\necho "{name} $@ UV=$UV_CONSTRAINT" >> {said}\nexit {code}\n')
        (tools/name).chmod(0o755)
    if uv!='is not there': tool('uv', int(uv=='fails'))
    tool('python', 0)
    out = run_cell(INSTALL.replace('/tmp/keep.txt', 'keep.txt'), tmp_path, before=f'import sys; sys.executable = {str(tools/"python")!r}', COLAB_RELEASE_TAG='t', UV_CONSTRAINT='/nowhere', UV_SYSTEM_PYTHON='1',
        PATH=f'{tools}:/usr/bin:/bin', PYTHONPATH=str(STUB))
    calls = said.read_text().splitlines()
    assert [c.split()[0] for c in calls]=={'works': ['uv'], 'fails': ['uv', 'python'], 'is not there': ['python']}[uv]
    for c in calls: assert f'-c keep.txt ftnb[train] @ git+{url}@{ref_of(books[0])} torchao>=0.16' in c and c.endswith('UV=')
    keep = dict(l.split('==') for l in (tmp_path/'keep.txt').read_text().splitlines())
    assert set(keep)=={'torch', 'numpy', 'ipywidgets', 'ipython', 'ipykernel'} and '+' not in keep['torch']
    assert f'runs: {tmp_path}/runs' in out

def test_in_the_kernel_of_a_launched_stage_nothing_is_installed_or_asked(tmp_path):
    out = run_cell(INSTALL, tmp_path, COLAB_RELEASE_TAG='t', FTNB_DOOR='1', PYTHONPATH=str(STUB), STUB_SECRET_HF_TOKEN='hf_secret', after='import os; print("HF_TOKEN" in os.environ)')
    assert 'notebook that started this one' in out and out.rstrip().endswith('False')

# The token

door = 'from ftnb.door import open_colab\nimport os\nd = open_colab(%s)\nprint(repr(d), os.environ.get("HF_TOKEN")==%r)'
def opened(tmp_path, drive=False, want='hf_mine', **more):
    more = {'HF_TOKEN': '', 'HF_HOME': str(tmp_path), 'PYTHONPATH': str(STUB), **more}
    return run_cell(door % (drive, want), tmp_path, **more)

def test_a_token_of_the_environment_wins_over_the_secrets(tmp_path):
    out = opened(tmp_path, HF_TOKEN='hf_mine', STUB_SECRET_HF_TOKEN='hf_other')
    assert 'from the environment' in out and 'True' in out and 'hf_' not in out

def test_a_secret_reaches_the_environment_and_is_never_shown_or_stored(tmp_path):
    out = opened(tmp_path, STUB_SECRET_HF_TOKEN='hf_mine', drive=True, STUB_DRIVE=str(tmp_path/'mydrive'))
    assert "from Colab's secrets" in out and 'True' in out and 'hf_mine' not in out
    assert not [p for p in tmp_path.rglob('*') if p.is_file() and 'hf_mine' in p.read_text(errors='replace')]

@pytest.mark.parametrize('error', ['SecretNotFoundError', 'NotebookAccessError', 'TimeoutException'])
def test_secrets_that_do_not_answer_stop_nothing(error, tmp_path):
    out = opened(tmp_path, STUB_SECRETS=error)
    assert 'HF_TOKEN: not set, and' in out and 'only gated and private models need one' in out and error not in out

def test_a_refused_drive_is_one_sentence_with_the_way_out(tmp_path):
    p = subprocess.run([sys.executable, '-c', door % (True, '')], cwd=tmp_path, env=env(PYTHONPATH=str(STUB)), capture_output=True, text=True)
    assert p.returncode and 'Google Drive was not mounted' in p.stderr and 'set drive to False' in p.stderr

def test_a_file_sent_by_the_browser_stays_on_drive_and_is_asked_for_once(tmp_path):
    (tmp_path/'rows.jsonl').write_text('{"prompt": "a", "completion": "b"}')
    ask = 'from ftnb.door import open_colab, recipe_of\nprint(recipe_of(open_colab(True), dict(dataset="upload", run_name="mine")).read_text())'
    more = dict(PYTHONPATH=str(STUB), STUB_DRIVE=str(tmp_path/'mydrive'), HF_HOME=str(tmp_path))
    first = run_cell(ask, tmp_path, STUB_UPLOAD=str(tmp_path/'rows.jsonl'), **more)
    assert (tmp_path/'mydrive/ftnb/uploads/mine/rows.jsonl').exists() and 'drive/MyDrive/ftnb/uploads/mine/rows.jsonl' in first
    assert run_cell(ask, tmp_path, **more).splitlines()[-3:]==first.splitlines()[-3:]

def test_a_stage_opened_alone_is_copied_when_it_ends(tmp_path):
    from ftnb.door import Door
    door = Door(tmp_path/'runs', tmp_path/'far', every=.05)
    run, back = Run(tmp_path/'runs/one', make_recipe({})).save(), []
    begin(run, 'prepare'); end(run, 'prepare')
    while len(back)<200 and 'one: prepare done' not in back:
        time.sleep(.1)
        back += Door(tmp_path/f'new{len(back)}', tmp_path/'far').said or ['not yet']
    door.close()
    assert back[-1]=='one: prepare done'

def test_a_t4_computes_in_float16_with_sdpa():
    torch = pytest.importorskip('torch')
    from ftnb.load import Device, pick_dtype, precision_args, quantisation
    t4, r = Device('cuda', 'Tesla T4', False, True), make_recipe(dict(peft='qlora'))
    assert pick_dtype(r, t4) is torch.float16 and precision_args(r, t4)==dict(bf16=False, fp16=True)
    assert quantisation(r, t4).bnb_4bit_compute_dtype is torch.float16 and r.attn_implementation=='sdpa'

# The copy

def made_run(folder, upto=3):
    "A run that trains: one stage finished, complete checkpoints, one half written"
    run = Run(folder, make_recipe({})).save()
    begin(run, 'prepare')
    run.path('data').mkdir()
    for s in ('train', 'valid'): run.path('data', f'{s}.jsonl').write_text(s*999)
    end(run, 'prepare')
    time.sleep(.02)
    begin(run, 'train')
    for n in range(1, upto+1): checkpoint(run, n)
    half = run.path('checkpoints', 'checkpoint-99')
    half.mkdir()
    (half/'optimizer.pt').write_text('half')
    run.path('checkpoints', 'inputs').write_text('same')
    return run

def checkpoint(run, n):
    c = run.path('checkpoints', f'checkpoint-{n}')
    c.mkdir(parents=True)
    for f in ('adapter.safetensors', 'optimizer.pt'): (c/f).write_text(f'{f} {n} '*99)
    (c/'trainer_state.json').write_text(json.dumps(dict(global_step=n)))

def content(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}

def check(here, was):
    "A run that came back has only whole checkpoints, and says of no stage that it is done unless its files are the same"
    got = content(here)
    cs = {k.split('/')[1] for k in got if k.startswith('checkpoints/checkpoint-')}
    for c in cs:
        for k in (k for k in was if k.startswith(f'checkpoints/{c}/')): assert got.get(k)==was[k], k
    assert 'checkpoint-99' not in cs
    state = json.loads(got.get('state.json', b'{}'))
    assert 'train' not in state
    if 'prepare' in state: assert all(got[k]==was[k] for k in was if k.startswith('data/'))
    return sorted(cs), state

def test_a_machine_that_goes_away_at_any_moment_of_copying_leaves_a_copy_that_is_true(tmp_path, monkeypatch):
    run = made_run(tmp_path/'run')
    was, real, seen, n = content(run.folder), os.replace, set(), 0
    class Gone(BaseException): pass
    while True:
        left, far = [n], tmp_path/f'far{n}'
        def dies(a, b):
            if not left[0]: raise Gone
            left[0] -= 1
            real(a, b)
        monkeypatch.setattr(os, 'replace', dies)
        try: Copy(run.folder, far).push()
        except Gone: pass
        monkeypatch.setattr(os, 'replace', real)
        back = tmp_path/f'back{n}'
        Copy(back, far).pull()
        seen.add(tuple(check(back, was)[0]) if back.exists() else None)
        if left[0]: break
        n += 1
    assert n>12 and {None, ('checkpoint-3',), ('checkpoint-2', 'checkpoint-3'), ('checkpoint-1', 'checkpoint-2', 'checkpoint-3')}==seen

def test_a_file_that_was_never_sent_on_takes_only_its_checkpoint_or_the_stages_with_it(tmp_path):
    run = made_run(tmp_path/'run')
    was, far = content(run.folder), tmp_path/'far'
    Copy(run.folder, far).push()
    for i,rel in enumerate(sorted(Copy(run.folder, far).index)):
        for how in ('gone', 'short'):
            broken = shutil.copytree(far, tmp_path/f'{how}{i}')
            (broken/rel).unlink() if how=='gone' else (broken/rel).write_bytes((broken/rel).read_bytes()[:-1])
            back = tmp_path/f'back{how}{i}'
            said = Copy(back, broken).pull()
            cs, state = check(back, was)
            if rel.startswith('checkpoints/checkpoint-'): assert rel.split('/')[1] not in cs and len(cs)==2 and 'prepare' in state and 'left out' in said
            elif rel!='events.jsonl': assert len(cs)==3 and not state and 'run again' in said

def test_what_trained_with_other_values_is_never_resumed_from_the_copy(tmp_path):
    run, far = made_run(tmp_path/'run'), tmp_path/'far'
    Copy(run.folder, far).push()
    shutil.rmtree(run.path('checkpoints'))
    run.path('checkpoints').mkdir()
    run.path('checkpoints', 'inputs').write_text('other')
    Copy(run.folder, far).push()
    assert not Copy(tmp_path/'back', far).pull().count('checkpoint') and not whole_checkpoints(tmp_path/'back')

def test_what_is_here_wins_over_the_copy_and_is_not_sent_twice(tmp_path):
    run, far = made_run(tmp_path/'run'), tmp_path/'far'
    Copy(run.folder, far).push()
    times = {k: p.stat().st_ino for k in content(far) if (p := far/k) and k!='events.jsonl'}
    run.path('data', 'valid.jsonl').unlink()
    again = Copy(run.folder, far)
    assert again.pull()=='' and again.push()==[]
    assert {k: (far/k).stat().st_ino for k in times if k!='copied.json'}=={k:v for k,v in times.items() if k!='copied.json'}

# The launcher

LAUNCHER = ROOT/'nbs/colab.ipynb'

def test_the_launcher_shows_what_a_finished_run_found_without_loading_torch(tmp_path):
    work = tmp_path/'content'
    work.mkdir()
    src = [''.join(c['source']) for c in cells(LAUNCHER) if c['cell_type']=='code']
    made = '''
from ftnb.runs import Run, begin, end, stages
from ftnb.recipe import load_recipe
run = Run(door.runs/'colab', load_recipe(recipe)).save()
for s in stages: begin(run, s); end(run, s)
run.path('adapter').mkdir(); run.path('adapter', 'a').write_text('x')
run.save_report('evaluate', dict(n=2, split='test', metrics=[], answers=[], line=''))
'''
    i = next(i for i,s in enumerate(src) if 'run_all(' in s and 'import' not in s)
    src.insert(i, made)
    src = [s.replace('drive = False', 'drive = True') for s in src]+['import sys, os; print({"torch", "transformers"} & set(sys.modules), os.environ["HF_TOKEN"])']
    nb = 'for s in %r: exec(s, ns)' % src
    out = run_cell('', work, after=nb, PYTHONPATH=str(STUB), STUB_DRIVE=str(tmp_path/'mydrive'), STUB_SECRET_HF_TOKEN='hf_mine', HF_TOKEN='', HF_HOME=str(tmp_path))
    assert out.count('unchanged, skipped')==stages.index('export')+1 and 'downloaded colab-adapter.zip' in out and out.rstrip().endswith('set() hf_mine')
    assert (tmp_path/'mydrive/ftnb/runs/colab/adapter/a').exists()

def test_the_launchers_parameters_are_the_recipes():
    from ftnb.fields import help_of, names
    from ftnb.stages import parameters_of
    got = parameters_of(LAUNCHER)
    assert set(got)<=set(names) and all(h==help_of()[k] for k,(_,_,h) in got.items())
    make_recipe({k:v for k,(_,v,_) in got.items()})

def launcher(path, last):
    "The launcher with Drive, up to a stage"
    nb = json.loads(LAUNCHER.read_text())
    for c in nb['cells']: c['source'] = ''.join(c['source']).replace('drive = False', 'drive = True').replace('run_all(door, recipe)', f'run_all(door, recipe, {last!r})')
    if last!='export': nb['cells'] = nb['cells'][:1+next(i for i,c in enumerate(nb['cells']) if 'run_all(door' in c['source'])]
    path.write_text(json.dumps(nb))
    return path

def launch(work, nb, values, python=sys.executable, **more):
    "The process of a launcher under papermill, in its folder"
    (nb.parent/'values.yaml').write_text(json.dumps(values))
    e = env(PYTHONPATH=str(STUB), STUB_DRIVE=str(nb.parent/'mydrive'), STUB_SECRETS='TimeoutException', HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', PATH=f'{Path(python).parent}:{os.environ["PATH"]}', **more)
    return subprocess.Popen([python, '-m', 'papermill', str(nb), str(nb.parent/'out.ipynb'), '-f', str(nb.parent/'values.yaml'), '--cwd', str(work), '--no-progress-bar'], env=e,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def fresh(work): shutil.rmtree(work, ignore_errors=True); work.mkdir()

def cut_off(p, far, seconds=240):
    "Kill a launcher and all it started once a checkpoint is in the copy"
    import psutil
    t = time.time()
    while time.time()-t<seconds and p.poll() is None and not any('/trainer_state.json' in k for k in Copy('none', far).index): time.sleep(.05)
    assert p.poll() is None, p.communicate()[0][-3000:]
    for q in [*psutil.Process(p.pid).children(recursive=True), p]: q.kill()
    p.wait()

def values(tmp_path, tiny): return dict(model_name_or_path=tiny, dataset=write_rows(tmp_path/'rows.jsonl', short_rows(60)), dtype='float32', use_cpu=True, valid_size=2, test_size=2, eval_strategy='no',
    max_steps=60, save_steps=5, per_device_train_batch_size=16, logging_steps=1, learning_rate=1e-3, run_name='mine', max_new_tokens=4, max_length=256)

def interrupted(tmp_path, tiny, last, python=sys.executable, **more):
    "The report of a training whose machine was lost and replaced"
    work, far, nb = tmp_path/'content', tmp_path/'mydrive/ftnb/runs/mine', launcher(tmp_path/'nb.ipynb', last)
    v = values(tmp_path, tiny)
    fresh(work)
    cut_off(launch(work, nb, v, python, **more), far)
    state = json.loads((far/'state.json').read_text())
    assert 'train' not in state and state['prepare']['status']=='done'
    fresh(work)
    p = launch(work, nb, v, python, **more)
    said = p.communicate()[0]
    assert not p.returncode, said[-3000:]
    shown = (tmp_path/'out.ipynb').read_text()
    assert 'mine: prepare, plan done; checkpoint-' in shown and '1 prepare   unchanged, skipped' in shown and '2 plan      unchanged, skipped' in shown
    return Run(work/'runs/mine'), json.loads((far/'reports/train.json').read_text())

def uninterrupted(tmp_path, recipe):
    from ftnb.prepare import prepare
    from ftnb.train import train
    run = Run(tmp_path/'whole', recipe).save()
    prepare(run)
    return train(run)

losses = lambda rep: {h['step']: h['loss'] for h in rep['logs'] if 'loss' in h}

@pytest.fixture
def one_thread():
    "Small steps wait for each other on a busy machine"
    import torch
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def test_a_training_cut_off_goes_on_from_the_copy_to_the_same_loss(made, tmp_path, one_thread):
    from transformers import TrainerCallback
    from ftnb.train import make_trainer, train
    run, whole = [made(max_steps=8, save_strategy='steps', save_steps=2, peft='lora') for _ in range(2)]
    copy = Copy(run.folder, tmp_path/'far')
    class CutOff(TrainerCallback):
        def on_save(self, args, state, control, **kwargs): copy.push()
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step==5: raise RuntimeError('gone')
    begin(run, 'prepare'); end(run, 'prepare')
    copy.push()
    begin(run, 'train')
    trainer = make_trainer(run)
    trainer.add_callback(CutOff())
    with pytest.raises(RuntimeError, match='gone'): train(run, trainer)
    shutil.rmtree(run.folder)
    assert 'prepare done; checkpoint-4' in Copy(run.folder, tmp_path/'far').pull()
    rep = train(Run(run.folder))
    assert rep['resumed_from']=='checkpoint-4' and rep['steps']==8 and losses(rep)==losses(train(whole))

@pytest.mark.soak
def test_a_launcher_on_a_new_machine_goes_on_from_drive_to_the_same_loss(tmp_path, tiny):
    run, rep = interrupted(tmp_path, tiny, 'train')
    assert rep['resumed_from'] and rep['steps']==60
    whole = uninterrupted(tmp_path, load_recipe(tmp_path/'content/mine.yaml'))
    assert losses(rep)==pytest.approx(losses(whole), rel=1e-4) and len(losses(rep))==60

# Colab's versions

def venv_of(request, pins):
    "A Python with Colab's pins, made once and kept; skipped in one line where the registry does not answer"
    text = ''.join((ROOT/'tests/colab'/p).read_text() for p in pins)
    at = Path(request.config.cache.mkdir('colab'))/hashlib.sha256((text+sys.version).encode()).hexdigest()[:12]
    python = at/'bin/python'
    if not (at/'ready').exists():
        subprocess.run([sys.executable, '-m', 'venv', '--clear', str(at)], check=True)
        try: p = subprocess.run([str(python), '-m', 'pip', 'install', '-q', '-r', str(ROOT/'tests/colab'/pins[-1])], capture_output=True, text=True, timeout=180 if len(pins)==1 else 1500)
        except subprocess.TimeoutExpired: pytest.skip('the package registry is too slow for an environment with the pins of Colab')
        if p.returncode: pytest.skip(f'no environment with the pins of Colab: {(p.stderr.strip().splitlines() or ["pip failed"])[-1]}')
        (at/'ready').touch()
    return python

def source_tree(to):
    "What a wheel is built from"
    for d in ('ftnb', 'nbs/stages', 'data'): shutil.copytree(ROOT/d, to/d, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for f in ('pyproject.toml', 'README.md', 'LICENSE'): shutil.copy(ROOT/f, to/f)
    return to

def run_cells(python, folder, *src, **more):
    "The notebook of these cells, executed by nbclient in a Python of its own"
    (folder/'cells.json').write_text(json.dumps(src))
    code = '''import json, nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
nb = new_notebook(cells=[new_code_cell(s) for s in json.load(open('cells.json'))])
NotebookClient(nb, timeout=1200, kernel_name='python3').execute()
nbformat.write(nb, 'done.ipynb')'''
    p = subprocess.run([str(python), '-c', code], cwd=folder, env=env(JUPYTER_DATA_DIR=str(folder/'jupyter'), IPYTHONDIR=str(folder/'ipython'), PATH=f'{Path(python).parent}:{os.environ["PATH"]}', **more), capture_output=True, text=True)
    assert not p.returncode, p.stderr[-3000:]
    return [c['outputs'] for c in json.loads((folder/'done.ipynb').read_text())['cells']]

def said(outputs): return ''.join(''.join(o.get('text', '')) for o in outputs)

def test_panels_work_with_the_widgets_of_colab(request, tmp_path):
    python = venv_of(request, ['pins.txt'])
    src = source_tree(tmp_path/'src')
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '--no-index', '-w', str(tmp_path), '.'], cwd=src, check=True, capture_output=True)
    subprocess.run([str(python), '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--force-reinstall', str(next(tmp_path.glob('*.whl')))], check=True, capture_output=True)
    panels = sorted(m for p in (ROOT/'nbs').glob('5[0-9]*.ipynb') for c in cells(p) for m in re.findall(r'^#\| default_exp (\w+)', ''.join(c['source']), re.M))
    out = run_cells(python, tmp_path, f'import importlib\nfor m in {panels!r}: importlib.import_module("ftnb."+m)',
        'from ftnb.form import Form\nf = Form()\nf.widget', 'f.set(lora_r=64)\nf.kids["max_length"].value = "-1"\nprint(f.value.lora_r, f.kids["lora_r"].value, list(f.problems))',
        'import ipywidgets as W\nfrom ftnb.look import Panel, row\nclass Two(Panel):\n    title = "two"\n    def static_html(self): return "<p>as text</p>"\nTwo([row(W.Text(description="a"))])',
        'from ftnb.recipe_panel import RecipePanel\np = RecipePanel()\np.form.set(lora_r=32)\np', 'import sys, IPython\nprint(W.__version__, IPython.__version__, {"torch", "transformers", "pandas", "datasets"} & set(sys.modules))')
    view, html = 'application/vnd.jupyter.widget-view+json', 'text/html'
    assert view in out[1][0]['data']
    assert said(out[2]).split()[0]=='64' and 'max_length' in said(out[2])
    for o in (out[3], out[4]): assert view in o[0]['data'] and html in o[0]['data']
    assert '<p>as text</p>' in ''.join(out[3][0]['data'][html]) and 'lora_r' in ''.join(out[4][0]['data'][html])
    assert said(out[5]).strip()=='7.7.1 7.34.0 set()'

def linked(a, b):
    "A file of the kept environment, without a copy of its bytes where the disk allows that"
    if os.path.lexists(b): return
    try: os.link(a, b)
    except OSError: shutil.copy2(a, b)

KEPT = ('torch', 'numpy', 'ipywidgets', 'ipython', 'ipykernel')
def installed(request, tmp_path, uv=True):
    "(its Python, outputs) of an environment with Colab's pins, copied, in which the install cell was run"
    base = venv_of(request, ['pins.txt', 'pins-train.txt']).parents[1]
    at = tmp_path/'venv'
    subprocess.run([sys.executable, '-m', 'venv', str(at)], check=True)
    for d in ('lib', 'share'): shutil.copytree(base/d, at/d, symlinks=True, dirs_exist_ok=True, copy_function=linked)
    if uv: shutil.copy(base/'bin/uv', at/'bin/uv')
    src = source_tree(tmp_path/'src')
    cell = INSTALL.replace(f'git+{url}@{ref_of(books[0])}', f'file://{src}').replace('/tmp/keep.txt', 'keep.txt')
    assert 'file://' in cell
    look = f'import json\nfrom importlib.metadata import version\nprint(json.dumps({{p: version(p) for p in {(*KEPT, "torchao")!r}}}))'
    out = run_cells(at/'bin/python', tmp_path, look, cell, look, 'import ftnb, peft\nfrom ftnb.train import make_trainer\nfrom ftnb.form import Form\nForm().widget', COLAB_RELEASE_TAG='t', PYTHONPATH=str(STUB),
        UV_SYSTEM_PYTHON='true', UV_CONSTRAINT='/nowhere.txt', STUB_SECRET_HF_TOKEN='hf_mine')
    return at/'bin/python', out

@pytest.mark.soak
@pytest.mark.parametrize('uv', [True, False], ids=['uv', 'pip'])
def test_the_install_cell_leaves_what_colab_has_and_the_launcher_trains_with_it(uv, request, tmp_path, tiny):
    python, out = installed(request, tmp_path, uv)
    was, now = json.loads(said(out[0])), json.loads(said(out[2]))
    assert {k: was[k] for k in KEPT}=={k: now[k] for k in KEPT} and was['ipywidgets']=='7.7.1' and was['numpy']=='2.1.3'
    assert was['torchao']=='0.10.0' and tuple(map(int, now['torchao'].split('.')[:2]))>=(0, 16)
    assert "from Colab's secrets" in said(out[1]) and 'hf_mine' not in json.dumps(out)
    if not uv: return
    (tmp_path/'launch').mkdir()
    run, rep = interrupted(tmp_path/'launch', tiny, 'export', str(python))
    assert rep['resumed_from'] and run.state['export']['status']=='done' and list((tmp_path/'launch/content').glob('mine-adapter.zip'))
    assert (tmp_path/'launch/mydrive/ftnb/runs/mine/adapter/adapter_model.safetensors').exists()
