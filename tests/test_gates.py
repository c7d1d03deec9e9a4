"Each silent fault of fine-tuning is stopped by a gate with a name; without the gate it goes through"
import json
import pytest

torch = pytest.importorskip('torch')
from conftest import make_tiny, short_rows, write_rows
from ftnb import gates, prepare as stage, rowcheck
from ftnb.base import UserError
from ftnb.chat import Encoded
from ftnb.packing import logit_difference, packed_difference, shrink
from ftnb.recipe import make_recipe
from ftnb.runs import Run

@pytest.fixture
def prep(tmp_path, tiny):
    "Stage 1 on rows"
    def go(rows, **kw):
        run = Run(tmp_path/'run', make_recipe({**dict(dataset=write_rows(tmp_path/'mine.jsonl', rows) if isinstance(rows, list) else str(rows), model_name_or_path=tiny, test_size=2, valid_size=2), **kw}))
        return run, stage.prepare(run)
    return go

def stopped(monkeypatch, prep, gate, *has, rows, **kw):
    "Stage 1 stops at `gate`, saying `has`; with the gate removed it does not"
    with pytest.raises(UserError) as e: prep(rows, **kw)
    text = str(e.value)
    assert text.startswith(f'gate {gate}: ') and '\n' not in text, text
    assert not [h for h in has if h not in text], text
    with monkeypatch.context() as m:
        m.setattr(gates, 'gate_table', {k:v for k,v in gates.gate_table.items() if k!=gate})
        prep(rows, **kw)
    return text

def verdicts(done): return {g['gate']: g['verdict'] for g in done.report['gates']}
def rows_of(n=60): return short_rows(n)

def test_all_gates_pass_on_sound_rows(prep):
    got = verdicts(prep(rows_of(120))[1])
    assert set(got)==set(gates.gate_table)-set(gates.pair_gates) and set(got.values())=={'ok'}

# the silent faults of TRL (facts: a to j)

def wrong(monkeypatch, change):
    "Labels that are changed behind the back of stage 1"
    right = stage.encode
    def encode(*a, **k): return change(right(*a, **k))
    monkeypatch.setattr(stage, 'encode', encode)

def test_a_training_on_the_question_stops(monkeypatch, prep):
    wrong(monkeypatch, lambda e: Encoded(e.input_ids, list(e.input_ids), e.ends))
    stopped(monkeypatch, prep, 'prompt_masked', 'rows train on the question', 'mine.jsonl, line', rows=rows_of())

def test_a_question_trained_in_part_stops_too(monkeypatch, prep):
    wrong(monkeypatch, lambda e: Encoded(e.input_ids, [i if k<2 or l!=-100 else -100 for k,(i,l) in enumerate(zip(e.input_ids, e.labels))], e.ends))
    with pytest.raises(UserError, match='gate prompt_masked: 60 rows train on the question'): prep(rows_of())

def test_b_an_answer_that_would_be_cut_stops(monkeypatch, prep):
    rows = [*rows_of(58), *(dict(prompt=f'Count to {n}', completion=' '.join(map(str, range(n)))) for n in (400, 500))]
    text = stopped(monkeypatch, prep, 'nothing_cut', 'ends of turn', 'max_length: 200', 'to keep all', rows=rows, max_length=200)
    assert 'would lose' in text and '--accept nothing_cut=REASON' in text

def test_c_rows_whose_prompt_fills_max_length_do_not_vanish(monkeypatch, prep):
    rows = [*rows_of(56), *(dict(prompt=f'{w} '*300, completion='yes') for w in 'left right above below'.split())]
    stopped(monkeypatch, prep, 'nothing_cut', '4 rows are longer', rows=rows, max_length=200)
    run, done = prep(rows, max_length=200, excess_length_strategy='drop')
    assert verdicts(done)['nothing_cut']=='fixed' and done.report['aside']==4
    assert done.report['rows']==60==sum(done.report['splits'].values())+4

