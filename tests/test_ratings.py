"Ratings and choices become DPO and KTO rows; nothing is lost on the way, and who rates does not know whose answer it is"
import json, random, subprocess, sys
import pytest
from conftest import write_rows

pytest.importorskip('ipywidgets')
from ftnb.base import UserError
from ftnb.candidates import blind, candidates, candidates_from_rows, candidates_from_run, candidates_from_runs, preferred, wilson
from ftnb.fields import Recipe
from ftnb.ratings import add_choice, choices, pairs_from_choices, pairs_from_ratings, read_choices
from ftnb.rating_panel import rating_panel
from ftnb.records import normalise, recognise
from ftnb.runs import Run
from ftnb.sources import find_sources, read_rows

def said(ms): return ms[-1]['content']
def pairs(p): return [(said(r['prompt']), said(r['chosen']), said(r['rejected'])) for r in p.dpo]
def labels(p): return {(said(r['prompt']), said(r['completion'])): r['label'] for r in p.kto}
def rows(n, **more): return [dict(prompt=f'q{i}', base=f'base {i}', tuned=f'tuned {i}', **more) for i in range(n)]

# ---- ratings

def test_every_rated_row_is_accounted_for_whatever_is_in_it():
    rnd = random.Random(0)
    for how in ('best_worst', 'all'):
        for margin in (0, 1.5):
            ins = [dict(prompt=rnd.choice(['q1', 'q2', 'q3', '', [dict(role='user', content='q4')]]), answer=rnd.choice(['x', 'y', 'z', '', None]), score=rnd.choice([1, 2, 3, '4', True, 'good', '', float('nan'), 'odd'])) for _ in range(120)]+['no row']
            p = pairs_from_ratings(ins, how=how, margin=margin)
            assert sum(p.came.values())==121 and p.came['faulty']==len(p.faults)>0
            every = p.came['paired']+p.came['unpaired']+p.came['alone']
            assert len(p.kto)+p.left['at the threshold']==every
            if how=='all': assert len(p.dpo)+p.left.get('ties', 0)+p.left.get('closer than the margin', 0)==4*3 # four questions with three answers each

def test_the_best_meets_the_worst_or_every_answer_every_other():
    ins = [dict(prompt='q', answer=a, rating=r) for a,r in (('mid', 3), ('best', 5), ('worst', 1))]
    assert pairs(pairs_from_ratings(ins))==[('q', 'best', 'worst')] and pairs_from_ratings(ins).came['unpaired']==1
    assert set(pairs(pairs_from_ratings(ins, how='all')))=={('q', 'best', 'worst'), ('q', 'best', 'mid'), ('q', 'mid', 'worst')}
    p = pairs_from_ratings(ins, how='all', margin=3)
    assert pairs(p)==[('q', 'best', 'worst')] and p.left['closer than the margin']==2

def test_a_tie_is_no_pair_and_the_middle_neither_wanted_nor_not():
    p = pairs_from_ratings([dict(prompt='q', answer='x', rating=3), dict(prompt='q', answer='y', rating=3), dict(prompt='r', answer='z', rating=5), dict(prompt='r', answer='w', rating=1)])
    assert p.left==dict({'ties': 1, 'at the threshold': 2}) and labels(p)=={('r', 'z'): True, ('r', 'w'): False} and len(p.dpo)==1
    assert labels(pairs_from_ratings([dict(prompt='q', answer='x', rating=3), dict(prompt='q', answer='y', rating=4)], threshold=2))=={('q', 'x'): True, ('q', 'y'): True}

def test_two_raters_of_one_answer_count_as_one_with_their_mean():
    p = pairs_from_ratings([dict(prompt='q', answer='x', rating=5), dict(prompt='q', answer='x', rating=1), dict(prompt='q', answer='y', rating=4)])
    assert pairs(p)==[('q', 'y', 'x')] and p.came['repeated']==1

@pytest.mark.parametrize('ratings, words', [((True, False), None), (('good', 'Bad'), None), (('5', '2.5'), None), (('fine', 'poor'), dict(poor=0, fine=9))])
def test_thumbs_words_and_numbers_in_text_are_ratings(ratings, words):
    p = pairs_from_ratings([dict(prompt='q', answer=a, thumbs=r) for a,r in zip('xy', ratings)], words=words)
    assert pairs(p)==[('q', 'x', 'y')] and labels(p)=={('q', 'x'): True, ('q', 'y'): False}

