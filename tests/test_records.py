"Every usual file is recognised, brought to one form, and read without filling memory; what is wrong is one sentence with its line"
import json, random, re, time, tracemalloc
import pytest

from conftest import write_rows
from ftnb.base import UserError
from ftnb.markers import find_markers, split_markers
from ftnb.messages import strip_nulls
from ftnb.readers import max_line
from ftnb.records import RowFault, Shape, apply_mapping, normalise, recognise, shape_of
from ftnb.sources import Source, find_sources, read_rows

S, Q, A, B = (dict(role=r, content=t) for r,t in (('system', 'Be kind.'), ('user', 'Why?'), ('assistant', 'Because.'), ('assistant', 'No.')))
def gpt(**turns): return [{'from': k, 'value': v} for k,v in turns.items()]
def tell(*ms): return dict(messages=list(ms))
def form(row, method='sft'): return normalise(row, recognise([row], 'a.jsonl', method).name)
def fault(row, method='sft'):
    with pytest.raises(RowFault) as e: normalise(row, shape_of(row))
    return str(e.value)
def read(path, **kw): return list(read_rows(Source(str(path), **kw)))
def refused(f, *has):
    with pytest.raises(UserError) as e: f()
    text = str(e.value)
    assert '\n' not in text and not [h for h in has if h not in text], text
    return text

# shapes

SFT = dict(
    messages=tell(S, Q, A),
    a_list_under_conversations=dict(conversations=[S, Q, A]),
    sharegpt=dict(conversations=gpt(system='Be kind.', human='Why?', gpt='Because.')),
    sharegpt_with_a_system_column=dict(system='Be kind.', conversations=gpt(human='Why?', gpt='Because.')),
    alpaca=dict(system='Be kind.', instruction='Why?', input='', output='Because.'),
    prompt_and_completion=dict(system='Be kind.', prompt='Why?', completion='Because.'),
    prompt_and_completion_as_lists=dict(prompt=[S, Q], completion=[A]),
    question_and_answer=dict(system_prompt='Be kind.', Question='Why?', Answer='Because.'),
    json_in_a_csv_cell=dict(messages=json.dumps([S, Q, A])),
    a_python_list_in_a_csv_cell=dict(messages=str([S, Q, A])),
    text_parts=tell(S, dict(role='user', content=[dict(type='text', text='Why'), dict(type='text', text='?')]), A))

@pytest.mark.parametrize('name', SFT)
def test_every_way_to_write_a_conversation_becomes_the_same_messages(name): assert form(SFT[name])==tell(S, Q, A)

PAIRS = dict(
    explicit=dict(prompt='Why?', chosen='Because.', rejected='No.'),
    explicit_as_lists=dict(prompt=[Q], chosen=[A], rejected=[B]),
    implicit=dict(chosen=[Q, A], rejected=[Q, B]),
    prompt_and_whole_dialogues=dict(prompt='Why?', prompt_id='7', chosen=[Q, A], rejected=[Q, B], messages=[Q, A], score_chosen=8.),
    openai=dict(input=dict(messages=[Q], tools=[]), preferred_output=[A], non_preferred_output=[B]),
    llama_factory=dict(conversations=gpt(human='Why?'), chosen={'from': 'gpt', 'value': 'Because.'}, rejected={'from': 'gpt', 'value': 'No.'}),
    llama_factory_alpaca=dict(instruction='Why?', input='', chosen='Because.', rejected='No.'),
    question_column=dict(question='Why?', chosen='Because.', rejected='No.'),
    marked_text=dict(chosen='\n\nHuman: Why?\n\nAssistant: Because.', rejected='\n\nHuman: Why?\n\nAssistant: No.'))

@pytest.mark.parametrize('name', PAIRS)
@pytest.mark.parametrize('method', ['dpo', 'orpo'])
def test_every_way_to_write_a_preference_becomes_the_same_pair(name, method): assert form(PAIRS[name], method)==dict(prompt=[Q], chosen=[A], rejected=[B])

KTO = dict(
    trl=dict(prompt='Why?', completion='No.', label=False),
    trl_as_lists=dict(prompt=[Q], completion=[B], label=False),
    csv=dict(prompt='Why?', completion='No.', label='False'),
    llama_factory=dict(messages=[Q, B], kto_tag=False),
    llama_factory_sharegpt=dict(conversations=gpt(human='Why?', gpt='No.'), kto_tag=False),
    llama_factory_alpaca=dict(instruction='Why?', input='', output='No.', kto_tag=False))