def test_c_rows_that_vanish_on_the_way_stop(monkeypatch, prep):
    right = stage.take_in
    def lossy(*a, **k):
        got = right(*a, **k)
        got.read += 3
        return got
    monkeypatch.setattr(stage, 'take_in', lossy)
    stopped(monkeypatch, prep, 'nothing_lost', '3 rows are missing: 63 were read', rows=rows_of())

def test_e_sharegpt_roles_become_roles_and_unknown_ones_stop(monkeypatch, prep):
    def talk(i, a, b): return dict(conversations=[{'from': a, 'value': f'What is {i} and {i+2}?'}, {'from': b, 'value': f'It is {2*i+2}.'}])
    run, done = prep([talk(i, 'human', 'gpt') for i in range(60)])
    first = json.loads(run.path('data', 'train.jsonl').open().readline())
    assert [m['role'] for m in first['messages']]==['user', 'assistant'] and done.report['aside']==0
    stopped(monkeypatch, prep, 'roles_known', "unknown", "alice", rows=[talk(i, 'human', 'gpt') for i in range(50)]+[talk(i, 'alice', 'gpt') for i in range(60, 70)])

def test_flat_text_with_role_markers_is_not_trained_as_prose_unasked(monkeypatch, prep):
    rows = [dict(text=f'### Human: What is {i} and {i}?### Assistant: It is {2*i}, as you know.') for i in range(60)]
    stopped(monkeypatch, prep, 'roles_known', 'as prose', 'mapping: {messages: text}', rows=rows)
    run, done = prep(rows, mapping=dict(messages='text'))
    r = json.loads(run.path('data', 'train.jsonl').open().readline())
    assert [m['role'] for m in r['messages']]==['user', 'assistant'] and '###' not in str(r['messages'])

THINK = '''{%- for m in messages %}{%- set c = m.content %}{%- if m.role=='assistant' and '</think>' in c and not loop.last %}{%- set c = c.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' }}{%- if m.role=='assistant' and loop.last and '</think>' not in c %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{{- c + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}'''
@pytest.fixture
def thinks(tmp_path):
    p = tmp_path/'think.jinja'
    p.write_text(THINK)
    return str(p)

def test_h_an_empty_think_that_the_template_adds_is_not_trained_unasked(monkeypatch, prep, thinks):
    stopped(monkeypatch, prep, 'think_handled', 'empty <think></think>', 'think: ignore_empty', rows=rows_of(), chat_template_path=thinks)
    run, done = prep(rows_of(), chat_template_path=thinks, think='ignore_empty')
    assert not done.stopped and '<think>' not in ''.join(t for r in done.rows.rows for t,k,_ in r.groups() if k=='trained')

def test_i_thoughts_that_the_template_leaves_out_stop(monkeypatch, prep, thinks):
    def talk(i): return dict(messages=[dict(role='user', content=f'What is {i}?'), dict(role='assistant', content=f'<think>\nIt is about {i}.\n</think>\n\nA number.'),
        dict(role='user', content='Which?'), dict(role='assistant', content=f'<think>\nSo {i}.\n</think>\n\nThe number {i}.')])
    rows = [talk(i) for i in range(60)]
    stopped(monkeypatch, prep, 'think_handled', '60 rows lose thoughts of earlier turns', 'think: strip', rows=rows, chat_template_path=thinks)

def test_j_an_end_of_turn_at_which_no_server_stops_stops(monkeypatch, prep, tmp_path):
    other = make_tiny(tmp_path/'other')
    p = tmp_path/'other'/'generation_config.json'
    p.write_text(json.dumps(dict(json.loads(p.read_text()), eos_token_id=0)))
    text = stopped(monkeypatch, prep, 'stops_at_serving', '<|im_end|> (2)', 'stops at [0]', 'add 2 to eos_token_id', rows=rows_of(), model_name_or_path=other)
    p.write_text(json.dumps(dict(json.loads(p.read_text()), eos_token_id=[0, 2])))
    assert verdicts(prep(rows_of(), model_name_or_path=other)[1])['stops_at_serving']=='ok'

