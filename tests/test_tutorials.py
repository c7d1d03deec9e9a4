"Tutorials and explanations: each runs from a clean kernel, and what is committed is what it gives"
import json, re, shutil, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import run_tutorials as tool
from ftnb.stages import parameters_of

PAGES = {tool.stem(p): p for p in tool.books()}
TUTORIALS, EXPLAIN = ([n for n,p in PAGES.items() if p.parent.name==f] for f in ('tutorials', 'explain'))
COMMITTED = list(PAGES)

def read(name): return json.loads(PAGES[name].read_text())
def text_of(nb): return '\n\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type']=='markdown')
def results(cells): return {c['id']: tool.shown(c) for c in cells if c['cell_type']=='code'}

def run(name, folder, few=True, **values):
    "The notebook as it is after a run in `folder`"
    return tool.with_outputs(PAGES[name], tool.execute(PAGES[name], {**tool.values_of(PAGES[name], few), **values}, folder))

def unclean(nb):
    "What the outputs of a committed page should not hold"
    if 'widgets' in nb['metadata']: yield 'widget state'
    for c in nb['cells']:
        for o in c.get('outputs', []):
            if o['output_type']=='error': yield f'the error {o["ename"]}'
            if o.get('name')=='stderr': yield 'an error stream'
            if o.get('execution_count') or o.get('metadata'): yield 'counts or metadata'
            if any('widget' in k for k in o.get('data', {})): yield 'a widget'
        if m := tool.PLACES.search(tool.shown(c)): yield f'the place {m[0]}'
        if len(tool.shown(c))>60_000: yield 'an output of over 60 kB'

def test_there_are_tutorials_and_explanations():
    assert {'first', 'your_data', 'will_it_fit', 'schedule', 'one_gpu', 'preferences', 'several_adapters', 'lora_or_qlora'}<=set(TUTORIALS)
    assert {'lora', 'quantisation', 'where_memory_goes', 'loss_masking'}<=set(EXPLAIN)

@pytest.mark.parametrize('name', COMMITTED)
def test_the_output_is_committed_and_clean(name):
    nb = read(name)
    cells = [c for c in nb['cells'] if c['cell_type']=='code' and not ''.join(c['source']).startswith('#| hide')]
    assert sum(bool(c['outputs']) for c in cells)>=len(cells)/3, f'run tools/run_tutorials.py {name}'
    assert not list(unclean(nb))

def test_the_check_sees_an_error_a_path_and_a_widget():
    nb = dict(metadata={}, cells=[dict(cell_type='code', outputs=[dict(output_type='error', ename='KeyError')]), dict(cell_type='code', outputs=[dict(output_type='stream', name='stdout', text=['in /home'+'/me/x'])]),
        dict(cell_type='code', outputs=[dict(output_type='display_data', metadata={}, data={'application/vnd.jupyter.widget-view+json': ''})])])
    assert list(unclean(nb))==['the error KeyError', 'the place /home/m', 'a widget']
    assert not tool.PLACES.search('0.5 tokens/s, data/tmp/x and https://x.org/home/a')

def test_a_run_that_shows_a_place_of_the_machine_is_not_written(tmp_path):
    cell = dict(cell_type='code', id='a', metadata={}, source=['1'], outputs=[])
    (tmp_path/'page.ipynb').write_text(json.dumps(dict(cells=[cell], metadata={})))
    with pytest.raises(ValueError, match='an output shows'): tool.with_outputs(tmp_path/'page.ipynb', [{**cell, 'outputs': [dict(output_type='stream', name='stdout', text='/home'+'/me/runs')]}])

def test_outputs_are_written_back_without_counts_progress_and_error_stream():
    got = tool.tidy([dict(output_type='stream', name='stderr', text='warning'), dict(output_type='stream', name='stdout', text='10 %\r50 %\rdone\n'), dict(output_type='stream', name='stdout', text=['more\n']),
        dict(output_type='execute_result', execution_count=3, metadata=dict(a=1), data={'text/plain': '1\n2', 'application/vnd.jupyter.widget-view+json': {}})])
    assert got==[dict(name='stdout', output_type='stream', text=['done\n', 'more\n']), dict(data={'text/plain': ['1\n', '2']}, execution_count=None, metadata={}, output_type='execute_result')]

