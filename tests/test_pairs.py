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

# tokens

def ask(t): return dict(role='user', content=t)
def say(t): return dict(role='assistant', content=t)
ROWS = [dict(prompt=[ask('What is 2+2?')], chosen=[say('It is 4.')], rejected=[say('5\n\nor so')]),
    dict(prompt=[dict(role='system', content='Be short.'), ask('Hello')], chosen=[say('Hello!')], rejected=[say('Good day to you, and é ✓')]),
    dict(prompt=[ask('First'), say('One.'), ask('Second')], chosen=[say('Two.')], rejected=[say('Second? I can not say.')])]

def by_trl(tok, rows, kind='dpo'):
    "Rows as TRL's own trainer tokenises them"
    trl = pytest.importorskip('trl')
    from types import SimpleNamespace
    class Stream(list):
        def map(self, f, fn_kwargs={}, **k): return Stream({**r, **f(dict(r), **fn_kwargs)} for r in self)
        def filter(self, f, **k): return Stream(filter(f, self))
    cls = trl.DPOTrainer if kind=='dpo' else trl.KTOTrainer
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode='keep_start', per_device_train_batch_size=2)
    me = SimpleNamespace(_tokenizer=tok, calculate_KL=False, desirable_weight=1., undesirable_weight=1.)
    return cls._prepare_dataset(me, Stream(rows), tok, args, 'eval')

def same_as_trl(tok, rec, ids):
    "Whether tokens are TRL's, but for white space behind the end of turn; None where TRL leaves out the end of the prompt"
    from ftnb.chat import prompt_of
    from ftnb.pairs import as_chats, encode_judged
    mine = encode_judged(tok, rec)
    if ids['prompt_ids']!=prompt_of(tok, as_chats(rec)['chosen'])[0]: return None
    return mine.prompt_ids==ids['prompt_ids'] and all(ids[f'{k}_ids'][:len(a)]==a and not tok.decode(ids[f'{k}_ids'][len(a):]).strip() for k,a in mine.answers.items())

@pytest.mark.parametrize('name', ['chatml', 'llama3', 'mistral'])
def test_pairs_are_the_tokens_that_trl_makes_of_them(tokenizer, name):
    from test_templates import REAL, fit
    from ftnb.template import _read
    tok = fit(tokenizer, _read(name))
    rows = [r for r in ROWS if name!='mistral' or r['prompt'][0]['role']!='system']
    assert [same_as_trl(tok, r, o) for r,o in zip(rows, by_trl(tok, rows))]==[True]*len(rows)
    from ftnb.pairs import encode_judged, unpair
    judged = [j for r in rows for j in unpair(r)]
    for j,o in zip(judged, by_trl(tok, judged, 'kto')):
        mine = encode_judged(tok, j)
        assert (mine.prompt_ids, mine.completion_ids, mine.label)==(o['prompt_ids'], o['completion_ids'][:len(mine.completion_ids)], o['label'])

@pytest.mark.soak
def test_on_every_real_template_a_pair_is_trls_or_refused_in_words(tokenizer):
    from test_templates import TRL, fit
    from ftnb.base import UserError
    same, other = [], []
    for name,text in TRL.items():
        if name.endswith('_training'): continue
        tok = fit(tokenizer, text)
        for r in (ROWS[0], ROWS[2]):
            try: theirs = by_trl(tok, [r])[0]
            except Exception: continue # a template that wants content in parts
            try: verdict = same_as_trl(tok, r, theirs)
            except UserError: continue
            if verdict is not None: (same if verdict else other).append(name)
    assert len(same)>=50 and not other

def test_a_pair_is_unpaired_as_trl_does_it():
    trl, datasets = pytest.importorskip('trl'), pytest.importorskip('datasets')
    from ftnb.pairs import pair_up, unpair
    rows = [dict(prompt=r['prompt'], chosen=r['chosen'], rejected=r['rejected']) for r in ROWS]
    theirs = trl.unpair_preference_dataset(datasets.Dataset.from_list(rows)).to_list()
    mine = [j for r in rows for j in unpair(r)]
    assert sorted(mine, key=str)==sorted(theirs, key=str)
    assert pair_up(mine)==(rows, [])