def test_rows_of_every_known_form_can_be_rated(tmp_path):
    forms = [lambda a: dict(instruction='Add.', input='2+2', output=a), lambda a: dict(messages=[dict(role='system', content='s'), dict(role='user', content='2+2'), dict(role='assistant', content=a)]), lambda a: dict(question='2+2', response=a)]
    for i,f in enumerate(forms): assert len(pairs_from_ratings(write_rows(tmp_path/f'{i}.jsonl', [dict(f('4'), score=1), dict(f('5'), score=0)])).dpo)==1
    assert pairs_from_ratings([dict(q='2+2', a='4', n=1), dict(q='2+2', a='5', n=0)], 'n', dict(prompt='q', completion='a')).dpo

@pytest.mark.parametrize('ins, more, text', [([dict(prompt='q', answer='x', n=1)], {}, "name it, such as rating='prompt'"), ([dict(prompt='q', answer='x', score=1)], dict(rating='scroe'), "Did you mean 'score'?"), ([dict(prompt='q', answer='x', score=1)], dict(how='al'), "Did you mean 'all'?"),
    ([dict(prompt='q', answer='x', score='odd')], {}, 'No row can be used: row 1'), ([dict(prompt='q', answer='x', score=1)], dict(margin=-1), 'margin=-1'), ([dict(q='q', a='x', score=1)], {}, 'no question with an answer'), ([], {}, 'There are no rows'), ([3], {}, 'row 1: not a row but int')])
def test_a_mistake_is_one_sentence(ins, more, text):
    with pytest.raises(UserError, match=text.replace('?', r'\?')): pairs_from_ratings(ins, **more)

# ---- choices

def test_every_choice_is_accounted_for_and_makes_what_it_says():
    ins = [dict(prompt=f'q{i}', a='x', b='y', choice=c) for i,c in enumerate(('a', 'b', 'both', 'neither', 'skip', 'B', 'left', None))]+[dict(prompt='q', a='x', b='x', choice='a'), dict(prompt='', a='x', b='y', choice='a'), dict(prompt='q', a='x', choice='a'), 7]
    p = pairs_from_choices(ins)
    assert p.came==dict(paired=3, both=1, neither=1, skip=1, faulty=6) and sum(p.came.values())==len(ins)
    assert pairs(p)==[('q0', 'x', 'y'), ('q1', 'y', 'x'), ('q5', 'y', 'x')]
    assert labels(p)=={('q0', 'x'): True, ('q0', 'y'): False, ('q1', 'x'): False, ('q1', 'y'): True, ('q2', 'x'): True, ('q2', 'y'): True, ('q3', 'x'): False, ('q3', 'y'): False, ('q5', 'x'): False, ('q5', 'y'): True}
    assert len(pairs_from_choices(ins, unpair=False).kto)==4 and any('the answers are the same' in w for _,w in p.faults)

def test_an_answer_that_won_and_lost_is_neither_wanted_nor_not():
    p = pairs_from_choices([dict(prompt='q', a='x', b='y', choice='a'), dict(prompt='q', a='y', b='z', choice='a')])
    assert labels(p)=={('q', 'x'): True, ('q', 'z'): False} and p.left['wanted here and not there']==1 and len(p.dpo)==2

def test_both_files_are_read_back_without_a_change(tmp_path):
    tool = [dict(type='function', function=dict(name='add', parameters=dict(type='object', properties={})))]
    talk = [dict(role='system', content='s'), dict(role='user', content='ü"\n<b>'), dict(role='assistant', content='a'), dict(role='user', content='2+2')]
    ins = [dict(prompt=talk, a='4', b='5\u2028', choice='a'), dict(prompt='q', a=[dict(role='assistant', content='x')], b='y', choice='both'), dict(prompt='q2', a='4', b='5', choice='b', tools=tool)]
    p = pairs_from_choices(ins)
    for method,path in p.save(tmp_path/'dpo.jsonl', tmp_path/'kto.jsonl').items():
        read = [r for s in find_sources(str(path)) for r in read_rows(s)]
        assert not any(r.fault for r in read)
        got = [r.row for r in read]
        shape = recognise(got, str(path), method)
        assert shape.name==dict(dpo='preference', kto='kto')[method] and shape.confidence>.9
        assert [normalise(r, shape.name) for r in got]==got==getattr(p, method)

