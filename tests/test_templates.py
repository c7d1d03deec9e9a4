"Templates of real models: what is trained is what the model is to say, nothing of it is lost, and no template can harm"
import copy, json, re, subprocess, sys, threading, zipfile
from pathlib import Path
import pytest

from ftnb.base import UserError
from ftnb.chat import assistant_spans, encode, prompt_of
from ftnb.rowfacts import one_bos, think_facts
from ftnb.template import as_read, pin_date, render, set_template, template_hash, try_template
from ftnb.turns import end_of_turn, facts, stops
from test_labels import llama3_words

HERE = Path(__file__).parent
trl = pytest.importorskip('trl')
TRL = {p.stem: p.read_text() for p in sorted((Path(trl.__file__).parent/'chat_templates').glob('*.jinja'))}
with zipfile.ZipFile(HERE/'templates/llama.cpp.zip') as z: CPP = {n[:-6]: z.read(n).decode() for n in sorted(z.namelist()) if n.endswith('.jinja')}
REAL = {**{k:v for k,v in TRL.items() if not k.endswith('_training')}, **CPP}
PAIRS = {k: (v, TRL[f'{k}_training']) for k,v in TRL.items() if f'{k}_training' in TRL}

WORDS = re.compile(r"<[^<>\s'\"{}()=,+]{1,40}>|\[/?[A-Z_]{3,}\]|\[e~\[|\]~!?b\[")
def fit(tokenizer, *templates):
    "The tokenizer of smollm2 with the first template, and the special tokens that any of them writes"
    tok, words = copy.deepcopy(tokenizer), sorted({w for t in templates for w in WORDS.findall(t)})
    tok.add_special_tokens(dict(additional_special_tokens=words))
    first = lambda names, other: next((w for w in names if w in words), other)
    tok.add_special_tokens(dict(bos_token=first(('<|begin_of_text|>', '<｜begin▁of▁sentence｜>', '<bos>', '<s>', '<BOS_TOKEN>', '<|startoftext|>'), '<s>'),
        eos_token=first(('<｜end▁of▁sentence｜>', '<|eot_id|>', '<|im_end|>', '<end_of_turn>', '<|end|>', '</s>', '<|END_OF_TURN_TOKEN|>', '<|endoftext|>'), '</s>')))
    if '<|start_header_id|>' in words: tok.backend_tokenizer.pre_tokenizer = llama3_words()
    tok.chat_template = pin_date(templates[0])
    return tok

def user(c): return dict(role='user', content=c)
def says(c, **k): return dict(role='assistant', content=c, **k)
CALL = [dict(type='function', id='abcdefghi', function=dict(name='look_up', arguments=dict(city='Oslo')))]
TOOLS = [dict(type='function', function=dict(name='look_up', description='Weather', parameters=dict(type='object', properties=dict(city=dict(type='string', description='which')), required=['city'])))]
TALKS = dict(one=dict(messages=[user('What is two and two?'), says('It is four.')]),
    system=dict(messages=[dict(role='system', content='Be kind.'), user('Hello there'), says('Good day to you.')]),
    multi=dict(messages=[user('First question'), says('The first answer.'), user('Second question'), says('Second one, said.'), user('Third question'), says('And a third.')]),
    think=dict(messages=[user('Add one'), says('<think>\nsome thought\n</think>\n\nIt is two.'), user('Add more'), says('<think>\nother thought\n</think>\n\nIt is three.')]),
    tool=dict(messages=[user('Weather in Oslo?'), says('', tool_calls=CALL), dict(role='tool', name='look_up', content='sunny 21', tool_call_id='abcdefghi'), says('It is sunny.')], tools=TOOLS))

def runs(labels):
    "Trained stretches of a row"
    out, open_ = [], False
    for l in labels:
        if l!=-100: out[-1:] = [*out[-1:], [l]] if not open_ else [out[-1]+[l]]
        open_ = l!=-100
    return out

