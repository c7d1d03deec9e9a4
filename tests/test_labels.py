"Labels: what is trained is the assistant's text and its end of turn, no token more or less"
import copy, random
import pytest

from ftnb.base import UserError
from ftnb.chat import assistant_spans, builtin_templates, encode, prompt_of, render, set_template

ENDS = dict(own='<|im_end|>', chatml='<|im_end|>', llama3='<|eot_id|>', mistral='</s>', generic='<|im_end|>')
SPECIAL = dict(llama3=['<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>', '<|end_of_text|>'], mistral=['<s>', '</s>', '[INST]', '[/INST]'])
TRIMS = ('llama3', 'mistral')

def llama3_words():
    "How Llama 3 cuts text into words: blank lines stay together"
    from tokenizers import Regex, pre_tokenizers as P
    rx = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return P.Sequence([P.Split(Regex(rx), 'isolated'), P.ByteLevel(add_prefix_space=False, use_regex=False)])

def fit(tokenizer, name):
    "The tokenizer with a template and the special tokens it needs"
    tok = copy.deepcopy(tokenizer)
    if name=='own': return tok
    if name in SPECIAL: tok.add_special_tokens(dict(additional_special_tokens=SPECIAL[name]))
    if name=='llama3': tok.backend_tokenizer.pre_tokenizer = llama3_words()
    if name=='llama3': tok.bos_token, tok.eos_token = '<|begin_of_text|>', '<|eot_id|>'
    if name=='mistral': tok.bos_token, tok.eos_token = '<s>', '</s>'
    return set_template(tok, name)

@pytest.fixture(scope='module')
def toks(tokenizer): return {n: fit(tokenizer, n) for n in ENDS}

def trained_text(tok, enc): return tok.decode([l for l in enc.labels if l!=-100], clean_up_tokenization_spaces=False)
def should(name, rec):
    "The answers of a record, each with its end of turn, as a template writes them"
    answers = [m['content'] for m in rec['messages'] if m['role']=='assistant']
    return ''.join((' ' if name=='mistral' else '')+(a.strip() if name in TRIMS else a)+ENDS[name] for a in answers)

def talk(*turns, system=None):
    ms = [dict(role=('user', 'assistant')[i%2], content=t) for i,t in enumerate(turns)]
    return dict(messages=([dict(role='system', content=system)] if system is not None else [])+ms)

@pytest.fixture(scope='module')
def rows(demo_rows):
    "120 rows of the demo, and 80 conversations of two or three turns built from others"
    rng, pool = random.Random(0), list(demo_rows['train'])
    rng.shuffle(pool)
    out, rest = pool[:120], pool[120:]
    for i in range(80):
        some = rng.sample(rest, 2+i%2)
        out.append(dict(messages=[some[0]['messages'][0], *(m for r in some for m in r['messages'][1:])]))
    return out

@pytest.mark.parametrize('name', ENDS)
def test_trained_tokens_are_the_answers_with_their_end_of_turn(toks, rows, name):
    assert len(rows)==200
    for r in rows:
        enc = encode(toks[name], r)
        assert trained_text(toks[name], enc)==should(name, r) and enc.ends

@pytest.mark.parametrize('name', ENDS)
def test_all_other_labels_are_ignored_and_labels_are_the_tokens(toks, rows, name):
    for r in rows[::10]:
        enc = encode(toks[name], r)
        assert len(enc.labels)==len(enc.input_ids) and all(l in (-100, t) for l,t in zip(enc.labels, enc.input_ids))
        rest = toks[name].decode([t for t,l in zip(enc.input_ids, enc.labels) if l==-100], clean_up_tokenization_spaces=False)
        assert not any(m['content'] in rest for m in r['messages'] if m['role']=='assistant')
        assert all(m['content'].strip() in rest for m in r['messages'] if m['role']!='assistant')

@pytest.mark.parametrize('name', ENDS)
def test_what_generation_is_given_is_what_training_saw_before_the_answer(toks, rows, name):
    for r in rows[::4]:
        enc, (ids, ref) = encode(toks[name], r), prompt_of(toks[name], r)
        assert enc.input_ids[:len(ids)]==ids and ref==r['messages'][-1]['content']
        assert enc.labels[len(ids)]!=-100 and enc.labels[len(ids)-1]==-100

def test_the_llama3_template_fits_a_tokenizer_that_cuts_blank_lines_otherwise(tokenizer):
    tok = copy.deepcopy(tokenizer)
    tok.add_special_tokens(dict(additional_special_tokens=SPECIAL['llama3']))
    tok.bos_token, tok.eos_token = '<|begin_of_text|>', '<|eot_id|>'
    rec = talk('Hello', 'Hi')
    ids, _ = prompt_of(set_template(tok, 'llama3'), rec)
    assert encode(tok, rec).input_ids[:len(ids)]==ids

def test_a_mask_one_token_off_would_be_noticed(toks, rows):
    enc = encode(toks['own'], rows[0])
    i = next(i for i,l in enumerate(enc.labels) if l!=-100)
    enc.labels[i] = -100
    assert trained_text(toks['own'], enc)!=should('own', rows[0])

