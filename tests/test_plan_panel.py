"The plan panel as a user meets it, without a browser: what moves, what is offered, and what is said of broken things"
import asyncio, json, re, subprocess, sys
import pytest
import ipywidgets as W

from ftnb.base import UserError
from ftnb.devices import devices
from ftnb.fit import fits
from ftnb.fit_map import cell_step, fit_map, remembered
from ftnb.form import Form
from ftnb.plan import plan
from ftnb.plan_panel import pages, plan_panel
from ftnb.recipe import make_recipe
from ftnb.runs import Run

def recipe(**kw): return make_recipe(dict(dict(model_name_or_path='llama-3.1-8b', max_length=2048, per_device_train_batch_size=1), **kw))
def shown(p): return ''.join(w.value for w in (p.said, p.picture, p.notes, p.rows_note))
def widgets(w):
    yield w
    for k in getattr(w, 'children', ()): yield from widgets(k)

def test_what_is_shown_is_the_plan_and_moves_with_form_gpu_and_rows():
    p = plan_panel(recipe(peft='qlora'), 'T4', 1000)
    seen = []
    p.observe(lambda c: seen.append(c['new']), names='value')
    needs = [p.value.report['memory']['need'][1]]
    for change in (dict(max_length=4096), dict(per_device_train_batch_size=4), dict(peft='lora'), dict(gpu='A100 80GB'), dict(rows='20,000')):
        p.set(**change)
        want = plan(p.form.value, p.gpu, p.rows, search=False).report
        assert p.value is seen[-1] and p.value.report==want, change
        assert p.value.line in (None, want['line']) and all(x in shown(p) for x in (want['device'], want['verdict'], f'{want["steps"]:,} steps'))
        needs.append(want['memory']['need'][1])
    assert needs[0]<needs[1]<needs[2]<needs[3]==needs[4]==needs[5] and len(seen)==5

def test_a_key_typed_in_the_browser_is_enough():
    p = plan_panel(recipe(peft='qlora'), 'T4', 1000)
    before = p.picture.value
    p.form.kids['max_length'].set_state(dict(value='512'))
    assert p.value.recipe.max_length==512 and p.picture.value!=before
    p.form.kids['max_length'].set_state(dict(value='512x'))
    assert p.value.recipe.max_length==512 and 'not a whole number' in p.form.infos['max_length'].value

def test_the_list_has_this_machine_and_every_device():
    p = plan_panel(recipe())
    assert [v for _,v in p.gpu_list.options]==['', *(d.name for d in devices())] and p.gpu is None
    for _,v in p.gpu_list.options:
        p.gpu_list.value = v
        assert p.value and p.value.report['memory'], v
    with pytest.raises(UserError, match="Did you mean 'T4'"): plan_panel(recipe(), 'T44')
    assert plan_panel(recipe(), '24GB').value.device.sold_gb==24

def test_three_numbers_on_a_gpu_and_resident_memory_on_a_cpu():
    p = plan_panel(recipe(peft='qlora'), 'T4', 10)
    assert all(f'<td style="text-align:left">{k}</td>' in p.picture.value for k in ('allocated', 'reserved', 'device')) and 'Peak in: ' in p.picture.value
    p.set(gpu='CPU')
    assert '>resident<' in p.picture.value and '>reserved<' not in p.picture.value
    m = p.value.report['memory']
    assert m['need']==m['resident'] and m['resident'][0]>m['peak']

@pytest.mark.parametrize('kw, gpu', [(dict(peft='lora', per_device_train_batch_size=8), 'RTX 3090'), (dict(peft='lora', packing=True, per_device_train_batch_size=8), 'RTX 4090'),
    (dict(peft='full', model_name_or_path='smollm2-135m', per_device_train_batch_size=64, activation_checkpointing=False), 'T4'), (dict(peft='full'), 'A100 40GB')])
def test_every_offer_that_is_taken_makes_it_fit(kw, gpu):
    r = recipe(**kw)
    p = plan_panel(r, gpu, 1000)
    assert p.value.report['verdict']!='fits' and p.offers
    p.pages.selected_index = 0
    for i,(settings,_) in enumerate(p.offers):
        [b for b in widgets(p.pages) if isinstance(b, W.Button)][i].click()
        assert p.value.report['verdict']=='fits', settings
        got = p.form.value
        assert got.per_device_train_batch_size*got.gradient_accumulation_steps==r.per_device_train_batch_size*r.gradient_accumulation_steps, settings
        p.form.undo()
        assert p.form.value==r

