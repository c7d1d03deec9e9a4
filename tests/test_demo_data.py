"The demo's rows: enough of them, right by their own rules, held-out rows really held out"
import json, re
from collections import Counter
from pathlib import Path
import pytest

DEMO = Path(__file__).parents[1]/'data/demo'
FIELDS = dict(product='kettle toaster blender vacuum heater lamp speaker coffee_machine'.split(),
    problem='no_power leak noise broken_part missing_part late_delivery wrong_item question'.split(), severity='low medium high'.split(), wants_refund=[True, False],
    next_step='call_customer refund repair send_part track_parcel exchange send_advice'.split())
BY_PROBLEM = dict(no_power='repair', leak='repair', noise='send_advice', broken_part='send_part', missing_part='send_part', late_delivery='track_parcel', wrong_item='exchange', question='send_advice')

def said(row, role): return next(m['content'] for m in row['messages'] if m['role']==role)
def words(text): return re.findall(r"[a-z0-9']+", text.lower())
def runs(ws, n): return {tuple(ws[i:i+n]) for i in range(len(ws)-n+1)}

def answer_faults(text):
    "What is wrong with an answer by the rules of the README"
    try: a = json.loads(text)
    except json.JSONDecodeError: return ['not JSON']
    if list(a)!=list(FIELDS): return [f'fields {list(a)}']
    bad = [f'{k}: {a[k]!r}' for k,vs in FIELDS.items() if not any(a[k]==v and type(a[k]) is type(v) for v in vs)]
    if bad: return bad
    mild = a['problem'] in ('question', 'noise', 'missing_part')
    if a['severity']!='high' and (a['severity']=='low')!=mild: bad.append(f'severity {a["severity"]} with {a["problem"]}')
    step = 'call_customer' if a['severity']=='high' else 'refund' if a['wants_refund'] else BY_PROBLEM[a['problem']]
    if a['next_step']!=step: bad.append(f'next_step {a["next_step"]}, not {step}')
    return bad

def too_alike(a, b):
    "Whether two messages share a run of 8 words, or 40 % of their 3-word shingles"
    a, b = words(a), words(b)
    x, y = runs(a, 3), runs(b, 3)
    return bool(runs(a, 8) & runs(b, 8)) or (bool(x|y) and len(x & y)/len(x|y)>=.4) or a==b

def repeated_openings(texts, n=6, most=2): return [o for o,k in Counter(tuple(words(t)[:n]) for t in texts).items() if k>most]

def test_there_are_enough_rows(demo_rows):
    assert len(demo_rows['train'])>=400 and len(demo_rows['valid'])>=40 and len(demo_rows['test'])>=80

def test_each_row_is_a_system_prompt_a_message_and_an_answer(demo_rows):
    assert all([m['role'] for m in r['messages']]==['system', 'user', 'assistant'] for rs in demo_rows.values() for r in rs)

def test_every_answer_follows_the_rules(demo_rows):
    assert not {(s, i): f for s,rs in demo_rows.items() for i,r in enumerate(rs, 1) if (f := answer_faults(said(r, 'assistant')))}

@pytest.mark.parametrize('change', [dict(product='oven'), dict(severity='high'), dict(severity='low'), dict(wants_refund='false'), dict(wants_refund=True), dict(next_step='refund'), dict(more=1)])
def test_a_wrong_answer_would_be_seen(change):
    right = dict(product='kettle', problem='leak', severity='medium', wants_refund=False, next_step='repair')
    assert not answer_faults(json.dumps(right))
    assert answer_faults(json.dumps({**right, **change}))

def test_every_value_is_learnt_and_asked(demo_rows):
    for split in ('train', 'test'):
        have = [json.loads(said(r, 'assistant')) for r in demo_rows[split]]
        assert not {k: v for k,vs in FIELDS.items() for v in vs if v not in [a[k] for a in have]}

def test_one_system_prompt_names_all_fields_and_values(demo_rows):
    prompts = {said(r, 'system') for rs in demo_rows.values() for r in rs}
    assert len(prompts)==1
    text = prompts.pop()
    assert not [k for k in FIELDS if k not in text]
    assert not [v for vs in FIELDS.values() for v in vs if re.search(rf'\b{str(v).lower()}\b', text) is None]

def test_no_test_message_is_known_from_training(demo_rows):
    known = [said(r, 'user') for s in ('train', 'valid') for r in demo_rows[s]]
    prepared = [(runs(words(t), 3), runs(words(t), 8), words(t)) for t in known]
    for r in demo_rows['test']:
        w = words(said(r, 'user'))
        x, y = runs(w, 3), runs(w, 8)
        assert not [' '.join(o) for a,b,o in prepared if b & y or o==w or len(a & x)>=.4*len(a|x)>0], said(r, 'user')

def test_a_copied_message_would_be_seen(demo_rows):
    m = said(demo_rows['train'][0], 'user')
    assert too_alike(m, m.upper()+' Thanks in advance!') and too_alike('It leaks.', 'it leaks') and not too_alike(m, said(demo_rows['train'][1], 'user'))

def test_no_message_comes_from_a_template(demo_rows):
    texts = [said(r, 'user') for rs in demo_rows.values() for r in rs]
    assert not repeated_openings(texts)
    assert len({' '.join(words(t)) for t in texts})==len(texts)
    assert repeated_openings([f'My {p} stopped working after one day' if i else f'My kettle stopped working after one week {p}' for i,p in enumerate(FIELDS['product'])])==[] # differing words early
    assert repeated_openings([f'Hello I have a problem with my {p}' for p in FIELDS['product']])

def test_messages_are_short_and_long_and_of_many_words(demo_rows):
    lens = sorted(len(words(said(r, 'user'))) for rs in demo_rows.values() for r in rs)
    assert lens[0]<=12 and lens[len(lens)//10]<=20 and lens[-len(lens)//10]>=30 and lens[0]>=5

def test_the_planted_faults_are_what_the_readme_says(demo_rows):
    lines = (DEMO/'faults.jsonl').read_text().splitlines()
    assert len(lines)==5
    again, leaked, empty, key = map(json.loads, lines[:4])
    assert again in demo_rows['train']
    assert said(leaked, 'user') in [said(r, 'user') for r in demo_rows['test']]
    assert said(empty, 'assistant')==''
    assert re.search(r'ghp_\w+', said(key, 'assistant')) and 'fake' in said(key, 'assistant').lower()
    with pytest.raises(json.JSONDecodeError): json.loads(lines[4])

def test_stage_1_finds_each_planted_fault_and_nothing_else(tmp_path):
    from ftnb.prepare import examine
    from ftnb.recipe import load_recipe
    done, rows = examine(load_recipe(DEMO/'demo.yaml'), tmp_path)
    aside = [(rows.files[rows.file[i]].split('/')[-1], rows.line[i], rows.reason(i)) for i in range(len(rows)) if rows.why[i]]
    mine = {l: why for f,l,why in aside if f=='faults.jsonl'}
    assert 'same as line' in mine[1] and 'no answer' in mine[3] and 'not JSON' in mine[5] and ' in the ' in mine[4]
    # the leaked question is trained on either way: the held-out row goes, so that the test is fair
    assert [f for f,_,why in aside if 'leaked' in why]==['test.jsonl']
    assert len(aside)==5 and not done.stopped
