"Run and compare panel in a real JupyterLab: a training started, watched, stopped and resumed; two runs side by side"
import json
import pytest
from inlab import axe_faults, cut, dark, narrow, photograph, read_by_everyone

CELL = '''from ftnb.panels import run_panel
from ftnb.recipe import make_recipe
p = run_panel(make_recipe(dict(run_name='sums', model_name_or_path={tiny!r}, dataset='sums.jsonl', dtype='float32', use_cpu=True, valid_size=2, test_size=2, eval_strategy='no', save_strategy='no',
    max_steps=400, per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-3, lora_r=4, max_new_tokens=8)))
p'''

@pytest.fixture(scope='module')
def page(lab, show, tiny):
    rows = [dict(prompt=f'What is {i} times {i+3}?', completion=f'It is {i*(i+3)}'+', and that is sure'*(i%3)+'.') for i in range(30)]
    (lab[1]/'sums.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    return show('run', CELL.format(tiny=tiny))

def test_a_training_is_started_watched_stopped_and_offered_again(page, lab, tmp_path):
    from playwright.sync_api import expect
    panel = page.locator('.ftnb-panel').first
    panel.get_by_label('to', exact=True).select_option('train')
    panel.get_by_role('button', name='Start', exact=True).click()
    expect(panel.get_by_text('sums was started, in process').first).to_be_visible()
    expect(panel.get_by_text('of 400').first).to_be_visible(timeout=90_000)
    expect(panel.get_by_role('img', name='loss: ').first).to_be_visible()
    photograph(page, tmp_path/'running.png')
    panel.get_by_role('button', name='Stop', exact=True).click()
    expect(panel.get_by_text('Resume goes on from checkpoint-').first).to_be_visible(timeout=30_000)
    assert list((lab[1]/'runs/sums/checkpoints').glob('checkpoint-*/trainer_state.json'))
    expect(panel.get_by_role('button', name='Resume', exact=True)).to_be_enabled()

def test_it_can_be_read_by_everyone(page, tmp_path):
    read_by_everyone(page, tmp_path)

def made_up(folder, name, lr, loss):
    "A run as its folder tells of it"
    from ftnb.base import write_json
    from ftnb.recipe import make_recipe
    from ftnb.runs import Run
    run = Run(folder/name, make_recipe(dict(dataset='sums.jsonl', learning_rate=lr))).save()
    for i in range(1, 30): run.log('log', step=i, max_steps=30, loss=loss/i)
    metrics = [dict(metric='perplexity', base=3., tuned=loss, difference=loss-3, low=-2., high=-1., n=40, better='better')]
    run.save_report('evaluate', dict(line='', metrics=metrics, answers=[dict(prompt=f'<b>q{i}</b>', reference='r', base='b', tuned=f'{name} says {i}') for i in range(5)], split='test', n=5, max_new_tokens=8, corpus={}, fields={}))
    write_json(run.path('state.json'), dict(train=dict(status='done'), evaluate=dict(status='done')))

def test_runs_stand_side_by_side(lab, show, tmp_path):
    from playwright.sync_api import expect
    for name,lr,loss in (('first', 1e-4, 1.5), ('second', 5e-4, 1.2)): made_up(lab[1]/'two/runs', name, lr, loss)
    (lab[1]/'two/settings.ini').write_text('[ftnb]\nruns = runs\n')
    page = show('compare', "import os\nos.chdir('two')\nfrom ftnb.panels import compare_panel\np = compare_panel(['first', 'second'])\np")
    panel = page.locator('.ftnb-panel').first
    expect(panel.get_by_text('learning_rate').first).to_be_visible()
    expect(panel.get_by_text('second says 0').first).to_be_visible()
    expect(panel.get_by_text('<b>q0</b>').last).to_be_visible()
    dark(page)
    photograph(page, tmp_path/'compare.png')
    assert axe_faults(page)==[]
    narrow(page)
    assert cut(page)==[] and not page.errors