# the other gates

def test_an_answer_without_its_end_of_turn_stops(monkeypatch, prep):
    def cut(e):
        k = max(i for i,l in enumerate(e.labels) if l!=-100)
        return Encoded(e.input_ids, [*e.labels[:k], -100, *e.labels[k+1:]], e.ends)
    wrong(monkeypatch, cut)
    stopped(monkeypatch, prep, 'end_of_turn_trained', 'no trained end-of-turn token', rows=rows_of())

def test_an_answer_of_several_that_is_not_trained_stops(monkeypatch, prep):
    talk = lambda i: dict(messages=[dict(role=r, content=f'{r} {i} {k}') for k in (1, 2) for r in ('user', 'assistant')])
    def last_only(e):
        s, _ = rowcheck.stretches(e.labels)[-1]
        return Encoded(e.input_ids, [-100]*s+e.labels[s:], e.ends)
    wrong(monkeypatch, last_only)
    stopped(monkeypatch, prep, 'answers_trained', 'an answer without a trained token', rows=[talk(i) for i in range(60)])

def test_a_row_with_nothing_to_learn_stops(monkeypatch, prep):
    wrong(monkeypatch, lambda e: Encoded(e.input_ids, [-100]*len(e.labels), e.ends))
    monkeypatch.setattr(stage, '_fit', lambda i, enc, recipe, got: (enc, None))
    with monkeypatch.context() as m:
        m.setattr(gates, 'gate_table', {'mask_not_empty': gates.mask_not_empty})
        with pytest.raises(UserError, match='gate mask_not_empty: 60 rows have no trained token at all'): prep(rows_of())

def test_two_bos_at_the_start_stop(monkeypatch, prep):
    wrong(monkeypatch, lambda e: Encoded([1, 1, *e.input_ids], [-100, -100, *e.labels], e.ends))
    stopped(monkeypatch, prep, 'one_bos', 'BOS tokens', rows=rows_of())

def test_a_template_that_changes_when_saved_stops(monkeypatch, prep):
    monkeypatch.setattr(stage, 'same_when_saved', lambda *a: False)
    stopped(monkeypatch, prep, 'template_same', 'rendered otherwise by the saved tokenizer', rows=rows_of())

def test_a_run_whose_template_changed_after_stage_1_is_refused(prep):
    from ftnb.tokenizer import run_tokenizer
    run, _ = prep(rows_of())
    assert run_tokenizer(run)
    run.note(template='0123456789abcdef')
    with pytest.raises(UserError, match='gate template_same: .*01234567'): run_tokenizer(run)

def test_leaks_are_fixed_exact_and_near(prep, tmp_path):
    rows = [dict(prompt=f'My {a} of the {b} series leaks since last week and the lid does not close any more, order {k}', completion=f'{k}') for k,(a,b) in enumerate((a, b) for a in 'kettle lamp heater iron mixer fan'.split() for b in 'red blue green grey old new tall flat'.split())]
    train, test = write_rows(tmp_path/'train.jsonl', rows), tmp_path/'test.jsonl'
    write_rows(test, [rows[3], dict(prompt='Nothing like it stands in the file of training rows, whatever one may think of that', completion='no')])
    _, done = prep([], dataset=[dict(path=train, split='train'), dict(path=str(test), split='test')], valid_size=0)
    assert verdicts(done)['no_leak']=='fixed' and done.report['splits']['test']==1
    long = 'The quick courier from the north brought three parcels to the wrong door on Monday and nobody in the house had ordered anything at all'
    write_rows(tmp_path/'train.jsonl', [*rows, dict(prompt=long, completion='x')])
    write_rows(test, [dict(prompt=long.replace('Monday', 'Friday'), completion='y'), dict(prompt='Nothing like it stands in the file of training rows, whatever one may think of that', completion='no')])
    _, done = prep([], dataset=[dict(path=train, split='train'), dict(path=str(test), split='test')], valid_size=0)
    assert [a['reason'].split(',')[0] for a in done.report['set_aside']]==['leaked: almost asked in training']