@pytest.mark.parametrize('packing', [False, True])
def test_the_most_that_is_offered_fits_and_one_more_does_not(packing):
    for i,name in enumerate(('max_length', 'per_device_train_batch_size')):
        p = plan_panel(recipe(peft='qlora', packing=packing, max_length=512, per_device_train_batch_size=2), 'T4', 1000)
        p.take(i)
        assert p.value.report['verdict']=='fits'
        p.set(**{name: getattr(p.form.value, name)+1})
        assert p.value.report['verdict']!='fits', name

@pytest.mark.parametrize('kw, gpu', [(dict(peft='qlora', per_device_train_batch_size=3), 'T4'), (dict(packing=True, max_length=300), 'RTX 4090'), (dict(model_name_or_path='smollm2-135m', peft='full'), 'T4')])
def test_the_map_is_what_each_cell_would_say_by_itself(kw, gpu):
    p = plan(recipe(**kw), gpu, rows=9, search=False)
    m, how = fit_map(p), remembered()
    assert {c: fits(cell_step(p.step, *c), p.device, how).verdict for c in m.cells}==m.cells
    assert m.now in m.cells and m.cells[m.now]==p.report['verdict'] and len(set(m.cells.values()))>1
    b, n = m.now
    assert plan(recipe(**{**kw, 'per_device_train_batch_size': 4, 'max_length': 1024}), gpu, rows=9, search=False).report['verdict']==m.cells[4, 1024]

@pytest.mark.parametrize('gpu', ['T4', 'CPU'])
def test_more_rows_or_tokens_never_fit_better(gpu):
    order = ['fits', 'tight', 'does not fit']
    m = plan_panel(recipe(model_name_or_path='smollm2-135m'), gpu, 9).map
    for (b,n),v in m.cells.items():
        for c in m.cells: assert c[0]<b or c[1]<n or order.index(m.cells[c])>=order.index(v)

def test_the_map_tells_by_words_too_and_marks_where_one_is():
    html = plan_panel(recipe(peft='lora', per_device_train_batch_size=8), 'RTX 3090', 9).page('Batch and length')
    assert html.count('aria-current="true"')==1 and '>no, now</td>' in html and html.count('scope="row"')==6
    assert all(re.search('>(fits|tight|no)(, now)?</td>', td) for td in re.findall('<td.*?</td>', html))

def test_no_page_is_counted_before_it_is_opened():
    p = plan_panel(recipe(peft='full'), 'RTX 4090', 100)
    p.set(max_length=1024)
    assert 'changes' not in p.value.report and not p.pages.children[0].children[0].value
    p.pages.selected_index = 0
    assert p.value.report['changes'] and len(p.pages.children[0].children[1].children)==len(p.offers)
    p.set(gpu='T4')
    assert 'changes' in p.value.report and len(p.pages.children[0].children[1].children)==len(p.offers)

def test_while_one_types_an_open_page_waits_and_is_counted_once():
    p = plan_panel(recipe(peft='full'), 'RTX 4090', 100)
    p.pages.selected_index = 0
    plans = []
    async def typing():
        for n in (1, 10, 102, 1024):
            p.set(max_length=n)
            plans.append(p.value)
        at_once = p.said.value, p.pages.children[0].children[0].value
        await asyncio.sleep(.4)
        return at_once
    verdict, page = asyncio.run(typing())
    assert 'does not fit' in verdict and 'Counting' in page
    assert ['changes' in x.report for x in plans]==[False]*3+[True]
    assert len(p.pages.children[0].children[1].children)==len(p.offers)

BROKEN = {'no folder': ('nobody', 'There is no model nobody'), 'empty': ('', 'empty'), 'no JSON': ('{', 'config.json'), 'a list': ('[1]', 'holds a list'), 'nothing in it': ('{}', 'model_type'), 'unknown': ('{"model_type": "banana"}', 'banana'),
    'half': ('{"model_type": "llama"}', 'vocab_size|hidden_size|num_'), 'words for numbers': ('{"model_type": "llama", "hidden_size": "<b>many</b>"}', ''), 'no hub id': ('a b/c<b>', 'model_name_or_path'), 'a byte that no name has': ('a\0b', '')}