@pytest.mark.parametrize('name', COMMITTED)
def test_links_between_pages_lead_somewhere(name):
    for link in re.findall(r'\]\(([^)#:]+\.ipynb)\)', text_of(read(name))): assert (PAGES[name].parent/link).exists(), link

@pytest.mark.parametrize('name', [*TUTORIALS, *EXPLAIN])
def test_nbdev_runs_the_explanations_and_leaves_the_tutorials(name):
    raw = '\n'.join(''.join(c['source']) for c in read(name)['cells'] if c['cell_type']=='raw')
    assert ('skip_exec: true' in raw)==(name in TUTORIALS)

@pytest.mark.parametrize('name', [n for n in tool.quick if tool.quick[n]])
def test_the_few_steps_of_a_test_are_parameters_of_the_page(name):
    assert set(tool.quick[name])<=set(parameters_of(PAGES[name])) # papermill would only warn, and train for minutes

# A run from top to bottom

@pytest.mark.parametrize('name', [n for n in TUTORIALS if n in ('your_data', 'will_it_fit')])
def test_what_is_committed_is_what_the_page_gives(name, tmp_path):
    now, old = results(run(name, tmp_path)['cells']), results(read(name)['cells'])
    assert now==old, f'run tools/run_tutorials.py {name}, and look at what changed'

def test_the_schedule_runs(tmp_path):
    out = '\n'.join(results(run('schedule', tmp_path)['cells']).values())
    assert "'prepare': 'unchanged'" in out and "learnig_rate" in out and all(re.search(rf'\b{c}\b', out) for c in (2, 3))
    assert (tmp_path/'runs/nightly-2/3_train.ipynb').exists()

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "(the page about one GPU after a run, its folder)"
    d = tmp_path_factory.mktemp('one-gpu')
    (d/'settings.ini').write_text('[ftnb]\nruns = runs\n')
    return run('one_gpu', d), d

def test_one_gpu_trains_evaluates_and_exports(trained):
    nb, d = trained
    assert not list(unclean(nb))
    assert (d/'runs/one-gpu/merged/model.safetensors').exists() and (d/'runs/one-gpu/adapter/adapter_model.safetensors').exists()

def test_the_first_tutorial_reads_a_finished_run(trained):
    nb, d = trained
    shutil.copytree(d/'runs/one-gpu', d/'runs/demo', ignore=shutil.ignore_patterns('*.safetensors'), dirs_exist_ok=True)
    out = run('first', d)
    assert not list(unclean(out)) and all(c['outputs'] for c in [c for c in out['cells'] if c['cell_type']=='code'][1:])

# What each page has to have shown, whatever its few steps learnt
SHOWN = dict(preferences=('pairs_agree', 'reward accuracy', 'closer than the margin', 'does not fit'), several_adapters=("Did you mean 'ties'?", 'codes kept', 'desk-tickets', 'duo was active and is deleted'), lora_or_qlora=('14 Linear4bit', 'KL to the trained model', 'does not fit'))
@pytest.mark.parametrize('name', SHOWN)
def test_a_page_about_methods_runs(name, tmp_path, tiny):
    shutil.copytree(tiny, tmp_path/'tiny')
    nb = run(name, tmp_path, model='tiny') # random weights: what it says is not looked at
    out = '\n'.join(results(nb['cells']).values())
    assert not list(unclean(nb)) and not [t for t in SHOWN[name] if t not in out]

@pytest.mark.soak
@pytest.mark.parametrize('name', [n for n in TUTORIALS if n not in ('your_data', 'will_it_fit')])
def test_with_full_settings(name):
    with tool.workspace(PAGES[name]) as d: assert not list(unclean(run(name, d, few=False)))

@pytest.mark.soak
@pytest.mark.parametrize('name', EXPLAIN)
def test_an_explanation_gives_what_is_committed(name, tmp_path):
    assert results(run(name, tmp_path)['cells'])==results(read(name)['cells']), f'run tools/run_tutorials.py {name}, and look at what changed'