def test_packing_on_an_architecture_whose_rows_see_each_other_stops(monkeypatch, prep, tmp_path):
    from transformers import AutoConfig
    prep(rows_of(), packing=True)
    AutoConfig.for_model('falcon', bos_token_id=1, eos_token_id=2).save_pretrained(tmp_path/'falcon')
    d = packed_difference(make_recipe(dict(model_name_or_path=str(tmp_path/'falcon'))))
    assert d>1e-2
    monkeypatch.setattr('ftnb.packing.packed_difference', lambda r: d)
    stopped(monkeypatch, prep, 'packing_clean', 'would see each other when packed', 'packing: false', rows=rows_of(), packing=True)

@pytest.mark.parametrize('kind', 'llama mistral mixtral qwen2 qwen3 qwen3_moe gemma gemma3_text phi phi3 gpt_neox olmo2 smollm3'.split())
@pytest.mark.parametrize('kernel', ['sdpa', 'eager'])
def test_packed_rows_are_separate_on(kind, kernel):
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    m = AutoModelForCausalLM.from_config(shrink(AutoConfig.for_model(kind)), dtype=torch.float32, attn_implementation=kernel)
    assert logit_difference(m)<1e-5
    assert logit_difference(m, attention_mask=torch.ones(1, 56))>1e-3

def test_few_rows_with_many_epochs_are_a_warning(prep):
    got = {g['gate']: g for g in prep(rows_of(), num_train_epochs=10)[1].report['gates']}
    assert got['enough_rows']['verdict']=='warn' and 'by heart' in got['enough_rows']['text']

def test_training_on_everything_because_the_recipe_says_so_is_a_warning(prep):
    assert verdicts(prep(rows_of(120), assistant_only_loss=False)[1])['prompt_masked']=='warn'

# accepting

def test_an_accepted_gate_goes_on_and_the_manifest_keeps_the_reason(prep):
    rows = [*rows_of(58), *(dict(prompt=f'Count to {n}', completion=' '.join(map(str, range(n)))) for n in (400, 500))]
    run, done = prep(rows, max_length=200, accept=dict(nothing_cut='the long rows are noise'))
    assert verdicts(done)['nothing_cut']=='accepted' and 'the long rows are noise' in run.manifest['accepted'][0]['text']
    assert 'the long rows are noise' in done.line and done.report['aside']==2

@pytest.mark.parametrize('accept, said', [(dict(nothing_cut=''), 'has no reason'), (dict(nothing_cut=None), 'has no reason'), (dict(nothing_kut='x'), "Did you mean 'nothing_cut'")])
def test_an_empty_reason_and_an_unknown_gate_are_refused(prep, accept, said):
    with pytest.raises(UserError, match=said): prep(rows_of(), accept=accept)

def test_a_refusal_keeps_what_was_prepared_before_and_shows_the_proof(prep):
    run, _ = prep(rows_of())
    before = run.path('data', 'train.jsonl').read_bytes()
    with pytest.raises(UserError, match='proof.html'): prep([*rows_of(50), *(dict(prompt=f'Count to {n}', completion=' '.join(map(str, range(n)))) for n in (400, 500))], max_length=200)
    assert run.path('data', 'train.jsonl').read_bytes()==before and run.path('reports', 'proof.html').exists()
    assert not [p for p in run.path('data').iterdir() if p.name.startswith('.new')]

def test_markup_in_the_data_is_never_executed_in_the_view(prep):
    rows = [dict(prompt=f'<script>alert({i})</script><img src=x onerror=alert(1)>', completion=f'<b onclick=x>{i}</b>') for i in range(60)]
    run, done = prep(rows)
    for page in (run.path('reports', 'proof.html').read_text(), done.rows._repr_html_(), done._repr_html_(), done.quality._repr_html_()):
        assert '<script>alert' not in page and '<img src=x' not in page and '<b onclick' not in page