# ---- the file of choices

def test_a_torn_last_line_costs_that_choice_and_no_other(tmp_path):
    f = tmp_path/'c.jsonl'
    for k in 'xyz': add_choice(f, key=k, choice='a')
    whole = f.read_bytes()
    for cut in range(len(whole)-2, whole.rindex(b'\n', 0, -1)+1, -7):
        f.write_bytes(whole[:cut])
        got, bad = read_choices(f)
        assert list(got)==['x', 'y'] and len(bad)==1
        add_choice(f, key='w', choice='b')
        got, bad = read_choices(f)
        assert list(got)==['x', 'y', 'w'] and len(bad)==1

def test_a_last_line_without_its_end_is_kept(tmp_path):
    f = tmp_path/'c.jsonl'
    f.write_text('{"key": "x", "choice": "a"}')
    add_choice(f, key='y', choice='b')
    assert list(read_choices(f)[0])==['x', 'y'] and not read_choices(f)[1]

def test_a_place_that_can_not_be_written_is_a_sentence_and_the_pair_stays(tmp_path):
    (tmp_path/'file').write_text('')
    p = rating_panel(rows(2), tmp_path/'file'/'c.jsonl')
    p.choose('a')
    assert p.shown['progress'].value.count('Problem: ')==1 and 'Pair 1 of 2' in p.shown['progress'].value and not p.done

def test_what_was_skipped_is_asked_once_more_at_the_end_and_again_next_time(tmp_path):
    f = tmp_path/'c.jsonl'
    p = rating_panel(rows(3), f)
    for c in ('skip', 'a', 'skip'): p.choose(c)
    assert p.pair==p.pairs[0] and 'Once more: 2 that were skipped' in p.static_html() and [x.name for x in p.files.values()]==['c_dpo.jsonl', 'c_kto.jsonl'] and p.preferred() is None
    p.choose('skip') # still undecided: the other one
    assert p.pair==p.pairs[2]
    p.choose('b')
    assert p.pair is None and 'All 3 pairs are rated' in p.static_html() and '1 skipped' in p.static_html() and len(p.files['dpo'].read_text().splitlines())==2
    p.choose('undo') # its choice is taken back, so it is asked anew
    assert p.pair==p.pairs[2]
    p.choose('b')
    again = rating_panel(rows(3), f)
    assert again.pair==again.pairs[0]
    again.choose('a')
    assert again.pair is None and len(again.files['dpo'].read_text().splitlines())==3

# ---- candidates

def test_who_is_a_is_drawn_and_can_be_told_afterwards():
    cs = candidates(rows(300))
    drawn = [blind(c) for c in cs]
    assert 100<sum(b['from']['a']=='base' for b in drawn)<200
    assert all(b[s]==c['answers'][b['from'][s]] for b,c in zip(drawn, cs) for s in 'ab')
    assert [blind(c) for c in candidates(rows(400))][:300]==drawn!=[blind(c, 1) for c in cs]
    picked = [dict(b, choice=next(s for s in 'ab' if b['from'][s]=='tuned')) for b in drawn]
    p = pairs_from_choices(picked)
    assert all(said(r['chosen']).startswith('tuned') and said(r['rejected']).startswith('base') for r in p.dpo) and len(p.dpo)==300
    assert preferred(picked).rows[0]['chosen']=='300 of 300' and preferred(picked).rows[0]['verdict']=='better'

def evaluated(folder, name, answers, system=None):
    run = Run(folder/'runs'/name, Recipe()).save()
    run.save_report('evaluate', dict(split='test', answers=[dict(prompt=q, reference=r, base=b, tuned=t) for q,r,b,t in answers]))
    run.path('data').mkdir()
    write_rows(run.path('data', 'test.jsonl'), [dict(messages=[*([dict(role='system', content=system)] if system else []), dict(role='user', content=q), dict(role='assistant', content=r)]) for q,r,*_ in answers])
    return run