@pytest.mark.parametrize('case', BROKEN)
def test_a_model_that_cannot_be_read_is_a_sentence(case, tmp_path):
    text, words = BROKEN[case]
    p = plan_panel(recipe(), 'T4', 100)
    if text.startswith(('{', '[')): (tmp_path/'config.json').write_text(text)
    p.set(model_name_or_path=str(tmp_path) if text.startswith(('{', '[')) else text)
    every = shown(p)+p.static_html()
    assert not p.value or not p.value.report['memory']
    assert re.search(words, every) and '<b>' not in every and p.text()
    for i in range(len(pages)): p.pages.selected_index = i
    p.set(model_name_or_path='llama-3.1-8b')
    assert 'does not fit' in p.said.value

def test_a_config_that_passes_and_then_breaks_is_a_sentence(tmp_path):
    good = json.loads(json.dumps(plan(recipe(), 'T4', search=False).step.config))
    (tmp_path/'config.json').write_text(json.dumps({**good, 'rope_parameters': 5, 'attention_dropout': 'much'}))
    p = plan_panel(recipe(), 'T4', 100)
    p.set(model_name_or_path=str(tmp_path))
    assert p.value is None and 'is broken' in p.said.value and 'no plan' in p.text() and 'no plan' in p.static_html()
    p.form.undo()
    assert p.value

@pytest.mark.parametrize('text', ['-5', '0', 'many', '1.5', '1e3', '9'*400, '<b>'])
def test_rows_that_are_none_are_a_sentence_and_the_last_number_counts(text):
    p = plan_panel(recipe(), 'T4', 100)
    p.rows_text.value = text
    assert 'is not a whole number from 1 up' in p.rows_note.value and '<b>' not in p.rows_note.value and p.value.report['rows']==p.rows==100
    p.rows_text.value = '50'
    assert not p.rows_note.value and p.value.report['rows']==50

def test_without_rows_it_says_so():
    p = plan_panel(recipe(), 'T4')
    assert 'how many rows there are is not known' in p.notes.value and not p.value.report['steps'] and '<svg' not in p.page('Steps, time and price', static=False)
    p.rows_text.value = '100'
    assert 'how many rows' not in p.notes.value and '<svg' in p.page('Steps, time and price', static=False)
    p.rows_text.value = ' '
    assert 'how many rows' in p.notes.value

def counted_run(folder, **more):
    run = Run(folder, recipe(model_name_or_path='smollm2-135m')).save()
    prep = dict(lengths=dict(train=dict(n=400), valid=dict(n=40, max=220)), lens={'180': 200, '230': 200}, train_tokens=82000, trained_tokens=16400)
    run.save_report('prepare', {**prep, **more})
    return run

def test_rows_that_stage_1_counted_count_for_other_recipes_too(tmp_path):
    run = counted_run(tmp_path/'run')
    p = plan_panel(run=run, gpu='T4', rows=7)
    assert p.value.report==plan(run, 'T4', search=False).report and p.value.report['rows']==400 and p.value.step.length==230
    assert p.rows_text.disabled and '400 counted by stage 1 of run' in p.rows_note.value
    p.set(max_length=200)
    assert p.value.step.length==200 and not p.remark
    p.set(model_name_or_path='llama-3.1-8b')
    assert 'counted with another model_name_or_path' in p.notes.value

@pytest.mark.parametrize('harm', ['gone', 'no JSON', 'empty', 'torn'])
def test_a_run_that_is_harmed_under_the_panel_leaves_a_plan_or_a_sentence(harm, tmp_path):
    run = counted_run(tmp_path/'<b>run')
    p = plan_panel(run=run, gpu='T4', rows=7)
    file = run.path('reports', 'prepare.json')
    if harm=='gone': import shutil; shutil.rmtree(run.folder)
    else: file.write_text({'no JSON': '{"lens"', 'empty': '{}', 'torn': '{"lens": {"x": 1}, "lengths": {"train": {"n": 4}}}'}[harm])
    p.set(max_length=1024)
    every = shown(p)+p.static_html()
    if harm=='torn': assert p.value is None and 'report of stage 1' in p.said.value
    else: assert p.value.report['rows']==7 and 'the rows above count' in p.notes.value and not p.rows_text.disabled
    assert '<b>' not in every