@pytest.mark.parametrize('name', KTO)
def test_every_way_to_write_a_labelled_answer_becomes_the_same_row(name): assert form(KTO[name], 'kto')==dict(prompt=[Q], completion=[B], label=False)

def test_history_becomes_earlier_turns_and_input_joins_the_question():
    ms = form(dict(instruction='And', input='3+4', output='7', history=[['1+1', '2']]))['messages']
    assert [m['content'] for m in ms]==['1+1', '2', 'And\n\n3+4', '7']
    assert form(dict(instruction='Who?', context='Ada wrote it.', response='Ada'))['messages'][0]['content']=='Who?\n\nAda wrote it.'

def test_an_implicit_pair_of_several_turns_parts_where_the_answers_do():
    more = dict(role='user', content='Sure?')
    assert form(dict(chosen=[S, Q, A, more, A], rejected=[S, Q, A, more, B]), 'dpo')==dict(prompt=[S, Q, A, more], chosen=[A], rejected=[B])

def test_an_mlx_folder_brings_its_splits(tmp_path):
    for s,row in (('train', tell(Q, A)), ('valid', dict(prompt='Why?', completion='Because.')), ('test', dict(text='Prose.'))): write_rows(tmp_path/f'{s}.jsonl', [row])
    got = {s.split: [form(r.row) for r in read_rows(s)] for s in find_sources(str(tmp_path))}
    assert got==dict(train=[tell(Q, A)], valid=[tell(Q, A)], test=[dict(text='Prose.')])

