"The demo's data: its size, its rules, and that no test message can be answered from memory"
import json, os, re
from collections import Counter
from pathlib import Path

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
from ftnb.quality import find_secret

DEMO = Path(__file__).parents[1]/'data/demo'
splits = dict(train=400, valid=40, test=80)
allowed = dict(product='kettle toaster blender vacuum heater lamp speaker coffee_machine'.split(),
    problem='no_power leak noise broken_part missing_part late_delivery wrong_item question'.split(), severity=['low', 'medium', 'high'], wants_refund=[True, False],
    next_step='call_customer refund repair send_part track_parcel exchange send_advice'.split())
by_problem = dict(no_power='repair', leak='repair', noise='send_advice', broken_part='send_part', missing_part='send_part', late_delivery='track_parcel', wrong_item='exchange',
    question='send_advice')

def lines(name): return [l for l in (DEMO/f'{name}.jsonl').read_text().splitlines() if l.strip()]
data = {s: [json.loads(l)['messages'] for l in lines(s)] for s in splits}
rows = [(f'{s}.jsonl, line {i}', ms) for s,rs in data.items() for i,ms in enumerate(rs, 1)]
def asked(ms): return next(m['content'] for m in ms if m['role']=='user')
def answer(ms): return json.loads(ms[-1]['content'])
def words(text): return re.findall(r"[a-z0-9']+", text.lower())
def runs_of(ws, n): return {tuple(ws[i:i+n]) for i in range(max(1, len(ws)-n+1))}

@pytest.mark.parametrize('split,least', splits.items())
def test_there_are_enough_rows(split, least): assert len(data[split])>=least

def test_every_row_asks_once_under_the_same_system_prompt():
    assert not [w for w,ms in rows if [m['role'] for m in ms]!=['system', 'user', 'assistant']]
    assert len({ms[0]['content'] for _,ms in rows})==1
    said = re.findall(r'\w+', rows[0][1][0]['content'])
    for field,values in allowed.items():
        assert field in said
        assert {str(v).lower() for v in values} <= set(said), field

def test_answers_are_one_line_of_json_with_the_allowed_values():
    for where,ms in rows:
        assert '\n' not in ms[-1]['content'], where
        a = answer(ms)
        assert list(a)==list(allowed), where
        for k,v in a.items(): assert any(v is x or isinstance(v, str) and v==x for x in allowed[k]), f'{where}: {k} is {v!r}'

def test_severity_and_next_step_follow_their_rules():
    for where,ms in rows:
        a = answer(ms)
        if a['severity']!='high': assert (a['severity']=='low')==(a['problem'] in ('question', 'noise', 'missing_part')), where
        assert a['next_step']==('call_customer' if a['severity']=='high' else 'refund' if a['wants_refund'] else by_problem[a['problem']]), where

def test_every_value_occurs_in_every_split():
    for split,rs in data.items():
        for k,values in allowed.items(): assert {answer(ms)[k] for ms in rs}==set(values), f'{split}: {k}'

def test_no_test_message_is_like_one_of_train_or_valid():
    known = [(s, i, ws, runs_of(ws, 3)) for s in ('train', 'valid') for i,ms in enumerate(data[s], 1) for ws in [words(asked(ms))]]
    eights = {r for *_,ws,_ in known if len(ws)>=8 for r in runs_of(ws, 8)}
    for i,ms in enumerate(data['test'], 1):
        ws = words(asked(ms))
        assert len(ws)<8 or not runs_of(ws, 8) & eights, f'test.jsonl, line {i} shares 8 words'
        mine = runs_of(ws, 3)
        near = [(s, j) for s,j,_,theirs in known if len(mine & theirs)>=.4*len(mine | theirs)]
        assert not near, f'test.jsonl, line {i} is like {near}'

def test_no_opening_stands_more_than_twice():
    openings = Counter(tuple(words(asked(ms))[:6]) for _,ms in rows)
    assert not [(' '.join(o), n) for o,n in openings.items() if n>2]

def test_the_five_planted_faults_are_there():
    again, leaked, empty, secret, broken = lines('faults')
    assert json.loads(again)['messages'] in data['train']
    assert asked(json.loads(leaked)['messages']) in map(asked, data['test'])
    assert not json.loads(empty)['messages'][-1]['content'].strip()
    assert find_secret(json.loads(secret))=='a GitHub token in the answer'
    with pytest.raises(json.JSONDecodeError): json.loads(broken)