# stage 1

@pytest.fixture
def prep(made):
    "Stage 1 on rows, or on a file"
    def go(rows, **kw):
        run = made(rows, **{**dict(method='dpo', peft='lora', valid_size=4, test_size=4), **kw})
        return run, run.report('prepare')
    return go

def pairs(n=40): return [dict(prompt=[ask(f'What is {i} times {i+3}?')], chosen=[say(f'It is {i*(i+3)}.')], rejected=[say(f'{i*(i+3)+1} I guess'+', or so'*(i%3))]) for i in range(n)]
def saved(run, split='train'):
    import pyarrow.parquet as pq
    return [json.loads(l) for l in run.path('data', f'{split}.jsonl').read_text().splitlines()], pq.read_table(run.path('data', f'{split}.tokens.parquet')).to_pylist()

@pytest.mark.parametrize('method', ['dpo', 'orpo', 'kto'])
def test_every_pair_is_accounted_for_and_written_in_trls_columns(prep, tokenizer, method):
    rows = pairs()
    rows += [rows[3], dict(prompt='x', chosen='', rejected='b'), dict(prompt='x', chosen='b ', rejected='b'), 'no json']
    run, r = prep(rows, method=method)
    assert r['rows']==44==sum(r['splits'].values())+r['aside'] and r['aside']==4 and r['splits']==dict(train=32, valid=4, test=4)
    for split,n in r['splits'].items():
        recs, toks = saved(run, split)
        assert len(recs)==len(toks)==n*(1+(method=='kto'))
        for rec,t in zip(recs, toks):
            assert list(t)==(['prompt_ids', 'completion_ids', 'label'] if method=='kto' else ['prompt_ids', 'chosen_ids', 'rejected_ids'])
            for side in ('chosen', 'rejected', 'completion'):
                if side in rec: assert tokenizer.decode(t[f'{side}_ids'])==rec[side][0]['content']+'<|im_end|>'
            if method=='kto': assert t['label'] is rec['label']
        if method=='kto': assert [r['label'] for r in recs]==[True, False]*n and all(a['prompt']==b['prompt'] for a,b in zip(recs[::2], recs[1::2]))
    assert r['train_rows']==len(saved(run)[0])

def test_lengths_are_those_of_the_longer_side_and_trained_tokens_those_of_both(prep):
    run, r = prep(pairs())
    toks = saved(run)[1]
    size = lambda t: len(t['prompt_ids'])+max(len(t['chosen_ids']), len(t['rejected_ids']))
    assert r['lengths']['train']['max']==max(map(size, toks)) and r['lengths']['train']['sum']==sum(map(size, toks))
    assert r['trained_tokens']==sum(len(t['chosen_ids'])+len(t['rejected_ids']) for t in toks)==r['judged']['good']['sum']+r['judged']['bad']['sum']
    assert r['train_tokens']==r['trained_tokens']+2*sum(len(t['prompt_ids']) for t in toks)

LONG = ' '.join(map(str, range(100)))
def test_truncating_keeps_the_prompt_and_a_prompt_that_fills_max_length_is_set_aside(prep, tokenizer):
    rows = pairs(30)+[dict(prompt='Count', chosen='No.', rejected=LONG), dict(prompt=f'{LONG} and on?', chosen='Yes.', rejected='No.'), dict(prompt='Count on', chosen=f'{LONG} and that is it', rejected=f'{LONG} or so')]
    run, r = prep(rows, max_length=90, excess_length_strategy='truncate', test_size=0, valid_size=0, accept=dict(nothing_cut='planted'))
    assert [a['reason'] for a in r['set_aside']]==['nothing to train on within max_length: 90']*2 # nothing is left to tell the last pair's answers apart by
    long, = [t for rec,t in zip(*saved(run)) if rec['prompt'][0]['content']=='Count']
    assert tokenizer.decode(long['rejected_ids']).startswith('0 1 2 3') and len(long['prompt_ids'])+len(long['rejected_ids'])==90 and 0<len(long['chosen_ids'])<10
    run, r = prep(rows, max_length=90, excess_length_strategy='drop', test_size=0, valid_size=0)
    assert r['aside']==3 and {a['reason'].split(':')[0] for a in r['set_aside']}=={'longer than max_length'}

