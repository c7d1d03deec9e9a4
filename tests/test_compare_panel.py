"The compare panel: what differs, what was measured, and the answers of each run to the same row"
import shutil, subprocess, sys
import pytest

pytest.importorskip('ipywidgets')
from ftnb.compare_panel import between, compare_panel, join_answers
from ftnb.fields import Recipe
from ftnb.runs import Run

def metric(tuned, n): return dict(metric='field_accuracy', base=.04, tuned=tuned, difference=tuned-.04, low=tuned-.1, high=tuned+.02, n=n, better='better')
def evaluated(run, answers, tuned=.9):
    run.save_report('evaluate', dict(split='test', n=len(answers), metrics=[metric(tuned, len(answers))], answers=[dict(prompt=p, reference=r, base=b, tuned=t) for p,r,b,t in answers]))
    return run

def made(work, name, losses=(3, 2, 1), **values):
    run = Run(work/'runs'/name, Recipe(**values)).save()
    for i,l in enumerate(losses, 1): run.log('log', step=i, max_steps=len(losses), loss=l)
    if losses: run.log('eval', step=len(losses), eval_loss=losses[-1]+.5)
    return run

@pytest.fixture
def work(tmp_path):
    (tmp_path/'settings.ini').write_text('[ftnb]\nruns = runs\n')
    return tmp_path

def values(p): return [w.value for w in p.shown.values()]

def test_three_runs_stand_side_by_side_and_only_what_differs_is_shown(work):
    for i,(n,r) in enumerate((('a', 8), ('b', 16), ('c', 16))): evaluated(made(work, n, lora_r=r), [(f'q{k}', '{"x": 1}', 'no', '{"x": 1}' if k%(i+2) else '{}') for k in range(30)], .5+i/10)
    p = compare_panel(['a', 'b', 'c'], work)
    assert p.differences['recipe'].rows==[dict(field='lora_r', a=8, b=16, c=16)] and not len(p.differences['versions'])
    assert set(p.series)=={f'{n} {k}' for n in 'abc' for k in ('training', 'validation')} and all(f'{n} training' in p.shown['curves'].value for n in 'abc')
    assert p.metrics.rows==[dict(metric='fields right', **{n: f'4.0 % → {50+10*i:.1f} % ({40+10*i:+.1f} to {52+10*i:+.1f}, 30 rows) better' for i,n in enumerate('abc')})]
    assert [t.cols[1:3] for t in p.against]==[['a', 'b'], ['a', 'c']] and p.against[0].rows[0]['rows']==30
    assert all(v in p.static_html() for v in values(p))

def test_what_a_run_does_not_have_is_said(work):
    evaluated(made(work, 'a'), [('q', '4', 'no', '4')])
    made(work, 'b', losses=())
    p = compare_panel(['a', 'b'], work)
    assert 'b: not evaluated' in p.text() and 'b: not evaluated' in p.static_html() and 'not evaluated' in p.metrics.rows[0]['b']
    assert 'no answer to this row' in p.shown['answers'].value and 'a training' in p.shown['curves'].value and not len(p.against[0])
    q = compare_panel(['b'], work)
    assert 'Choose two or more' in q.text() and 'none of them has trained yet' in q.static_html() and 'none of these runs was evaluated' in q.static_html()

def test_answers_meet_by_their_row_not_by_their_place(work):
    evaluated(made(work, 'a'), [('q1', '1', 'x', 'a1'), ('q2', '2', 'x', 'a2'), ('q2', '2', 'x', 'a2 again')])
    evaluated(made(work, 'b'), [('q2', '2', 'y', '2'), ('q3', '3', 'y', 'b3')])
    p = compare_panel(['a', 'b'], work)
    assert [(o['prompt'], o['tuned']) for o in p.rows]==[('q1', dict(a='a1')), ('q2', dict(a='a2', b='2')), ('q2', dict(a='a2 again')), ('q3', dict(b='b3'))]
    p.row.value = 1
    shown = p.shown['answers'].value
    assert p.answer()['tuned']==dict(a='a2', b='2') and 'base of a' in shown and 'base of b' in shown and shown.count('as expected')==1