def fault(tok, rec):
    "Why the trained tokens are not the assistant's, or an empty text"
    enc = encode(tok, rec)
    said = [tok.decode(r, clean_up_tokenization_spaces=False) for r in runs(enc.labels)]
    answers = [m for m in rec['messages'] if m['role']=='assistant']
    if len(said)!=len(answers): return f'{len(said)} trained stretches for {len(answers)} answers'
    rest = tok.decode([t for t,l in zip(enc.input_ids, enc.labels) if l==-100], clean_up_tokenization_spaces=False)
    for m,s in zip(answers, said):
        body = m['content'].split('</think>')[-1].strip() or 'look_up'
        if body not in s: return f'{body!r} is not trained, but {s!r}'
        if m['content'] and body in rest: return f'{body!r} stands outside the trained tokens'
        after = s[s.rfind(body)+len(body):]
        if m['content'] and after.strip() and after.strip()!=facts(tok).closed.strip() and not facts(tok).end.fullmatch(after.rstrip()): return f'{after!r} is trained after the answer'
    for m in rec['messages']:
        if m['role'] not in ('assistant', 'system') and any(m['content'] in s for s in said): return f'{m["content"]!r} is trained'
    tagged = re.search(r'\{%-?\s*generation', tok.chat_template)
    head = '' if tagged else facts(tok).header # the model's authors have said themselves what is trained
    for m,s in zip(answers, said):
        before = s[:s.find(m['content'].split('</think>')[-1].strip() or 'look_up')]
        if len(head.strip())>2 and any(before.startswith(head[-k:]) for k in range(3, len(head)+1) if head[-k:].strip()) or head.strip() and head in before: return f'{before!r} of the header is trained'
    prompt, k = tok.decode(prompt_of(tok, rec)[0]), max(i for i,l in enumerate(enc.labels) if l!=-100)+1-len(runs(enc.labels)[-1])
    full, context = tok.decode(enc.input_ids), tok.decode(enc.input_ids[:k])
    if not tagged and full.startswith(prompt):
        if len(context)<len(prompt): return 'a part of the last prompt is trained'
        if (gap := full[len(prompt):len(context)].strip()) and gap!=head.strip(): return f'{gap!r} is for the model to say, and not trained'
    return '' if enc.ends else 'no end of turn is written after the last answer'

UNHANDLED = { # plain conversations; what a template refuses by itself (roles, calls of tools) is printed with its own words
    'glm4moe': 'no end of turn', 'GLM-4.6': 'no end of turn', 'GLM-4.7-Flash': 'no end of turn', 'Apertus-8B-Instruct': 'no end of turn', 'Apriel-1.6-15b-Thinker-fixed': 'no end of turn',
    'tencent-Hy3': 'no end of turn', 'llama-cpp-rwkv-world': 'no end of turn', 'CohereForAI-c4ai-command-r-plus-tool_use': 'NoneType', 'NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use': 'NoneType',
    'NousResearch-Hermes-3-Llama-3.1-8B-tool_use': 'NoneType', 'fireworks-ai-llama-3-firefunction-v2': "'functions' is undefined"}

@pytest.fixture(scope='module')
def outcomes(tokenizer):
    out = {}
    for name,t in REAL.items():
        tok = fit(tokenizer, t)
        for talk,rec in TALKS.items():
            try: out[name, talk] = fault(tok, rec)
            except UserError as e: out[name, talk] = 'refused: '+str(e).replace(tok.name_or_path, 'the model')
    return out

def test_on_real_templates_the_trained_tokens_are_the_assistants(outcomes):
    plain = {n: next((o for t in ('one', 'multi') if (o := outcomes[n, t])), '') for n in REAL}
    bad = {n: o for n,o in plain.items() if o}
    print(f'\n{len(REAL)} templates, {len(REAL)-len(bad)} handled; not handled:', *(f'  {n}: {o}' for n,o in bad.items()), sep='\n')
    assert len(REAL)>=111 and len(REAL)-len(bad)>=100
    assert set(bad)==set(UNHANDLED) and all(UNHANDLED[n] in o for n,o in bad.items())

