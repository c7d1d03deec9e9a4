"Preference pairs and judged answers through stage 1: the demo's pairs, their tokens as TRL makes them, every row accounted for"
import json, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
DEMO = ROOT/'data/demo'

@pytest.fixture(scope='module')
def demo_pairs(): return [json.loads(l) for l in (DEMO/'preferences.jsonl').read_text().splitlines()]

# the demo's preferences

def test_the_demo_pairs_are_what_their_tool_writes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/'tools'))
    from make_preferences import make
    assert (DEMO/'preferences.jsonl').read_text()==make()

def test_the_demo_pairs_ask_what_is_trained_on_and_never_what_is_held_out(demo_pairs, demo_rows):
    asked = lambda rs: {r['messages'][1]['content'] for r in rs}
    mine = [p['prompt'][-1]['content'] for p in demo_pairs]
    assert len(mine)>=340 and len(set(mine))==len(mine)
    assert set(mine)<=asked(demo_rows['train']) and not set(mine) & asked(demo_rows['test'])

def test_length_does_not_give_the_wanted_reply_away(demo_pairs):
    n = lambda p, k: len(p[k][0]['content'].split())
    longer = sum(n(p, 'chosen')>n(p, 'rejected') for p in demo_pairs)
    assert .45<longer/len(demo_pairs)<.55