def test_csv_and_parquet_are_read_through_a_mapping(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    (tmp_path/'a.csv').write_text('frage,antwort\r\nWhy?,Because.\r\n')
    pq.write_table(pa.table(dict(frage=['Why?'], antwort=['Because.'])), tmp_path/'a.parquet')
    for p in ('a.csv', 'a.parquet'):
        row = apply_mapping(read(tmp_path/p)[0].row, dict(prompt='frage', completion='antwort'))
        assert form(row)==tell(Q, A)
    row = apply_mapping(dict(q='Why?', good='Because.', bad='No.'), dict(prompt='q', chosen='good', rejected='bad'))
    assert form(row, 'dpo')==dict(prompt=[Q], chosen=[A], rejected=[B])

# tools

TOOL = dict(type='function', function=dict(name='look', description='Look', parameters=dict(type='object', properties=dict(at=dict(type='string'), near=dict(type=['string', 'null']), zoom=dict(type='integer')), required=['at'])))
def call(args, **kw): return dict(role='assistant', content='', tool_calls=[dict(type='function', function=dict(name='look', arguments=args), **kw)])
RESULT = dict(role='tool', content='blue')

def test_sharegpt_calls_and_tools_as_json_text_become_tool_calls():
    row = dict(tools=json.dumps([TOOL['function']]), conversations=gpt(human='Why?', function_call='{"name": "look", "arguments": {"at": "sky"}}', observation='blue', gpt='Because.'))
    assert form(row)==dict(messages=[Q, call(dict(at='sky')), RESULT, A], tools=[TOOL])

def test_openai_calls_keep_their_ids_and_get_arguments_as_an_object():
    said = dict(role='assistant', content=None, tool_calls=[dict(id='c1', type='function', function=dict(name='look', arguments='{"at": "sky"}'))])
    got = form(dict(messages=[Q, said, dict(RESULT, tool_call_id='c1'), A], tools=[json.dumps(TOOL)]))
    assert got==dict(messages=[Q, call(dict(at='sky'), id='c1'), dict(RESULT, tool_call_id='c1'), A], tools=[TOOL])

def test_the_tools_of_an_openai_preference_file_are_kept():
    assert form(dict(input=dict(messages=[Q], tools=[TOOL]), preferred_output=[A], non_preferred_output=[B]), 'dpo')['tools']==[TOOL]

def test_nulls_that_arrow_filled_in_are_gone_and_meant_ones_stay(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    rows = [dict(messages=[Q, call(dict(at='sky', zoom=None)), RESULT, A], tools=[TOOL]), dict(messages=[Q, A], tools=None)]
    flat = [dict(TOOL, function=dict(TOOL['function'], parameters=json.dumps(TOOL['function']['parameters'])))]
    pq.write_table(pa.Table.from_pylist([dict(rows[0], tools=flat), rows[1]]), tmp_path/'a.parquet')
    raw = [r.row for r in read(tmp_path/'a.parquet')]
    assert raw[0]['messages'][0]['tool_calls'] is None # the fault is there: every message got the keys of all
    got = [normalise(r, 'messages') for r in raw]
    assert got[1]==tell(Q, A) and got[0]['messages']==[Q, call(dict(at='sky')), RESULT, A]
    args = dict(at=None, near=None, zoom=None)
    assert form(dict(messages=[Q, call(args), RESULT, A], tools=[TOOL]))['messages'][1]==call(dict(at=None, near=None)) # required, and may be null
    assert form(tell(Q, call(json.dumps(args)), RESULT, A))['messages'][1]==call(args) # JSON text is kept whole
    assert strip_nulls(dict(a=[dict(b=None, c=[None, 1])]))==dict(a=[dict(c=[None, 1])])

def test_thoughts_of_the_assistant_are_kept_beside_the_answer():
    assert form(tell(Q, dict(A, reasoning_content='Hm.', tool_calls=None)))==tell(Q, dict(A, reasoning_content='Hm.'))

# recognising

def test_what_a_file_was_taken_for_shows_confidence_and_reason():
    s = recognise([tell(Q, A)]*4, 'a.jsonl')
    assert repr(s)=='took it for messages, 100 % sure, because it has a list of messages with role and content' and s.confidence==1 and not s.offer
    assert '&lt;b&gt;' in Shape('text', 1., [], '<b>')._repr_html_()

@pytest.mark.parametrize('row, told', [
    (dict(instruction='a', output='b', text='c'), 'could also be read as text'), (dict(question='a', prompt='b', answer='c'), 'question could be meant as well'),
    (dict(question='a', context='b', answer='c'), 'context is not used'), (dict(text='Good film', label=1), 'label is not used'),
    (dict(prompt='### Instruction:\na\n\n### Response:\n', completion='b'), 'inside the model\'s own template'), (tell(dict(role='boss', content='a'), A), 'unknown role')])
def test_doubt_lowers_the_confidence_and_is_told(row, told):
    s = recognise([row]*4, 'a.jsonl')
    assert s.confidence<.85 and told in s.reason, s

def test_a_mixed_file_lowers_the_confidence_and_names_the_other_shape():
    s = recognise([tell(Q, A)]*3+[dict(prompt='a', completion='b')], 'a.jsonl')
    assert s.name=='messages' and s.share==.75 and s.confidence<=.75 and '1 of 4 rows are prompt_completion' in s.reason

def test_a_method_refuses_the_shapes_it_does_not_train_on():
    for row in PAIRS.values():
        text = refused(lambda: recognise([row], 'a.jsonl'), 'a.jsonl', 'which method: sft does not train on', 'set method: dpo')
        m = {k.strip(): v.strip() for k,v in (o.split(':') for o in re.search(r'mapping: \{(.*)\}', text)[1].split(','))}
        assert form(apply_mapping(row, m))==tell(Q, A), m # the way out that is named works as written
    for row in KTO.values():
        text = refused(lambda: recognise([row], 'a.jsonl'), 'label', 'set method: kto')
        m = {k.strip(): v.strip() for k,v in (o.split(':') for o in re.search(r'mapping: \{(.*)\}', text)[1].split(','))}
        assert form(apply_mapping(row, m))==tell(Q, B), m
    refused(lambda: recognise([tell(Q, A)], 'a.jsonl', 'dpo'), 'holds messages', 'preference pairs', 'set method: sft')
    refused(lambda: recognise([tell(Q, A)], 'a.jsonl', 'kto'), 'holds messages', 'labelled answers', 'set method: sft')
    refused(lambda: recognise([KTO['trl']], 'a.jsonl', 'dpo'), 'holds kto', 'set method: kto')
    assert 'two answers, one wanted and one not' in recognise([PAIRS['explicit']], 'a.jsonl', 'kto').reason

def test_labelled_answers_that_could_be_paired_are_offered_as_pairs():
    rows = [dict(prompt=f'{i//2}?', completion=f'{i}', label=i%2==0) for i in range(8)]+[dict(prompt='alone', completion='x', label=True)]
    refused(lambda: recognise(rows, 'a.jsonl', 'orpo'), 'holds kto', 'preference pairs', '4 of 5 prompts', 'ftnb.pairs.pair_file')

def test_unknown_columns_name_the_line_to_write_for_the_method():
    row = dict(frage='a', gut='b', schlecht='c')
    refused(lambda: recognise([row], 'a.csv'), "'frage'", 'mapping: {prompt: frage, completion: gut}')
    refused(lambda: recognise([row], 'a.csv', 'dpo'), 'mapping: {prompt: frage, chosen: gut, rejected: schlecht}')
    refused(lambda: recognise([row], 'a.csv', 'kto'), 'label: schlecht')

# flat text with role markers

MARKED = {
    '### Human:': '### Human: Why?### Assistant: Because.', '### Instruction:': 'Below is an instruction that describes a task.\n\n### Instruction:\nWhy?\n\n### Response:\nBecause.</s>',
    '[INST]': '<s>[INST] Why? [/INST] Because. </s>', '<|im_start|>': '<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n',
    '<|start_header_id|>': '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nBecause.<|eot_id|>',
    '<start_of_turn>': '<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\nBecause.<end_of_turn>\n', '<|user|>': '<|user|>\nWhy?<|end|>\n<|assistant|>\nBecause.<|end|>\n',
    '<|prompter|>': '<|prompter|>Why?<|endoftext|><|assistant|>Because.<|endoftext|>', 'USER: ASSISTANT:': 'USER: Why? ASSISTANT: Because.</s>', 'Human: Assistant:': '\n\nHuman: Why?\n\nAssistant: Because.',
    'User: Assistant:': 'User: Why?\r\nAssistant: Because.\r\n', 'Instruction: Response:': 'Instruction: Why?\nResponse: Because.', 'Question: Answer:': 'Question: Why?\nAnswer: Because.', 'Q: A:': 'Q: Why?\nA: Because.'}

@pytest.mark.parametrize('style', MARKED)
def test_text_with_role_markers_is_offered_as_messages_and_becomes_them(style):
    rows = [dict(body=MARKED[style])]*4
    s = recognise([dict(text=r['body']) for r in rows], 'a.jsonl')
    assert s.name=='text' and s.offer.startswith('text with role markers: set mapping: {messages: text}') and s.confidence<=.5 and style in s.reason
    assert form(apply_mapping(rows[0], dict(messages='body')))==tell(Q, A)

def test_system_text_and_several_turns_survive_the_markers():
    text = '<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nWhy? [/INST] Because. </s><s>[INST] Why? [/INST] No. </s>'
    assert split_markers(text)==[S, Q, A, Q, B]
    assert split_markers('<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>')==[S, Q, B]

PROSE = ['The system has two users: Ann and Bo.\nUser: a person who logs in.\nAssistant: a person who helps.', 'Note: it rained.\nAnswer: nobody came.', 'Q: is a letter.', 'See section ### 3: results.',
    'He said: "Human: all too human." Assistant: the role she had.', 'Ingredients:\nQ: none\nA: flour\nB: eggs', '# Response:\n\nThe response was warm.', 'Human: the word.\nHuman: the being.\nAssistant: the help.']
@pytest.mark.parametrize('text', PROSE)
def test_prose_with_colons_stays_prose(text):
    s = recognise([dict(text=text)]*10, 'a.jsonl')
    assert not s.offer and s.confidence==1 and split_markers(text) is None

def test_a_few_interviews_among_prose_are_no_conversations():
    for style in ('Q: A:', 'User: Assistant:', 'Question: Answer:'): assert find_markers([MARKED[style]]*3+['Some prose.']*7)==('', 0.)
    assert find_markers([MARKED['Q: A:']]*2)==('', 0.)

def test_a_text_whose_markers_are_not_regular_is_set_aside():
    assert 'text without regular role markers' in fault(dict(messages='### Human: Why?### Human: Why?### Assistant: No.'))
    assert 'text without regular role markers' in fault(dict(messages='Only prose.'))

# rows that can't be used

@pytest.mark.parametrize('row, why', [
    (tell(), 'no messages'), (tell(None, A), 'message 1 is null, not an object'), (tell(dict(role='user'), A), 'message 1, of the user, has no content'), (tell(Q, dict(role='assistant', content=None)), 'message 2, of the assistant, has no content'),
    (tell(S, Q, A, S, Q, A), 'message 4 is a second system message'), (tell(A, Q, A), "message 1 is the assistant's, and nothing was asked"), (tell(S, A, Q, A), "message 2 is the assistant's"),
    (tell(Q, call({}), A), 'message 2 calls a tool, and no result follows'), (tell(Q, RESULT, A), 'message 2 is a tool result, and no call'), (tell(Q, A, RESULT, A), 'message 3 is a tool result, and no call'),
    (tell(Q, call({}, id='x'), dict(RESULT, tool_call_id='y'), A), "result of call 'y', which message 2 did not make"), (tell(Q, call('{'), RESULT, A), 'message 2: the arguments of look is not JSON'), (tell(Q, call([1]), RESULT, A), 'not an object'),
    (tell(dict(role='boss', content='a'), A), "message 1 has the unknown role 'boss'"), (tell(Q, dict(A, weight=0)), 'message 2 is marked as not to be trained on'), (tell(dict(Q, content=3), A), 'message 1 is int, not text'),
    (tell(dict(Q, content=[dict(type='image_url', image_url={})]), A), "a part of type 'image_url'"), (tell(dict(Q, content='\ud800'), A), 'half a surrogate pair'), (dict(tools='[{', messages=[Q, A]), 'tools is not JSON'),
    (dict(tools=[dict(x=1)], messages=[Q, A]), 'tool 1 has no name'), (dict(conversations=gpt(human='Why?', function_call='look(sky)', observation='blue', gpt='A')), 'message 2: the call is not JSON'),
    (dict(prompt='Why?', completion=None), 'no answer'), (dict(prompt=None, completion='a'), 'no question'), (dict(prompt='a', completion=float('nan')), 'completion is float, not text'), (dict(instruction='a', output='b', history='x'), 'history is not JSON'),
    (dict(prompt='Why?', chosen='a', rejected='a'), 'are the same'), (dict(chosen='a', rejected='b'), 'there is no prompt'), (dict(chosen=[Q, A], rejected=[dict(Q, content='Who?'), B]), 'no prompt in common'), (dict(prompt='Why?', chosen='a', rejected=' '), 'rejected: no answer'),
    (dict(prompt='Who?', chosen=[Q, A], rejected=[Q, B]), 'prompt is not the prompt that chosen'), (dict(prompt='Why?', chosen=[Q], rejected=[B]), 'chosen begins with the user'), (dict(prompt=[Q, A], chosen=[A], rejected=[B]), 'the prompt ends with an answer'),
    (dict(prompt='a', completion='', label=True), 'completion: no answer')])
def test_a_row_that_can_not_be_used_says_why(row, why): assert why in fault(row)

def test_a_kto_label_that_is_neither_true_nor_false_is_a_fault():
    with pytest.raises(RowFault, match="label is 'good', not true or false"): normalise(dict(prompt='a', completion='b', label='good'), 'kto')

def test_numbers_as_labels_are_classes_until_a_mapping_says_that_they_judge():
    rows = [dict(prompt=f'{i}?', completion='b', label=i%3) for i in range(9)]
    assert recognise(rows, 'a.jsonl').share==1 and {shape_of(r) for r in rows}=={'prompt_completion'}
    refused(lambda: recognise([dict(id=1, label=0, prompt='a', completion='b')], 'a.jsonl', 'kto'), 'mapping: {prompt: prompt, completion: completion, label: label}')
    row = apply_mapping(dict(label='0', prompt='a', completion='b'), dict(prompt='prompt', completion='completion', label='label'))
    assert form(row, 'kto')['label'] is False

def test_two_system_messages_at_the_start_become_one(): assert form(tell(S, dict(role='developer', content='Be brief.'), Q, A))==tell(dict(S, content='Be kind.\n\nBe brief.'), Q, A)
def test_a_conversation_may_end_with_a_call(): assert form(tell(Q, call({})))==tell(Q, call({}))
def test_calls_written_as_text_may_have_results(): assert form(tell(Q, dict(A, content='<tool_call>{"name": "look"}</tool_call>'), RESULT, A))['messages'][2]==RESULT

def test_a_chat_of_10000_turns_takes_time_in_step_with_its_length():
    def seconds(n):
        row, flat = tell(*[Q, A]*(n//2)), dict(messages=MARKED['[INST]']*(n//2))
        t = time.process_time()
        assert len(normalise(row, 'messages')['messages'])==n and len(normalise(flat, 'messages')['messages'])==n
        return time.process_time()-t
    few, many = min(seconds(2000) for _ in range(3)), min(seconds(20_000) for _ in range(2))
    assert many<25*few+.05 and many<2., (few, many)

# files

BAD = {b'{"prompt": "\xff", "completion": "b"}': 'not UTF-8 at byte 12 of the line', b'{"prompt": NaN}': 'NaN is no JSON value', b'{"prompt": -Infinity}': '-Infinity is no JSON value', b'{"prompt": "a", "prompt": "b"}': "the key 'prompt' stands twice",
    b'{"m": [{"role": 1, "role": 2}]}': "the key 'role' stands twice", b'{"prompt": "cut': 'not JSON: Unterminated string', b'["a"]': 'not a JSON object but list', b'null': 'not a JSON object but NoneType', b'{"a": '+b'['*100+b']'*100+b'}': 'nested more than 64 levels deep',
    b'{"a": '+b'['*100_000+b']'*100_000+b'}': 'nested too deeply', b'{"a": '+b'9'*5000+b'}': 'not JSON'}
def test_a_bad_line_is_set_aside_with_its_number_and_reason_and_the_rest_is_read(tmp_path):
    good = b'{"prompt": "a", "completion": "b"}'
    lines = [o for b in BAD for o in (good, b)]
    (tmp_path/'a.jsonl').write_bytes(b'\xef\xbb\xbf'+b'\r\n'.join(lines)+b'\r\n')
    got = read(tmp_path/'a.jsonl')
    assert [r.line for r in got]==list(range(1, len(lines)+1)) and all(r.row==json.loads(good) for r in got[::2])
    for r,why in zip(got[1::2], BAD.values()): assert r.row is None and why in r.fault and '\n' not in r.fault

def test_a_50_mb_line_is_set_aside_with_its_size_and_the_next_line_is_read(tmp_path):
    with (tmp_path/'a.jsonl').open('wb') as f:
        f.write(b'{"text": "'+b'a'*50_000_000+b'"}\n{"text": "'+b'b'*2_000_000+b'"}\n{"text": "')
        f.write(b'c'*(max_line+5))
    tracemalloc.start()
    got = read(tmp_path/'a.jsonl')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(r.line, r.fault) for r in got]==[(1, 'a line of 50.0 MB; lines above 16.0 MB are set aside'), (2, None), (3, 'a line of 16.0 MB; lines above 16.0 MB are set aside')]
    assert peak<45e6

@pytest.mark.parametrize('name, data, has', [
    ('a.json', b'[{"text": "a"},\n{"text": "\xff"}]', ['line 2', 'not UTF-8', 'save it as UTF-8']), ('a.json', b'[{"text": "a"},\n{"text" "b"}]', ['line 2', 'not JSON', 'column']), ('a.json', b'[{"text": "a"}', ['line 1', 'not JSON']),
    ('a.json', b'[{"text": NaN}]', ['NaN is no JSON value', '.jsonl']), ('a.json', b'"text"', ['holds str, not a list of rows']), ('a.json', b'hello', ['line 1', 'not JSON']), ('a.json', b'\xef\xbb\xbf \n', ['is empty']), ('a.json', b'[]', ['is empty']),
    ('a.jsonl', b'', ['is empty']), ('a.jsonl', b'\xef\xbb\xbf\n', ['is empty']), ('a.csv', b'prompt,completion\na,b\n\xe9,b\n', ['line 3', 'not UTF-8', 'save it as UTF-8']), ('a.csv', b'q,q\na,b\n', ["column 'q' stands twice"]),
    ('a.csv', 'q,a\n'.encode('utf-16'), ['UTF-16', 'save it as UTF-8']), ('a.jsonl', '{}'.encode('utf-16'), ['UTF-16']), ('a.parquet', b'PAR1', ['not a Parquet file']), ('a.parquet', b'', ['not a Parquet file'])])
def test_a_file_that_can_not_be_read_is_one_sentence(tmp_path, name, data, has):
    (tmp_path/name).write_bytes(data)
    refused(lambda: read(tmp_path/name), name, *has)

def test_a_missing_file_is_one_sentence(tmp_path): refused(lambda: find_sources(str(tmp_path/'no.jsonl')), 'There is no file', 'no.jsonl')

def test_a_json_list_marks_keys_that_stand_twice_and_deep_nesting(tmp_path):
    (tmp_path/'a.json').write_bytes(b'[{"a": 1}, {"b": {"c": 1, "c": 2}}, {"d": '+b'['*90+b']'*90+b'}, 7]')
    assert [r.fault for r in read(tmp_path/'a.json')]==[None, "the key 'c' stands twice in one object", 'nested more than 64 levels deep', 'not a JSON object but int']

@pytest.mark.parametrize('text, n', [('{"data": [{"text": "a"}, {"text": "b"}], "info": {"n": [1]}}', 2), ('{"messages": [{"role": "user"}], "tools": [{"name": "x"}]}', 1), ('{"text": "a"}\n{"text": "b"}\n', 2), ('\ufeff[\r\n{"text": "a"}\r\n]', 1)])
def test_json_documents_of_the_usual_forms_are_read(tmp_path, text, n):
    (tmp_path/'a.json').write_text(text)
    got = read(tmp_path/'a.json')
    assert len(got)==n and not any(r.fault for r in got)

def test_a_csv_row_of_too_many_or_too_few_columns_is_set_aside(tmp_path):
    (tmp_path/'a.csv').write_text('prompt,completion\na,b\nc\nd,e,f\n"g\nh",i\nj,k\n')
    assert [(r.line, r.fault) for r in read(tmp_path/'a.csv')]==[(2, None), (3, '2 columns in the header, 1 here'), (4, '2 columns in the header, 3 here'), (5, None), (7, None)]

def write_all(folder, n):
    "n rows of about 1 kB in every format"
    import pyarrow as pa, pyarrow.parquet as pq
    def rows(k): return [dict(prompt=f'What is {i}?', completion='It is a number. '*60) for i in range(k)]
    with (folder/'a.jsonl').open('w') as j, (folder/'a.json').open('w') as d, (folder/'b.json').open('w') as e, (folder/'a.csv').open('w') as c:
        d.write('['); e.write('{"data": ['); c.write('prompt,completion\n')
        for i,r in enumerate(rows(n)):
            t = json.dumps(r)
            j.write(t+'\n'); d.write(','*bool(i)+t); e.write(','*bool(i)+t); c.write(f'{r["prompt"]},{r["completion"]}\n')
        d.write(']'); e.write(']}')
    pq.write_table(pa.Table.from_pylist(rows(n)), folder/'a.parquet', row_group_size=2000)

def test_memory_stays_flat_as_rows_grow(tmp_path):
    peaks = {}
    for n in (1000, 12_000):
        (d := tmp_path/str(n)).mkdir()
        write_all(d, n)
        for name in ('a.jsonl', 'a.json', 'b.json', 'a.csv', 'a.parquet'):
            tracemalloc.start()
            assert sum(1 for _ in read_rows(Source(str(d/name))))==n
            peaks[name, n] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    for (name,n),peak in peaks.items(): assert peak<1.3*peaks[name, 1000]+300_000 and peak<4e6, peaks

def test_a_parquet_file_of_one_row_group_is_not_held_in_memory(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    n = 20_000
    pq.write_table(pa.table(dict(prompt=[f'{i}?' for i in range(n)], completion=[random.Random(i).randbytes(700).hex() for i in range(n)])), tmp_path/'a.parquet', compression=None, use_dictionary=False)
    before, held = pa.total_allocated_bytes(), 0
    for i,_ in enumerate(read_rows(Source(str(tmp_path/'a.parquet')))):
        if not i%500: held = max(held, pa.total_allocated_bytes()-before)
    assert (tmp_path/'a.parquet').stat().st_size>25e6 and held<8e6, held

def test_limits_and_weights_stay_with_their_source(tmp_path):
    a, b = (write_rows(tmp_path/f'{n}.jsonl', [dict(text=f'{n}{i}') for i in range(9)]) for n in 'ab')
    ss = find_sources([dict(path=a, limit=4, weight=2), dict(path=b, weight=.5)])
    assert [(s.path, s.limit, s.weight) for s in ss]==[(a, 4, 2.), (b, None, .5)]
    assert [len(list(read_rows(s))) for s in ss]==[4, 9] and {r.file for r in read_rows(ss[0])}=={a}
