"The data panel: what it recognises, maps, proves and refuses, without a browser"
import json, os, shutil, subprocess, sys, time
from pathlib import Path
import pytest

from conftest import short_rows, write_rows
from ftnb import data_panel as module
from ftnb.data_panel import data_panel
from ftnb.first_look import first_look
from ftnb.form import Form
from ftnb.intake import take_in
from ftnb.ledger import Ledger
from ftnb.recipe import make_recipe, to_dict
from ftnb.runs import Run
from ftnb.show import Rows, RowView
from ftnb.report import html_page

SCRIPT = '<script>alert(1)</script>'
KEY = 'ghp_'+'aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1dE3fG5'

@pytest.fixture
def work(tmp_path, monkeypatch):
    "A workspace to stand in"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'settings.ini').write_text('[ftnb]\nruns = runs\n')
    return tmp_path

def everything(p):
    "All HTML that a panel holds, in its widgets and without them"
    return ''.join(w.value for w in (p.found, p.line, p.first, p.status, p.shown, p.accept_note))+p.static_html()

def harmless(p): return '<script' not in everything(p).lower() and '<img src=x' not in everything(p)

REPORT = dict(rows=26, files=[dict(file='t.jsonl', rows=26, train=24, valid=2, test=0, set_aside=0)], splits=dict(train=24, valid=2, test=0), aside=1, set_aside=[dict(file='t.jsonl', line=7, reason='no answer: it is empty')],
    lengths=dict(train=dict(n=24, max=59)), train_tokens=900, trained_tokens=90, lens={'40': 20, '59': 4}, template='abcdef0123456789', max_length=64, near_duplicates=dict(extra_rows=0), line='26 rows read',
    shapes={'t.jsonl': dict(shape='prompt_completion', confidence=1., reason='prompt reads like a question')}, gates=[dict(gate='no_leak', rows=0, verdict='ok', text='')])
STOP = dict(gate='nothing_cut', rows=16, verdict='stop', text='rows are longer than max_length: 50; set max_length: 59 to keep all')
PARTS = [('What?', 'context'), ('Yes', 'trained'), (' and more', 'cut')]

def leave(run, parts=PARTS, **more):
    "What stage 1 leaves in a run's folder"
    run.save()
    run.save_report('prepare', {**REPORT, **more})
    run.path('reports', 'proof.html').write_text(html_page('x', [Rows([RowView(parts, 'first · line 1 of t.jsonl', 3, 1)])]))
    return run

class Fake:
    "Stands for the process of stage 1: refuses unless the gate is accepted"
    calls = []
    def __init__(self, folder, accept=None): self.folder, self.accept, self.started, self.said, self.fresh = folder, accept, 0, '', True; Fake.calls.append(self)
    def wait(self):
        run = Run(self.folder)
        if self.accept: leave(run, gates=[dict(STOP, verdict='accepted')])
        else: leave(run, gates=[STOP]); self.said = 'gate nothing_cut: 16 rows'
        self.code = 0 if self.accept else 3
        return self.code

@pytest.fixture
def fake(monkeypatch):
    Fake.calls = []
    monkeypatch.setattr(module, 'Stage1', Fake)

def test_the_demo_is_recognised():
    p = data_panel('demo')
    assert [(r['file'], r['taken for'], r['sure']) for r in p.looked.table]==[('train.jsonl', 'messages', '100 %'), ('valid.jsonl', 'messages', '100 %'), ('test.jsonl', 'messages', '100 %')]
    assert 'first 200' in p.found.value and 'as it was read' in p.first.value and 'assistant' in p.first.value
    assert p.value==dict(dataset='demo', mapping=None)