def test_typing_a_hub_id_asks_nobody_and_a_button_does(monkeypatch):
    import ftnb.at_hand
    asked = []
    def config(name, revision=None):
        asked.append(name)
        if 'none' in name: raise UserError(f'There is no model {name} on the hub.')
        return plan(recipe(), 'T4', search=False).step.config
    monkeypatch.setattr(ftnb.at_hand, 'config_of', config)
    p = plan_panel(recipe(), 'T4', 100)
    for n in ('o', 'ow/n', 'owner/none', 'owner/name'): p.set(model_name_or_path=n)
    assert not asked and 'Fetch config' in p.said.value and p.fetch_button.layout.display==''
    p.fetch_button.click()
    assert asked==['owner/name'] and p.value.report['memory'] and p.fetch_button.layout.display=='none'
    p.set(max_length=64)
    assert asked==['owner/name']
    p.set(model_name_or_path='owner/none')
    p.fetch_button.click()
    assert 'There is no model owner/none' in p.said.value

def test_two_panels_on_one_form_move_together():
    f = Form(recipe())
    a, b = plan_panel(f, 'T4', 10), plan_panel(f, 'B200', 10)
    f.set(max_length=777)
    assert a.value.recipe.max_length==b.value.recipe.max_length==777 and (a.value.device.name, b.value.device.name)==('T4', 'B200')
    own = plan_panel()
    assert f.top not in a.children and own.form.top in own.children and own.children.index(own.form.more)>own.children.index(own.pages)

def test_the_twin_has_all_of_it_and_escapes_a_name(tmp_path):
    folder = tmp_path/'<img src=x onerror=alert(1)>'
    folder.mkdir()
    (folder/'config.json').write_text(json.dumps(plan(recipe(), 'T4', search=False).step.config))
    p = plan_panel(recipe(model_name_or_path=str(folder), peft='full'), 'RTX 4090', 100)
    bundle = p._bundle()
    html = bundle['text/html']
    assert '<img src=x' not in html and '&lt;img src=x' in html and '<script' not in html
    for x in ('does not fit', 'role="img"', 'Peak in: ', 'Every stage', 'optimizer steps', '<img alt="learning rate', 'What would make it fit', 'Which batches fit', 'What offloading would move', 'zero2'): assert x in html, x
    assert all(x in bundle['text/plain'] for x in ('does not fit', 'Every stage', 'What would fit', 'Which batches fit'))

def test_all_that_is_drawn_has_a_label():
    p = plan_panel(recipe(peft='full'), 'RTX 4090', 100)
    html = p.static_html()
    for i in range(len(pages)): p.pages.selected_index = i
    html += ''.join(w.value for w in widgets(p) if isinstance(w, W.HTML))
    assert html.count('<table')==html.count('<caption')>8
    assert all(re.search('aria-label="[^"]{10,}"', t) for t in re.findall('<svg[^>]*>|<div role="img"[^>]*>', html)) and all('alt="learning' in t for t in re.findall('<img[^>]*>', html))
    assert re.findall('role="status" aria-live="polite">([^<]*)', p.said.value)[0].startswith('does not fit: needs ')
    for w in widgets(p):
        if isinstance(w, (W.Text, W.Dropdown, W.Checkbox, W.Button)): assert w.description, w
        if isinstance(w, W.Button) and w.description=='take': assert w.tooltip.startswith('Set ')
    titles = [p.pages._titles[str(i)] for i in range(len(pages))] if hasattr(p.pages, '_titles') else [*p.pages.titles]
    assert titles==list(pages)

def test_a_long_run_keeps_the_shape_of_its_learning_rate():
    ps = plan(recipe(), 'T4', rows=300_000, search=False).report['learning_rate']
    assert len(ps)>150 and ps[0][1]<max(v for _,v in ps)>ps[-1][1] and ps[0][0]==0 and ps[-1][0]==899_999

def test_with_every_page_open_there_is_no_torch(tmp_path):
    code = f'''import sys
from ftnb.plan_panel import pages, plan_panel
p = plan_panel(None, 'T4', 100)
for i in range(len(pages)): p.pages.selected_index = i
p.set(peft='full', model_name_or_path='llama-3.1-8b'); p.set(model_name_or_path='some/one')
p._bundle()
bad = set(sys.modules) & {{'torch', 'transformers', 'datasets', 'pandas', 'numpy', 'matplotlib'}}
assert not bad, bad'''
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode==0, r.stderr
