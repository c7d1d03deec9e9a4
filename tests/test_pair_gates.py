"Each silent fault of preference data is stopped or set aside by a gate with a name; without the gate it goes through"
import pytest

torch = pytest.importorskip('torch')
from test_gates import prep, stopped, verdicts # fixture and helpers
from test_pairs import LONG, ask, pairs, say
from ftnb import gates, pairs as coded, prepare as stage
from ftnb.pairs import Judged

PREFER = dict(method='dpo')

def wrong(monkeypatch, change, name='encode_judged'):
    "Tokens that are changed behind the back of stage 1"
    right = getattr(stage, name)
    monkeypatch.setattr(stage, name, lambda *a, **k: change(right(*a, **k)))

def sides(e, f): return Judged(e.prompt_ids, {k: f(k, a) for k,a in e.answers.items()}, e.label, e.ends)

def test_all_gates_pass_on_sound_pairs(prep):
    got = verdicts(prep(pairs(110), **PREFER)[1])
    assert set(got)==set(gates.gate_table) and set(got.values())=={'ok'}

def test_a_prompt_that_no_server_gives_stops(monkeypatch, prep):
    wrong(monkeypatch, lambda e: Judged(e.prompt_ids[:-1], {k: e.prompt_ids[-1:]+a for k,a in e.answers.items()}))
    stopped(monkeypatch, prep, 'prompt_identical', '60 rows have another prompt than a server gives', 'mine.jsonl, line', rows=pairs(60), **PREFER)

def test_a_part_of_the_answer_in_the_prompt_stops(monkeypatch, prep):
    wrong(monkeypatch, lambda e: Judged(e.prompt_ids+e.chosen_ids[:1], sides(e, lambda k, a: a[1:]).answers))
    with pytest.raises(stage.UserError, match='gate answers_trained|gate prompt_identical'): prep(pairs(60), **PREFER)

@pytest.mark.parametrize('side', ['chosen', 'rejected'])
def test_an_answer_that_lost_words_stops(monkeypatch, prep, side):
    wrong(monkeypatch, lambda e: sides(e, lambda k, a: a[2:] if k==side else a))
    stopped(monkeypatch, prep, 'answers_trained', 'not whole among its tokens', rows=pairs(60), **PREFER)

@pytest.mark.parametrize('side', ['chosen', 'rejected'])
def test_an_answer_without_its_end_of_turn_stops(monkeypatch, prep, side):
    wrong(monkeypatch, lambda e: sides(e, lambda k, a: a[:-1] if k==side else a))
    stopped(monkeypatch, prep, 'end_of_turn_trained', 'no trained end-of-turn token', rows=pairs(60), **PREFER)

def test_an_empty_side_stops(monkeypatch, prep):
    wrong(monkeypatch, lambda e: sides(e, lambda k, a: [] if k=='rejected' else a))
    stopped(monkeypatch, prep, 'mask_not_empty', 'no trained token at all', rows=pairs(60), **PREFER)

def test_a_judged_answer_is_looked_at_as_closely(monkeypatch, prep):
    rows = [dict(prompt=p['prompt'], completion=p['chosen'], label=i%2==0) for i,p in enumerate(pairs(60))]
    wrong(monkeypatch, lambda e: sides(e, lambda k, a: a[:-1]))
    stopped(monkeypatch, prep, 'end_of_turn_trained', '60 rows', rows=rows, method='kto')

@pytest.mark.parametrize('side', ['chosen', 'rejected'])
def test_a_side_that_would_be_cut_stops(monkeypatch, prep, side):
    rows = pairs(58)+[{**p, side: f'{LONG} {i}'} for i,p in enumerate(pairs(2))]
    stopped(monkeypatch, prep, 'nothing_cut', '2 rows are longer than max_length: 120', 'ends of turn', rows=rows, max_length=120, **PREFER)

def test_pairs_that_are_one_answer_twice_are_set_aside_and_many_of_them_stop(monkeypatch, prep):
    twice = [dict(p, rejected=[say(p['chosen'][0]['content']+' ')]) for p in pairs(70)[60:]]
    got = prep(pairs(60)+twice[:2], **PREFER)[1]
    assert verdicts(got)['sides_differ']=='fixed' and got.report['aside']==2
    stopped(monkeypatch, prep, 'sides_differ', '10 rows have the same answer twice', 'one column', rows=pairs(60)+twice, **PREFER)

def test_pairs_whose_tokens_are_the_same_are_set_aside(monkeypatch, prep):
    right = stage.encode_judged
    monkeypatch.setattr(stage, 'encode_judged', lambda tok, rec, think: Judged((e := right(tok, rec, think)).prompt_ids, dict(chosen=e.chosen_ids, rejected=e.chosen_ids) if '7 times' in str(rec) else e.answers))
    got = prep(pairs(60), accept=dict(answers_trained='planted'), **PREFER)[1]
    assert got.report['set_aside'] and {a['reason'] for a in got.report['set_aside']}=={'chosen and rejected are the same tokens'}