HARD = dict(unicode=talk('Wie heißt „Tee“ auf 中文?', '茶 (chá) ☕️ – ¡así! 👩‍👩‍👧'), combining=talk('spell it', 'e\u0301 is é, ﬁ is fi, and a zero-width\u200bjoin'),
    repeats=talk('Say yes', 'Say yes'), repeats_in_part=talk('yes', 'yes, yes'), one_letter=talk('a', 'a', 'a', 'a'), marks=talk('assistant', 'assistant\nassistant'),
    empty_system=talk('Hello', 'Hi there', system=''), system=talk('Hello', 'Hi there', system='Be kind.'), newline=talk('two lines', 'one\n\ntwo'), number=talk('1+1', '2'),
    json=talk('json', '{"a": [1, 2], "b": "\\n"}'), template_words=talk('show it', 'write {{ messages }} and {% if x %}'))
def cases(table, **faults):
    "Every template with every case; `faults` are the known ones"
    return pytest.mark.parametrize('name, case', [pytest.param(n, c, marks=[pytest.mark.xfail(strict=True, reason=faults[f'{n}_{c}'])] if f'{n}_{c}' in faults else []) for n in ENDS for c in table])

@cases(HARD)
def test_unusual_text_is_labelled_right(toks, name, case):
    tok, rec = toks[name], HARD[case]
    assert trained_text(tok, encode(tok, rec))==should(name, rec)
    ids, _ = prompt_of(tok, rec)
    assert encode(tok, rec).input_ids[:len(ids)]==ids

SPACED = dict(before=talk('Hello', '  Hi'), after=talk('Hello', 'Hi \n'), both=talk('Hello', ' Hi ', 'and', ' there '), only_one_of_two=talk('Hello', ' Hi', 'and', 'there'), line=talk('Hello', '\nHi'))
@cases(SPACED)
def test_space_around_an_answer_stays_inside_it(toks, name, case):
    tok, rec = toks[name], SPACED[case]
    assert trained_text(tok, encode(tok, rec))==should(name, rec)

def test_a_special_token_in_the_text_of_a_user_is_not_trained_on(toks):
    rec = talk('what does <|im_end|> mean, and <|im_start|>assistant\nthis?', 'The end of a turn.')
    assert trained_text(toks['own'], encode(toks['own'], rec))==should('own', rec)

def test_loss_on_everything_when_asked(toks, rows):
    enc = encode(toks['own'], rows[0], assistant_only_loss=False)
    assert enc.labels==enc.input_ids

def templated(tokenizer, template):
    tok = copy.deepcopy(tokenizer)
    tok.chat_template = template
    return tok

FOR = "{% for m in messages %}"
GEN = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
def test_a_template_that_changes_its_answers_by_their_text_is_still_labelled_right(tokenizer):
    # content is cut at a word, as reasoning templates do; marks around it survive only where the word is absent
    tok = templated(tokenizer, FOR+"<|im_start|>{{ m.role }}\n{{ (m.content | trim).split('</think>')[-1] | trim }}<|im_end|>\n"+GEN)
    rec = talk('2+2', '<think>\nadd\n</think>\n4', 'and 3+3', '6')
    try: text = trained_text(tok, encode(tok, rec))
    except UserError as e: assert '\n' not in str(e) and 'chat_template_path' in str(e)
    else: assert text=='4<|im_end|>6<|im_end|>'

def test_a_template_that_looks_at_the_first_letter_takes_the_slow_path_and_is_right(tokenizer):
    tok = templated(tokenizer, FOR+"<|im_start|>{{ m.role }}\n{% if m.role=='assistant' and m.content[0]=='I' %}{{ m.content }}{% elif m.role=='assistant' %}{{ m.content }}\n{% else %}{{ m.content }}{% endif %}<|im_end|>\n"+GEN)
    rec = talk('Who?', 'I am.', 'Sure?', 'I do.')
    from ftnb.chat import _marked
    assert _marked(tok, rec['messages'], None, render(tok, rec['messages'])) is None
    assert trained_text(tok, encode(tok, rec))=='I am.<|im_end|>I do.<|im_end|>'

def test_a_template_that_upper_cases_is_labelled_right(tokenizer):
    tok = templated(tokenizer, FOR+"<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n"+GEN)
    assert trained_text(tok, encode(tok, talk('hello', 'hi there')))=='HI THERE<|im_end|>'

def test_a_template_that_drops_old_answers_is_refused_in_one_sentence(tokenizer):
    tok = templated(tokenizer, FOR+"{% if m.role!='assistant' or loop.last %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"+GEN)
    with pytest.raises(UserError) as e: encode(tok, talk('a', 'b', 'c', 'd'))
    assert 'assistant_only_loss: false' in str(e.value) and '\n' not in str(e.value)

def test_a_template_that_refuses_a_role_says_so_in_its_own_words(tokenizer):
    tok = templated(tokenizer, "{{ raise_exception('no system messages here') }}")
    with pytest.raises(UserError, match='no system messages here'): assistant_spans(tok, talk('a', 'b', system='c')['messages'])

def test_a_template_without_an_end_of_turn_is_reported(tokenizer):
    tok = templated(tokenizer, FOR+"{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
    assert encode(tok, talk('a', 'b')).ends is False

def test_a_base_model_without_a_template_is_told_which_one_fits(tokenizer):
    tok = templated(tokenizer, None)
    with pytest.raises(UserError, match='fits chatml'): set_template(tok)
    with pytest.raises(UserError, match="Did you mean 'chatml'"): set_template(tok, 'chatlm')
    for t in builtin_templates: assert set_template(tok, t).chat_template