@pytest.mark.parametrize('talk', ['system', 'think', 'tool'])
def test_what_a_template_can_not_carry_is_refused_never_mislabelled(outcomes, talk):
    mine = {n: outcomes[n, talk] for n in REAL if n not in UNHANDLED}
    print(f'\n{talk}: {sum(not o for o in mine.values())} of {len(mine)} right, refused:', *(f'  {n}: {o}' for n,o in mine.items() if o), sep='\n')
    assert not {n: o for n,o in mine.items() if o and not o.startswith('refused')}
    assert sum(not o for o in mine.values())>={'system': 98, 'think': 100, 'tool': 75}[talk]

def hf_mask(tok, rec):
    h = tok.apply_chat_template(as_read(tok, rec['messages']), tools=rec.get('tools'), tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return h['input_ids'], h['assistant_masks']

@pytest.mark.parametrize('name', PAIRS)
def test_a_template_with_generation_tags_trains_what_hugging_face_masks(tokenizer, name):
    tok = fit(tokenizer, PAIRS[name][1], PAIRS[name][0])
    for talk,rec in TALKS.items():
        try: ids, mask = hf_mask(tok, rec)
        except Exception: # the template refuses
            with pytest.raises(UserError): encode(tok, rec)
            continue
        enc = encode(tok, rec)
        assert enc.input_ids==ids and [int(l!=-100) for l in enc.labels]==mask

HEADS = {'deepseek_r1_distill': '<｜Assistant｜>', 'deepseekv3': '<｜Assistant｜> <｜tool▁outputs▁end｜>', 'gptoss': '<|start|>assistant', 'muse_glimmer': '<|start|>assistant',
    **{f'nemotron_3_{n}': '<think>' for n in ('nano', 'super', 'ultra', '5_lightning')}} # in the prompt of serving, and trained by TRL
OTHER = ('glm4moe', 'qwen3', 'qwen3_5_nothink', 'qwen3_5_think', 'qwen3_6', 'qwen3_8', 'deepseek_r1_distill') # TRL's training version writes another text
def test_without_generation_tags_the_mask_is_that_of_trls_training_template(tokenizer):
    same = spaces = heads = 0
    others = set()
    for name,(own,training) in PAIRS.items():
        tok, tagged = fit(tokenizer, own, training), fit(tokenizer, training, own)
        for talk,rec in TALKS.items():
            try: enc = encode(tok, rec)
            except UserError: continue
            ids, mask = hf_mask(tagged, rec)
            if ids!=enc.input_ids: others.add(name); continue
            mine = [int(l!=-100) for l in enc.labels]
            theirs = tok.decode([t for t,m,n in zip(ids, mask, mine) if m and not n], clean_up_tokenization_spaces=False)
            ours = tok.decode([t for t,m,n in zip(ids, mask, mine) if n and not m], clean_up_tokenization_spaces=False)
            assert not ours or (name, talk, ours)==('diffusion_gemma', 'tool', '<|tool_response>'), (name, talk, ours)
            left = theirs
            for h in HEADS.get(name, '').split(): left = left.replace(h, '')
            assert not left.strip(), (name, talk, theirs)
            same, spaces, heads = same+(not theirs), spaces+bool(theirs and not theirs.strip()), heads+bool(theirs.strip())
    print(f'\n{len(PAIRS)} pairs: {same} conversations equal, {spaces} but for white space after the end of turn (or before the answer), {heads} but for a header that TRL trains and serving gives; another text: {sorted(others)}')
    assert others==set(OTHER) and same+spaces+heads>=110

@pytest.mark.parametrize('name', ['qwen3', 'gptoss', 'llama3_1', 'phi3', 'cohere2', 'mistralai-Mistral-Nemo-Instruct-2407', 'GigaChat3.1-10B-A1.8B'])
def test_a_planted_fault_in_a_mask_is_seen(tokenizer, name, monkeypatch):
    import ftnb.chat as c
    tok, true = fit(tokenizer, REAL[name]), assistant_spans
    assert not fault(tok, TALKS['multi'])
    for move in ((-9, 0), (16, 0), (0, 3), (0, -4)):
        monkeypatch.setattr(c, 'assistant_spans', lambda *a: ((r := true(*a))[0], [(s+move[0], e+move[1]) for s,e in r[1]], [t if move[1]>=0 else '' for t in r[2]]))
        assert fault(tok, TALKS['multi']), move

QWEN = TRL['qwen3']
def trained(tok, rec, **k): return tok.decode([l for l in encode(tok, rec, **k).labels if l!=-100], clean_up_tokenization_spaces=False)
def test_an_empty_thought_that_the_template_adds_is_context_when_asked(tokenizer):
    tok, rec = fit(tokenizer, QWEN), TALKS['one']
    assert trained(tok, rec)=='<think>\n\n</think>\n\nIt is four.<|im_end|>'
    assert trained(tok, rec, think='ignore_empty')=='It is four.<|im_end|>'
    assert tok.decode(encode(tok, rec, think='ignore_empty').input_ids)==tok.decode(encode(tok, rec).input_ids)
    assert think_facts(tok, rec).empty==1 and think_facts(tok, rec, 'ignore_empty').empty==0
    ids = tok.apply_chat_template(rec['messages'][:1], add_generation_prompt=True, enable_thinking=False)
    ids = ids if isinstance(ids, list) else ids['input_ids']
    assert [t for t,l in zip(encode(tok, rec, think='ignore_empty').input_ids, encode(tok, rec, think='ignore_empty').labels) if l==-100][:len(ids)]==ids

def test_thoughts_are_kept_or_stripped_in_words(tokenizer):
    tok, rec = fit(tokenizer, CPP['Qwen-Qwen2.5-7B-Instruct']), TALKS['think']
    assert trained(tok, rec)=='<think>\nsome thought\n</think>\n\nIt is two.<|im_end|><think>\nother thought\n</think>\n\nIt is three.<|im_end|>'
    assert trained(tok, rec, think='strip')=='It is two.<|im_end|>It is three.<|im_end|>'
    assert trained(tok, rec, think='ignore_empty')==trained(tok, rec)
    assert 'thought' not in tok.decode(encode(tok, rec, think='strip').input_ids)

def test_thoughts_that_a_template_drops_are_counted(tokenizer):
    f = think_facts(fit(tokenizer, QWEN), TALKS['think'])
    assert (f.brought, f.dropped, f.empty)==(2, 1, 0) and f.hybrid
    assert think_facts(fit(tokenizer, TRL['deepseekv3']), TALKS['think']).dropped==2
    assert think_facts(fit(tokenizer, TRL['qwen2_5']), TALKS['think']).dropped==0

def test_reasoning_in_a_field_of_its_own_is_trained_where_the_template_writes_it(tokenizer):
    tok = fit(tokenizer, QWEN)
    rec = dict(messages=[user('Add one'), says('It is two.', reasoning_content='one and one')])
    assert trained(tok, rec)=='<think>\none and one\n</think>\n\nIt is two.<|im_end|>'
    assert think_facts(tok, rec).brought==1 and trained(tok, rec, think='strip')=='<think>\n\n</think>\n\nIt is two.<|im_end|>'

FAKE = '''
import datetime as d, sys, json
class Then(d.datetime):
    @classmethod
    def now(cls, tz=None): return cls.fromisoformat(sys.argv[1])
d.datetime = Then
from jinja2.sandbox import ImmutableSandboxedEnvironment
def refuse(m): raise ValueError(m)
env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
env.globals.update(strftime_now=lambda f: Then.now().strftime(f), raise_exception=refuse)
env.filters['tojson'] = lambda x, **k: json.dumps(x)
job = json.load(sys.stdin)
print(env.from_string(job['t']).render(messages=[dict(role='user', content='a')], add_generation_prompt=True, bos_token='<s>', eos_token='</s>', **job['kw']))
'''
def on_day(template, day, **kw):
    p = subprocess.run([sys.executable, '-c', FAKE, day], input=json.dumps(dict(t=template, kw=kw)), capture_output=True, text=True)
    assert p.returncode==0, p.stderr[-300:]
    return p.stdout

@pytest.mark.parametrize('name', ['meta-llama-Llama-3.1-8B-Instruct', 'meta-llama-Llama-3.2-3B-Instruct', 'openai-gpt-oss-120b', 'Mistral-Small-3.2-24B-Instruct-2506', 'ibm-granite-granite-3.3-2B-Instruct'])
def test_a_pinned_template_gives_one_text_on_any_day_in_any_server(name):
    t = CPP[name]
    if 'strftime_now' in t: assert on_day(t, '2025-01-02')!=on_day(t, '2026-11-25'), 'the test would not see a date that moves'
    p = pin_date(t, '2026-03-04')
    assert on_day(p, '2025-01-02')==on_day(p, '2026-11-25')==on_day(p, '2026-11-25', date_string='25 Nov 2026')
    assert re.search('04 Mar 2026|2026-03-04|March 04, 2026', on_day(p, '2025-01-02')) and 'strftime_now(' not in p

def test_without_a_day_llama_says_26_july_2024_and_another_day_another_hash(tokenizer):
    tok = copy.deepcopy(tokenizer)
    tok.chat_template = CPP['meta-llama-Llama-3.2-3B-Instruct']
    a = template_hash(set_template(tok))
    assert 'Today Date: 26 Jul 2024' in render(tok, TALKS['one']['messages'])
    assert template_hash(set_template(tok, template_date='2026-01-01'))==a # a date once pinned, as in a saved run, stays
    tok.chat_template = CPP['meta-llama-Llama-3.2-3B-Instruct']
    assert template_hash(set_template(tok, template_date='2026-01-01'))!=a
    with pytest.raises(UserError, match='write one such as 2024-07-26'): set_template(tok, template_date='26.7.2024')

def test_there_is_one_bos_where_the_model_has_one(tokenizer):
    from tokenizers.processors import TemplateProcessing
    tok = fit(tokenizer, CPP['meta-llama-Llama-3.1-8B-Instruct'])
    b = tok.bos_token
    tok.backend_tokenizer.post_processor = TemplateProcessing(single=f'{b} $A', special_tokens=[(b, tok.bos_token_id)])
    n = one_bos(tok, TALKS['one'])
    assert (n.row, n.prompt, n.twice, n.added, n.ok)==(1, 1, 2, True, True)
    assert one_bos(tok, dict(text='some text')).row==1
    tok.chat_template = b+tok.chat_template.replace('{{- bos_token }}', b)
    assert one_bos(tok, TALKS['one']).row==2 and not one_bos(tok, TALKS['one']).ok
    tok.chat_template = tok.chat_template.replace(b, '')
    assert one_bos(tok, TALKS['one']).row==0 and not one_bos(tok, TALKS['one']).ok

@pytest.mark.parametrize('built', ['chatml', 'generic', 'llama3', 'mistral'])
def test_a_base_model_with_a_bos_gets_one_from_the_template_that_is_named(tokenizer, built):
    from tokenizers.processors import TemplateProcessing
    tok = copy.deepcopy(tokenizer)
    tok.add_special_tokens(dict(bos_token='<s>', eos_token='</s>', additional_special_tokens=['<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>', '[INST]', '[/INST]']))
    tok.backend_tokenizer.post_processor = TemplateProcessing(single='<s> $A', special_tokens=[('<s>', tok.bos_token_id)])
    assert one_bos(set_template(tok, built), TALKS['one']).ok

@pytest.mark.parametrize('name, end', [('gemma', ['<end_of_turn>']), ('qwen3', ['<|im_end|>']), ('llama3_1', ['<|eot_id|>']), ('gptoss', ['<|return|>']), ('deepseekv3', ['<｜end▁of▁sentence｜>']),
    ('cohere2', ['<|END_RESPONSE|>', '<|END_OF_TURN_TOKEN|>']), ('mistralai-Mistral-Nemo-Instruct-2407', ['</s>']), ('GLM-4.6', [])])
def test_the_end_of_turn_is_found_by_rendering(tokenizer, name, end):
    tok = fit(tokenizer, REAL[name])
    assert end_of_turn(tok)==end
    ids = tok.convert_tokens_to_ids(end)
    assert stops(tok, ids[-1:]) is bool(end) and not stops(tok, None) and not stops(tok, [5])

def test_a_model_whose_eos_is_not_the_end_of_turn_is_seen(tokenizer):
    tok = fit(tokenizer, REAL['gemma'])
    tok.add_special_tokens(dict(eos_token='<eos>'))
    assert not stops(tok, tok.eos_token_id) and stops(tok, [tok.eos_token_id, tok.convert_tokens_to_ids('<end_of_turn>')])

LOOPS = ["{% for i in range(10**9) %}x{% endfor %}", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 10**(10**9) }}", "{{ 'a'*10**11 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"]
@pytest.mark.parametrize('loop', LOOPS)
@pytest.mark.parametrize('where', ['main', 'thread'])
def test_a_template_that_loops_or_eats_memory_is_stopped(tokenizer, loop, where):
    tok, got = copy.deepcopy(tokenizer), []
    tok.chat_template = loop
    def go():
        try:
            try_template(loop, seconds=2)
            render(tok, TALKS['one']['messages']) # what ends by itself in the trial ends here, with the sandbox's own words
        except UserError as e: got.append(str(e))
    if where=='main': go()
    else:
        t = threading.Thread(target=go)
        t.start()
        t.join(30)
    assert got and '\n' not in got[0] and re.search('stopped|refuses', got[0])

@pytest.mark.parametrize('attack', ["{{ ''.__class__.__mro__ }}", "{{ messages.__class__.__base__.__subclasses__() }}", "{{ raise_exception.__globals__ }}", "{% set x = messages.append(1) %}", "{{ cycler.__init__.__globals__.os.popen('id').read() }}"])
def test_a_template_can_not_reach_python(tokenizer, attack):
    tok = copy.deepcopy(tokenizer)
    tok.chat_template = attack
    try: assert not render(tok, TALKS['one']['messages']) # Jinja prints what it denies as nothing
    except UserError as e: assert 'refuses' in str(e)

def test_a_template_that_refuses_a_system_message_says_what_to_do(tokenizer):
    with pytest.raises(UserError, match='System role not supported; move the text'): encode(fit(tokenizer, REAL['gemma']), TALKS['system'])

def test_arguments_of_calls_may_be_text_or_objects(tokenizer):
    as_text = copy.deepcopy(TALKS['tool'])
    as_text['messages'][1]['tool_calls'][0]['function']['arguments'] = '{"city": "Oslo"}'
    for name in ('qwen2_5', 'deepseekv3', 'mistralai-Mistral-Nemo-Instruct-2407'):
        tok = fit(tokenizer, REAL[name])
        assert encode(tok, as_text)==encode(tok, TALKS['tool'])

def test_thousands_of_turns_take_seconds(tokenizer):
    import time
    ms = [m for i in range(5000) for m in (user(f'number {i}?'), says(f'{i} it is.'))]
    t = time.process_time()
    enc = encode(tokenizer, dict(messages=ms))
    assert time.process_time()-t<20 and len(runs(enc.labels))==5000

@pytest.mark.parametrize('name', ['qwen3', 'gptoss', 'llama3_1', 'gemma3', 'phi3', 'cohere2', 'GLM-4.6', 'mistralai-Mistral-Nemo-Instruct-2407', 'muse_glimmer'])
@pytest.mark.parametrize('talk', ['one', 'multi'])
def test_training_sees_the_prompt_that_serving_gives(tokenizer, name, talk):
    tok = fit(tokenizer, REAL[name])
    ids, _ = prompt_of(tok, TALKS[talk])
    enc = encode(tok, TALKS[talk])
    assert enc.input_ids[:len(ids)]==ids and enc.labels[len(ids)]!=-100 and enc.labels[len(ids)-1]==-100