def test_finding_a_row_and_those_that_differ(work):
    evaluated(made(work, 'a'), [(f'question {i}', str(i), 'x', 'same') for i in range(400)])
    evaluated(made(work, 'b'), [(f'question {i}', str(i), 'x', 'Other' if i==77 else 'same') for i in range(400)])
    p = compare_panel(['a', 'b'], work)
    assert len(p.found)==400 and len(p.row.options)==300 and '400 of 400 rows, the first 300 in the list' in p.shown['answers'].value
    p.find.value = 'OTHER'
    assert p.found==[77] and p.answer()['prompt']=='question 77' and 'question 77' in p.shown['answers'].value
    p.find.value = ''
    p.differ.value = True
    assert p.found==[77]
    p.find.value = 'nowhere'
    assert p.found==[] and p.answer()=={} and 'no row matches' in p.shown['answers'].value

def test_the_better_of_two_runs_is_told_only_where_the_rows_show_it():
    def rows(right): return join_answers({n: dict(answers=[dict(prompt=str(i), reference='{"x": 1, "y": 2}', base='', tuned='{"x": 1, "y": 2}' if i in ok else '{"x": 1, "y": 3}') for i in range(40)]) for n,ok in right.items()})
    def verdicts(t): return {r['metric']: r['verdict'] for r in t}
    assert verdicts(between(rows(dict(a=set(), b=set(range(30)))), 'a', 'b'))['field accuracy']=='better'
    assert verdicts(between(rows(dict(a=set(range(30)), b=set())), 'a', 'b'))['field accuracy']=='worse'
    assert verdicts(between(rows(dict(a={1}, b={2})), 'a', 'b'))['field accuracy']=='unclear'

def test_markup_and_long_answers_stay_text(work):
    bad = '<script>alert(1)</script>'
    for n in ('a', bad.replace('/', '')): evaluated(made(work, n, system_prompt=bad if n=='a' else None), [(bad, bad, bad, bad), ('long', 'x', bad, 'y'*2_000_000)])
    p = compare_panel(start=work)
    p.row.value = 1
    assert len(p.runs)==2 and '(2,000,000 characters)' in p.static_html() and len(p.static_html())<40_000
    p.row.value = 0
    assert '<script' not in p.static_html() and not any('<script' in v for v in values(p)) and '&lt;script&gt;alert' in p.shown['answers'].value and '&lt;script' in p.shown['curves'].value

@pytest.mark.parametrize('name, text', [('reports/evaluate.json', '{'), ('reports/evaluate.json', '[1]'), ('reports/evaluate.json', '{"metrics": [{}]}'), ('reports/evaluate.json', '{"metrics": [], "n": 1, "split": "t", "answers": [1]}'), ('manifest.json', 'x'),
    ('recipe.yaml', 'nonsense: 1\n'), ('events.jsonl', '{"event": "log"}\nx\n')])
def test_a_broken_file_spoils_neither_the_panel_nor_the_other_run(work, name, text):
    for n in ('a', 'b'): evaluated(made(work, n), [('q', '4', 'no', n)])
    (work/'runs/b'/name).write_text(text)
    p = compare_panel([work/'runs/a', work/'runs/b'], work)
    assert 'a training' in p.shown['curves'].value and p.answer()['tuned']['a']=='a' and 'Traceback' not in p.text()
    assert p.notes or name=='events.jsonl'

def test_a_deleted_run_and_an_empty_workspace_are_sentences(work):
    assert 'There are no runs in' in compare_panel(start=work).text()
    for n in ('a', 'b'): made(work, n)
    p = compare_panel(start=work)
    assert len(p.runs)==2
    shutil.rmtree(work/'runs/b')
    p.refresh()
    assert 'The folder of b is gone' in p.shown['said'].value and p.names==['a'] and not (work/'runs/b').exists()
    assert "There is no run 'nothing'" in compare_panel(['a', 'nothing'], work).text()

def test_runs_of_one_name_in_two_places_are_told_apart(work):
    made(work, 'a', lora_r=8)
    other = Run(work/'elsewhere/a', Recipe()).save()
    p = compare_panel(['a', other], work)
    row = p.differences['recipe'].rows[0]
    assert len(p.runs)==2 and len(row)==3 and row[str(other.folder)]==16 and len(dict(p.which.options))==2

def test_comparing_loads_no_heavy_library(work):
    for n in ('a', 'b'): evaluated(made(work, n), [('q', '{"x": 1}', 'no', '{"x": 1}')])
    code = f'import sys; from ftnb.compare_panel import compare_panel; p = compare_panel(start={str(work)!r}); assert len(p.runs)==2 and len(p.against[0]); print(sorted(set(sys.modules) & {{"torch", "transformers", "datasets", "pandas"}}))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()=='[]'