def test_labelled_answers_keep_their_label_and_both_answers_to_one_prompt_stay(prep):
    rows = [dict(prompt=f'A long enough question about the number {i//2}, that nobody has asked in these words before, is it?', completion=f'{"Yes" if i%2 else "No"}, I think it is {i}', label=bool(i%2)) for i in range(40)]
    run, r = prep(rows, method='kto', near_duplicates='drop')
    assert r['aside']==0
    recs, toks = saved(run)
    assert all(t['label']==rec['label']==rec['completion'][0]['content'].startswith('Yes') for rec,t in zip(recs, toks))
    asked = {s: {rec['prompt'][0]['content'] for rec in saved(run, s)[0]} for s in ('train', 'valid', 'test')}
    assert not asked['train'] & (asked['valid'] | asked['test'])

def test_near_pairs_are_those_with_near_answers(prep):
    q, a, b = 'How do I get the lid of the blue kettle of the old series off without any tools at all?', 'Turn it to the left by a quarter, then lift it with both of your hands', 'You can not take it off at home, so send it to our workshop by post please'
    rows = pairs(30)+[dict(prompt=q, chosen=a, rejected=b), dict(prompt=q, chosen=a+' now', rejected=b), dict(prompt=q, chosen='Press the two knobs at the side, both at the same time', rejected='It is glued to the body and has been so since the year it was made')]
    run, r = prep(rows, near_duplicates='drop', valid_size=0, test_size=0)
    assert [x['reason'] for x in r['set_aside']]==['almost the same as line 31 of '+r['files'][0]['file']]

def test_the_view_shows_both_answers_and_runs_nothing_in_them(prep):
    from ftnb.saved_proof import SavedProof
    from ftnb.show import show_labels
    rows = [dict(r, rejected=r['rejected'][0]['content']+' <script>alert(1)</script>') if i else r for i,r in enumerate(pairs())]
    rows = [{**r, 'chosen': r['chosen'][0]['content'], 'rejected': r['rejected'] if isinstance(r['rejected'], str) else r['rejected'][0]['content'], 'prompt': r['prompt'][0]['content']} for r in rows]
    run, r = prep(rows)
    page, proof = run.path('reports', 'proof.html').read_text(), SavedProof(run)
    for text in (page, show_labels(run)._repr_html_(), proof._repr_html_(), proof.static_html()):
        assert '<script>alert' not in text and 'script' in text and 'rejected' in text and 'chosen' in text
    first = proof.rows[0]
    assert [k.kind for k in first.runs]==['context', 'chosen', 'rejected']
    assert first.runs[1].text().startswith('It is') and first.runs[2].text().endswith('<|im_end|>')
    assert 'rejected' in repr(show_labels(run)) and 'prompt' in repr(show_labels(run))

def test_the_quality_report_tells_the_sides_apart(prep):
    rows = [dict(prompt=f'Give me the number {i} as it is', chosen=json.dumps(dict(n=i)), rejected=f'Sure, here is your number: {i}, as you asked') for i in range(60)]
    run, _ = prep(rows)
    q = run.report('quality')
    assert q['format']['forms'].get('JSON')==1 and q['rejected']['forms'].get('prose')==1
    assert q['rejected']['openings'][0]['what']=='Sure, here is your' and any(n['check']=='sides' for n in q['notes'])

def test_the_demo_pairs_go_through_without_a_remark(prep):
    run, r = prep(None, dataset='demo/preferences.jsonl', valid_size=40, test_size=40)
    assert r['splits']==dict(train=300, valid=40, test=40) and r['aside']==0
    assert {g['verdict'] for g in r['gates']}=={'ok'}

def test_what_a_file_was_taken_for_is_shown_before_any_stage_runs(tmp_path):
    from conftest import write_rows
    from ftnb.first_look import first_look
    p = write_rows(tmp_path/'p.jsonl', pairs(6))
    for method in ('dpo', 'orpo', 'kto'):
        look = first_look(p, method=method)
        assert not look.problems and look.files[0].shape.name=='preference' and 'rejected: assistant' in repr(look)