@pytest.mark.parametrize('row, shape', [(dict(question='a', answer='b'), 'prompt_completion'), (dict(instruction='a', input='b', output='c'), 'alpaca'),
    (dict(conversations=[{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]), 'sharegpt'), (dict(text='a'), 'text')])
def test_shapes_are_recognised_with_the_reason(work, row, shape):
    p = data_panel(write_rows('t.jsonl', [row]*3))
    line = list(p.looked.table)[0]
    assert line['taken for']==shape and line['because'] and shape in p.text()

def test_a_mapping_corrected_changes_what_rows_become(work):
    p = data_panel(write_rows('t.jsonl', [dict(frage='Wie spät?', antwort='Zwölf.', nummer=i) for i in range(3)]))
    assert 'say which is which' in p.found.value and p.looked.files[0].shape is None and p.mapping is None
    p.columns.way.value = 'question and answer'
    p.columns.roles['prompt'].value, p.columns.roles['completion'].value = 'antwort', 'frage'
    assert [m['content'] for m in p.looked.files[0].rows[0][1]['messages']]==['Zwölf.', 'Wie spät?']
    p.columns.roles['prompt'].value, p.columns.roles['completion'].value = 'frage', 'antwort'
    assert [m['content'] for m in p.looked.files[0].rows[0][1]['messages']]==['Wie spät?', 'Zwölf.']
    assert p.yaml=='mapping: {prompt: frage, completion: antwort}' and p.yaml in p.line.value and p.yaml in p.text()
    assert p.value==dict(dataset='t.jsonl', mapping=dict(prompt='frage', completion='antwort'))
    assert make_recipe(p.value).mapping==p.mapping

@pytest.mark.parametrize('mapping', [None, dict(prompt='completion', completion='prompt')])
def test_what_the_panel_shows_is_what_stage_1_takes_the_file_for(work, mapping):
    data = write_rows('t.jsonl', [*short_rows(12), dict(prompt='', completion=''), '{"prompt": "half', dict(text='alone', prompt=None, completion=None)])
    f, rows = first_look(data, mapping).files[0], Ledger(work/'rows')
    got = take_in(make_recipe(dict(dataset=data, mapping=mapping)), rows)
    assert got.shapes[data]==f.shape and len(f.unfit)>=2
    assert [(rows.line[i], rows.reason(i)) for i in range(len(rows)) if rows.why[i]]==f.unfit
    assert [rec for _,rec in rows.records()]==[rec for _,rec,why in f.rows if not why]

def test_html_in_texts_columns_and_names_stays_text(work, fake):
    folder = work/'<img src=x onerror=1>'
    folder.mkdir()
    p = data_panel(write_rows(folder/'<script>.jsonl', [{SCRIPT: f'{SCRIPT} {i}', 'a': SCRIPT} for i in range(3)]))
    assert harmless(p)
    p.map(prompt=SCRIPT, completion='a')
    assert p.looked.files[0].rows[0][1] and harmless(p)
    p.map(**{SCRIPT: 'a'})
    assert harmless(p) and '<' not in p.columns.roles[SCRIPT].description
    p.path.value = SCRIPT
    assert 'no file here' in p.found.value and harmless(p)
    p.accept(SCRIPT, 'x')
    assert harmless(p)

def test_html_in_saved_reports_stays_text(work):
    bad = SCRIPT*3
    run = leave(Run(work/'runs'/'t', make_recipe(dict(dataset='demo'))), parts=[(SCRIPT, 'trained')], line=bad, gates=[dict(gate=bad, rows=1, verdict='stop', text=bad)], set_aside=[dict(file=bad, line=1, reason=bad)])
    p = data_panel(run=run)
    assert p.proof and harmless(p)
    page = run.path('reports', 'proof.html')
    page.write_text(page.read_text().replace('<pre', f'{SCRIPT}<pre').replace('</mark>', f'{SCRIPT}</mark>'))
    assert harmless(data_panel(run=run))

def test_a_row_of_two_megabytes_takes_little_of_the_page(work):
    p = data_panel(write_rows('t.jsonl', [dict(prompt='x'*2_000_000, completion='word <b> '*250_000, tags=['y'*1000]*1000)]*3))
    assert len(everything(p))<40_000 and len(p.text())<10_000
    assert '1,999,700 characters more' in p.first.value and p.looked.files[0].shape.name=='prompt_completion'

def test_a_proof_of_a_very_long_row_takes_little_of_the_page(work):
    run = leave(Run(work/'runs'/'t', make_recipe(dict(dataset='demo'))), parts=[('word ', 'context')]*50_000+[('yes', 'trained')]*50_000)
    p = data_panel(run=run)
    assert len(p.shown.value)<80_000 and '49,720 tokens more' in p.shown.value

def test_a_key_in_a_row_does_not_reach_the_page(work):
    p = data_panel(write_rows('t.jsonl', [dict(prompt='My token?', completion=f'It is {KEY}.')]*3))
    assert KEY not in everything(p)+p.text() and 'a GitHub token in the answer' in p.first.value

@pytest.mark.parametrize('name, content, said', [('near.jsnl', None, "Did you mean 'near.jsonl'"), ('e.jsonl', b'', 'is empty'), ('b.bin', b'\0\1', 'files of type .bin are not read'),
    ('b.jsonl', bytes(range(128, 256)), 'not UTF-8 at byte 0'), ('h.jsonl', b'{"prompt": "a", "completion": "b"}\n{"prompt": "a', 'not JSON: Unterminated string'), ('d.json', b'[{"a": 1},\n {', 'line 2: not JSON'),
    ('p.parquet', b'no', 'is not a Parquet file'), ('owner/data', None, 'no file here; if it is a data set of the hub'), ('[{path: demo, splt: x}]', None, 'unknown key'), ('', None, 'There is no dataset')])
def test_what_can_not_be_read_is_one_sentence(work, name, content, said):
    (work/'near.jsonl').write_text('')
    if content is not None: (work/name).write_bytes(content)
    p = data_panel(name)
    p.look()
    assert said in p.text() and said.replace("'", '&#x27;') in everything(p) and 'Traceback' not in p.text()

def test_a_broken_line_is_named_by_its_number(work):
    p = data_panel(write_rows('t.jsonl', [dict(prompt='a', completion='b')]*2+['{"prompt": "a']))
    assert [r['line'] for r in p.looked.unfit]==[3]

def test_a_dataset_deleted_while_it_is_open_is_said(work):
    (work/'data').mkdir()
    write_rows('data/train.jsonl', short_rows(5))
    p = data_panel('data')
    shutil.rmtree('data')
    p.map(prompt='completion', completion='prompt') # the rows are still in hand
    assert p.looked.files[0].rows[0][1]['messages'][0]['content']=='It is 0.'
    p.look()
    assert 'There is no file' in p.found.value or 'no file here' in p.found.value
    p.prove(wait=True)
    assert 'here' in p.status.value and p.run is None

def test_a_prepared_run_is_shown_and_a_deleted_one_is_said(work):
    run = leave(Run(work/'runs'/'t', make_recipe(dict(dataset='demo'))))
    p = data_panel(run='t')
    for text in ('line 7', 'no answer: it is empty', 'trained', 'context', 'cut', 'Every answer of every row', '26 rows read'): assert text.split()[-1] in p.shown.value and text.split()[-1] in p.text()
    assert 'aria-label="rows by tokens: 40' in p.shown.value and 'data:image/svg' in p.static_html() and '<svg' not in p.static_html()
    shutil.rmtree(run.folder)
    p.look()
    assert 'is gone' in p.status.value and p.shown.value=='' and p.proof is None
    assert 'There is no run' in data_panel(run='t').text()

def test_a_torn_report_is_said(work):
    run = leave(Run(work/'runs'/'t', make_recipe(dict(dataset='demo'))))
    run.path('reports', 'prepare.json').write_text('{"rows"')
    assert 'not whole' in data_panel(run=run).status.value

def test_a_refused_gate_is_shown_and_accepting_needs_a_reason(work, fake):
    p = data_panel(write_rows('t.jsonl', short_rows(26)), make_recipe(dict(max_length=50)))
    p.prove(wait=True)
    assert p.accept_box.layout.display=='' and p.gate.value=='nothing_cut' and 'nothing_cut' in p.status.value
    assert 'set max_length: 59 to keep all' in p.shown.value and 'cut' in p.shown.value
    p.reason.value = '  '
    p.accept(wait=True)
    assert 'has no reason' in p.accept_note.value and len(Fake.calls)==1 and 'accept' not in p.value
    p.reason.value = 'the long rows are noise'
    p.accept(wait=True)
    assert Fake.calls[1].accept==dict(nothing_cut='the long rows are noise') and Fake.calls[1].folder==Fake.calls[0].folder
    assert p.accept_box.layout.display=='none' and 'is done' in p.status.value and p.value['accept']==dict(nothing_cut='the long rows are noise')
    assert to_dict(Run(p.run.folder).recipe)==dict(dataset='t.jsonl', max_length=50, accept=p.accepted)

def test_a_run_with_other_values_or_with_a_training_is_left_alone(work, fake):
    other = leave(Run(work/'runs'/'t', make_recipe(dict(dataset='t.jsonl', seed=7))))
    p = data_panel(write_rows('t.jsonl', short_rows(26)))
    p.prove(wait=True)
    assert p.run.name=='t-2' and Run(other.folder).recipe.seed==7
    p.run.path('state.json').write_text(json.dumps(dict(train=dict(status='done'))))
    p.map(prompt='completion', completion='prompt')
    assert 'of another mapping' in p.status.value
    p.prove(wait=True)
    assert p.run.name=='t-3' and Run(work/'runs/t-2').recipe.mapping is None

def test_two_panels_on_one_run_do_not_prove_at_once(work, fake):
    a, b = data_panel(write_rows('t.jsonl', short_rows(26))), data_panel('t.jsonl')
    a.prove(wait=True)
    a.run.path('state.json').write_text(json.dumps(dict(prepare=dict(status='running', pid=os.getpid(), started=2e9*2))))
    b.prove(wait=True)
    assert f'already at work in process {os.getpid()}' in b.status.value and len(Fake.calls)==1

def test_a_stopped_proof_says_so_and_can_be_begun_again(work):
    p = data_panel(write_rows('t.jsonl', short_rows(26)))
    p.prove()
    assert p.prove_button.disabled and p.stop_button.layout.display==''
    time.sleep(.5)
    p.stop()
    p._thread.join(30)
    assert p.job.code==130 and 'was stopped' in p.status.value and not p.busy and not p.prove_button.disabled and p.stop_button.layout.display=='none'

def test_a_run_folder_deleted_while_it_is_proved_is_said(work, monkeypatch):
    class Gone(Fake):
        def wait(self):
            shutil.rmtree(self.folder)
            self.code, self.said = 1, 'No such file'
            return 1
    monkeypatch.setattr(module, 'Stage1', Gone)
    p = data_panel(write_rows('t.jsonl', short_rows(26)))
    p.prove(wait=True)
    assert 'was deleted' in p.status.value and p.proof is None and not p.prove_button.disabled

def test_another_dataset_takes_the_proof_of_the_last_one_away(work, fake):
    p = data_panel(write_rows('t.jsonl', short_rows(26)))
    p.prove(wait=True)
    assert p.proof
    p.path.value = write_rows('u.jsonl', short_rows(5))
    assert p.proof is None and p.shown.value=='' and p.accept_box.layout.display=='none'

def test_a_form_gives_its_recipe_at_the_time_of_proving(work, fake):
    f = Form(make_recipe(dict(max_length=50)))
    p = data_panel(write_rows('t.jsonl', short_rows(26)), f)
    f.set(max_length=60)
    p.prove(wait=True)
    assert p.run.recipe.max_length==60

REAL = '''
import json, sys
from ftnb.data_panel import data_panel
from ftnb.recipe import make_recipe
p = data_panel('t.jsonl', make_recipe(dict(max_length=50, valid_size=2, test_size=0)))
p.prove()
busy = p.busy
p._thread.join()
state = p.run.state['prepare']
print(json.dumps(dict(busy=busy, code=p.job.code, pid=state['pid'], stopped=[g['gate'] for g in p.proof.stopped], rows=[r.title for r in p.proof.rows], kinds=sorted({u.kind for r in p.proof.rows for u in r.runs}), status=p.status.value,
    quality=bool(p.proof.quality), folder=str(p.run.folder), heavy=sorted({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)), me=__import__('os').getpid(), box=p.accept_box.layout.display)))
'''
def test_proving_runs_stage_1_in_another_process_and_loads_no_torch_here(work):
    write_rows('t.jsonl', short_rows(26))
    q = subprocess.run([sys.executable, '-c', REAL], capture_output=True, text=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert q.returncode==0, q.stderr
    r = json.loads(q.stdout.splitlines()[-1])
    assert r['busy'] and r['code']==3 and r['pid']!=r['me'] and not r['heavy']
    assert r['stopped']==['nothing_cut'] and r['box']=='' and r['kinds']==['context', 'cut', 'trained'] and r['quality']
    assert any('over max_length' in t for t in r['rows']) and Path(r['folder'])==(work/'runs/t') and (work/'runs/t/1_prepare.ipynb').exists()