def test_a_runs_answers_come_with_the_whole_question(tmp_path):
    run = evaluated(tmp_path, 'a', [('q1', 'r1', 'b1', 't1'), ('q2', 'r2', 'same', 'same'), ('q3', 'r3', '', 't3'), ('q1', 'r1', 'b1', 't1')], 'Be kind.')
    cs = candidates_from_run(run)
    assert cs[0]['prompt']==[dict(role='system', content='Be kind.'), dict(role='user', content='q1')] and cs[0]['answers']==dict(base='b1', tuned='t1') and cs[0]['expected']=='r1'
    assert [c.get('fault') for c in cs]==[None, 'the answers are the same', 'base: no answer: it is empty', 'stands there twice']
    human = candidates_from_run(run, 'reference', 'tuned')
    assert human[1]['answers']==dict(reference='r2', tuned='same') and candidates(human)==human
    assert 'stands there twice (1)' in rating_panel(run).text()

def test_a_question_of_two_conversations_is_not_guessed(tmp_path):
    run = evaluated(tmp_path, 'a', [('q', 'r', 'b', 't'), ('p', 'r', 'b', 't')])
    write_rows(run.path('data', 'test.jsonl'), [dict(messages=[dict(role='system', content=s), dict(role='user', content='q'), dict(role='assistant', content=r)]) for s,r in (('x', 'r'), ('y', 'r'), ('z', 'other'))])
    assert [c.get('fault') for c in candidates_from_run(run)]==[None, 'the question stands in several conversations']
    run.path('data', 'test.jsonl').unlink()
    assert said(candidates_from_run(run)[0]['prompt'])=='q'

def test_two_runs_meet_on_the_same_questions(tmp_path):
    a, b = evaluated(tmp_path, 'a', [('q1', 'r1', 'x', 'r1'), ('q2', 'r2', 'x', 'a2')]), evaluated(tmp_path, 'b', [('q1', 'r1', 'x', 'b1'), ('q3', 'r3', 'x', 'b3')])
    cs = candidates_from_runs(a, b)
    assert [c.get('answers') for c in cs]==[dict(a='r1', b='b1'), None, None] and 'only one of the runs' in cs[1]['fault']
    with pytest.raises(UserError, match='not asked the same'): candidates_from_runs(a, evaluated(tmp_path, 'c', [('q9', 'r', 'x', 'y')]))
    with pytest.raises(UserError, match='named twice'): candidates_from_runs(a, a)

@pytest.mark.parametrize('ins, n', [([dict(prompt='q', a='x', b='y')], 1), ([dict(prompt='q', response_1='x', response_2='y')], 1), ([dict(prompt='q', answers=['x', 'y', 'z'])], 3), ([dict(prompt='q', answers=dict(m='x', n='y'))], 1),
    ([dict(prompt='q', answer=t, model=m) for t,m in (('x', 'm'), ('y', 'n'), ('z', 'm'))], 3), ([dict(messages=[dict(role='user', content='q')], chosen='x', rejected='y')], 1)])
def test_two_columns_a_list_or_a_row_for_each_answer(tmp_path, ins, n):
    for source in (ins, write_rows(tmp_path/'r.jsonl', ins)):
        cs = candidates(source)
        assert len({c['key'] for c in cs})==n==len(cs) and all(said(c['prompt'])=='q' and len(c['answers'])==2 for c in cs)

def test_nothing_to_choose_from_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match='the answers are the same'): candidates([dict(prompt='q', a='x', b='x')])
    with pytest.raises(UserError, match="There is no run 'nothing'"): rating_panel('nothing', start=tmp_path)
    with pytest.raises(UserError, match='has no answers yet'): candidates(Run(tmp_path/'runs/a', Recipe()).save())
    with pytest.raises(UserError, match='3 runs are named'): candidates(['a', 'b', 'c'])
    with pytest.raises(UserError, match='There are no answers'): candidates_from_rows([])

@pytest.mark.parametrize('k, n, low, high', [(0, 10, 0, .2775), (10, 10, .7225, 1), (14, 20, .4810, .8545), (1, 1, .2065, 1)])
def test_the_interval_is_wilsons(k, n, low, high):
    assert wilson(k, n)==pytest.approx((low, high), abs=1e-4)

# ---- the panel