def test_pairs_that_contradict_each_other_are_set_aside_and_many_of_them_stop(monkeypatch, prep):
    turned = [dict(p, chosen=p['rejected'], rejected=p['chosen']) for p in pairs(10)]
    run, got = prep(pairs(60)+turned[:1], **PREFER)
    assert verdicts(got)['pairs_agree']=='fixed' and [a['line'] for a in got.report['set_aside']]==[1, 61]
    stopped(monkeypatch, prep, 'pairs_agree', '20 rows contradict each other', 'which column', rows=pairs(60)+turned, **PREFER)
    rows = [dict(prompt='Is it warm?', completion='Yes, it is.', label=l) for l in (True, False, True)]+[dict(prompt=p['prompt'], completion=p['chosen'], label=i%2==0) for i,p in enumerate(pairs(60))]
    got = prep(rows, method='kto')[1]
    assert [a['line'] for a in got.report['set_aside']]==[1, 2, 3]

def test_an_answer_that_won_one_pair_and_lost_another_is_said_to_kto_and_not_to_dpo(prep):
    chain = [dict(p, chosen=p['rejected'], rejected=[say(f'No, not {i}.')]) for i,p in enumerate(pairs(3))]
    for method,said in (('kto', 'warn'), ('dpo', 'ok')):
        got = prep(pairs(60)+chain, method=method, valid_size=0, test_size=0)[1]
        assert verdicts(got)['pairs_agree']==said and not got.report['aside']

def test_an_answer_of_several_turns_is_set_aside_in_words(prep):
    long = [dict(p, chosen=[*p['chosen'], ask('Sure?'), say('Yes.')]) for p in pairs(62)[60:]]
    got = prep(pairs(60)+long, **PREFER)[1]
    assert verdicts(got)['prompt_identical']=='fixed' and all('an answer of 3 turns' in a['reason'] for a in got.report['set_aside'])

def test_a_template_whose_prompt_depends_on_the_answer_stops(monkeypatch, prep, tmp_path):
    t = tmp_path/'odd.jinja'
    t.write_text("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.first and 'guess' in messages[-1].content %}{{ 'Guess: ' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    rows = pairs(60)
    for p in rows[:40]: p['rejected'] = [say('no no no')]
    stopped(monkeypatch, prep, 'prompt_identical', '20 rows have no answers behind one and the same prompt', rows=rows, chat_template_path=str(t), **PREFER)

def test_wanted_answers_that_are_longer_are_a_warning_with_the_figure(prep):
    rows = [dict(p, chosen=p['rejected'], rejected=p['chosen']) for p in pairs(60)]
    g = next(g for g in prep(rows, **PREFER)[1].report['gates'] if g['gate']=='length_bias')
    assert g['verdict']=='warn' and 'tokens on average' in g['text'] and '68 % of the pairs' in g['text']

@pytest.mark.parametrize('n, more, verdict, said', [(48, {}, 'warn', 'undesirable_weight: 3.01 to 4.00'), (48, dict(undesirable_weight=3.5), 'ok', ''), (48, dict(desirable_weight=.3), 'ok', ''), (60, {}, 'stop', 'label: false'), (30, {}, 'ok', '')])
def test_labels_out_of_balance_name_the_weights_that_balance_them(prep, n, more, verdict, said):
    rows = [dict(prompt=p['prompt'], completion=p['chosen'], label=i<n) for i,p in enumerate(pairs(60))]
    kw = dict(method='kto', valid_size=0, test_size=0, accept=dict(labels_balanced='a test') if verdict=='stop' else None, **more)
    g = next(g for g in prep(rows, **{k:v for k,v in kw.items() if v is not None})[1].report['gates'] if g['gate']=='labels_balanced')
    assert g['verdict']==('accepted' if verdict=='stop' else verdict) and said in g['text']

def test_a_held_out_prompt_that_is_trained_on_is_set_aside(prep, tmp_path):
    from conftest import write_rows
    rows = pairs(60)
    train, test = write_rows(tmp_path/'train.jsonl', rows), write_rows(tmp_path/'test.jsonl', [dict(rows[3], chosen=[say('54, no doubt')]), dict(prompt='Whatever else?', chosen='a b', rejected='c')])
    got = prep([], dataset=[dict(path=train, split='train'), dict(path=test, split='test')], valid_size=0, **PREFER)[1]
    assert verdicts(got)['no_leak']=='fixed' and got.report['splits']['test']==1

@pytest.mark.parametrize('side', ['chosen', 'rejected', 'prompt'])
def test_a_secret_in_either_side_is_set_aside(prep, side):
    rows = pairs(61)
    rows[60] = {**rows[60], side: [dict(rows[60][side][0], content='the key is ghp_'+'a1B2'*9)]}
    run, got = prep(rows, **PREFER)
    assert verdicts(got)['no_secrets']=='fixed' and got.report['set_aside'][0]['line']==61
    assert 'ghp_' not in ''.join(p.read_text() for p in run.path('data').iterdir() if p.suffix=='.jsonl')