def test_a_new_panel_goes_on_where_the_last_one_was_killed(tmp_path):
    f = tmp_path/'c.jsonl'
    code = f'import os; from ftnb.rating_panel import rating_panel; p = rating_panel([dict(prompt=f"q{{i}}", base=f"base {{i}}", tuned=f"tuned {{i}}") for i in range(5)], {str(f)!r}); p.choose("a"); p.choose("both"); os._exit(9)'
    assert subprocess.run([sys.executable, '-c', code]).returncode==9
    f.write_bytes(f.read_bytes()+b'{"key": "abc", "cho')
    p = rating_panel(rows(5), f)
    assert (len(p.done), said(p.pair['prompt']))==(2, 'q2') and 'that can not be read: 1' in p.text()
    for c in ('a', 'b', 'skip', 'skip'): p.choose(c) # what was skipped is asked once more
    assert p.pair is None and p.files and len(p.saved.dpo)==3 and sum(p.saved.came.values())==6 # five choices and the torn line

def test_undo_goes_back_also_over_an_earlier_sitting(tmp_path):
    f = tmp_path/'c.jsonl'
    p = rating_panel(rows(3), f)
    for c in ('a', 'b'): p.choose(c)
    p = rating_panel(rows(3), f)
    for q in ('q1', 'q0'):
        p.choose('undo')
        assert said(p.pair['prompt'])==q
    p.choose('undo')
    assert 'nothing to undo' in p.shown['progress'].value and not read_choices(f)[0] and len(f.read_text().splitlines())==4
    p.choose('neither')
    assert [r['choice'] for r in read_choices(f)[0].values()]==['neither'] and not p.buttons['undo'].disabled

def test_who_wrote_what_is_not_shown_before_all_is_rated(tmp_path):
    p = rating_panel([dict(prompt=f'q{i}', left=f'one {i}', right=f'two {i}', answers=dict(secretone=f'one {i}', secrettwo=f'two {i}')) for i in range(3)], tmp_path/'c.jsonl')
    for c in ('a', 'b'):
        p.choose(c)
        p.write()
        assert 'secret' not in p.static_html()+p.text() and p.preferred() is None and p.files
    p.choose('a')
    assert 'secretone' in p.static_html() and 'secret' in p.text()
    p.choose('undo')
    assert 'secret' not in p.static_html()

def test_hostile_text_is_shown_and_not_obeyed(tmp_path):
    bad = '<script>alert(1)</script><img src=x onerror=alert(2)>"\'</div>'
    p = rating_panel([dict(prompt=bad+str(i), answers={bad: bad+'a', f'{bad}2': bad+'b'}, reference=bad) for i in range(2)], tmp_path/f'{bad.replace("/", "")}.jsonl')
    for _ in range(2):
        assert '<script' not in p.static_html() and '<img' not in p.static_html() and '&lt;script' in p.static_html()
        p.choose('a')
    assert '&lt;script' in p.static_html() and '<script' not in p.static_html() and '<img' not in p.static_html() and p.files

def test_keys_are_taken_one_at_a_time_and_none_twice(tmp_path):
    p = rating_panel(rows(9), tmp_path/'c.jsonl')
    p.key.value = '1'
    assert not p.done and p.key.value=='' # within the time in which nobody has read the pair
    p.pause = 0
    for k,c in zip('1B0Tns', ('a', 'b', 'both', 'both', 'neither', 'skip')):
        p.key.value = k
        assert list(p.done.values())[-1]['choice']==c and p.key.value==''
    n = len(p.done)
    p.key.value = 's2' # the field still held the last key
    assert len(p.done)==n and p.key.value==''
    p.key.value = 'u'
    assert len(p.done)==n-1
    p.key.value = 'é'
    assert len(p.done)==n-1 and 'is no key' in p.shown['progress'].value

def test_choices_of_other_pairs_in_the_file_are_counted_and_kept(tmp_path):
    f = tmp_path/'c.jsonl'
    rating_panel(rows(2), f).choose('a')
    p = rating_panel([dict(prompt='new', base='x', tuned='y')], f)
    assert p.others==1 and 'choices between other answers in c.jsonl: 1' in p.text()
    p.choose('b')
    assert len(p.saved.dpo)==2 and p.preferred().rows[0]['chosen'].endswith('of 1')

def test_rating_needs_no_heavy_library(tmp_path):
    code = "import sys; from ftnb.rating_panel import rating_panel; p = rating_panel([dict(prompt='q', a='x', b='y')], 'c.jsonl'); p.choose('a'); p.static_html(); assert p.files; print(sorted({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()=='[]'
