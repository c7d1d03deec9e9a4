"What a user gets wrong: each mistake is one sentence with the value, the place and the way out, or a row set aside with its line"
import errno, json, os, subprocess
from pathlib import Path

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
from ftnb import base
from ftnb.base import UserError, write_atomic
from ftnb.models import model_path, read_config
from ftnb.prepare import prepare
from ftnb.recipe import load_recipe, make_recipe
from ftnb.runs import Run

good = [dict(prompt=f'What is {i} plus {i}?', completion=f'It is {2*i}.') for i in range(1, 9)]

@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    "An empty workspace"
    monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path/'none'))
    monkeypatch.chdir(tmp_path)

@pytest.fixture(scope='module')
def small():
    "The small model, or no test"
    try: return model_path('smollm2-135m')
    except UserError as e: pytest.skip(str(e))

def write(name, rows):
    Path(name).write_text(''.join((r if isinstance(r, str) else json.dumps(r))+'\n' for r in rows))
    return name

def go(rows=None, name='my.jsonl', **values):
    if rows is not None: write(name, rows)
    return prepare(Run(Path('runs/r'), make_recipe(dict(dataset=name, **values)))).report

def says(f, *parts):
    "The message of the `UserError` that `f` raises: one line, with all `parts` in it"
    with pytest.raises(UserError) as e: f()
    text = str(e.value)
    assert '\n' not in text and text.strip() and 'Traceback' not in text
    assert not [p for p in parts if p not in text], text
    return text

def aside(rep): return [(a['file'], a['line'], a['reason']) for a in rep['set_aside']]

def test_a_missing_file_names_the_place_and_the_nearest_file():
    write('tickets.jsonl', good)
    says(lambda: go(name='tikets.jsonl'), 'tikets.jsonl', 'looked from', "Did you mean 'tickets.jsonl'?")

def test_no_dataset_names_what_can_be_one(): says(lambda: prepare(Run('runs/r', make_recipe({}))), 'set dataset to a file, a folder, a hub id, or demo')

@pytest.mark.parametrize('text', ['', '\n\n'])
def test_an_empty_file_is_named(text):
    Path('my.jsonl').write_text(text)
    says(lambda: go(), 'my.jsonl', 'is empty')

@pytest.mark.parametrize('name', ['my.json', 'my.csv', 'my.parquet'])
def test_an_empty_file_of_another_kind_is_named(name):
    Path(name).write_text('')
    says(lambda: go(name=name), name)

def test_a_line_that_is_not_json_is_set_aside_with_line_and_reason(small):
    rep = go([*good[:2], '{"prompt": "half a', *good[2:]])
    (file, line, reason), = aside(rep)
    assert (file, line)==('my.jsonl', 3) and reason.startswith('not JSON: ') and 'column' in reason
    assert rep['rows']==9 and 'line 3: not JSON' in rep['line']
    assert json.loads(Path('runs/r/data/set_aside.jsonl').read_text())['line']==3

def test_a_file_without_one_good_line_is_refused(): says(lambda: go(['not json', 'nor this']), 'my.jsonl', 'no row can be read', 'line 1', 'not JSON')

@pytest.mark.parametrize('bad', [dict(prompt='And now?', completion=''), dict(prompt='And now?', completion='  ')])
def test_a_row_without_an_answer_is_set_aside(small, bad):
    assert aside(go([*good, bad]))==[('my.jsonl', 9, 'no answer: it is empty')]

def test_a_conversation_that_ends_with_a_question_is_set_aside(small):
    talk = lambda *ms: dict(messages=[dict(role=r, content=c) for r,c in ms])
    rows = [talk(('user', r['prompt']), ('assistant', r['completion'])) for r in good]
    rep = go([*rows, talk(('user', 'And now?')), talk(('user', 'a'), ('assistant', 'b'), ('user', 'c'))])
    assert aside(rep)==[('my.jsonl', 9, 'no answer: no message of the assistant'), ('my.jsonl', 10, 'no answer: the last message is of the user')]

def test_no_row_with_an_answer_is_refused_with_the_reason():
    says(lambda: go([dict(prompt=f'a{i}', completion='') for i in range(4)]), '4 were read', '4 set aside', 'no answer')

def test_another_format_in_the_same_file_is_set_aside(small):
    other = dict(messages=[dict(role='user', content='x'), dict(role='assistant', content='y')])
    assert aside(go([*good, other, dict(text='plain')]))==[('my.jsonl', 9, 'messages in a file of prompt_completion'), ('my.jsonl', 10, 'text in a file of prompt_completion')]

def test_unknown_columns_are_named_with_the_line_to_write(small):
    rows = [dict(frage=r['prompt'], antwort=r['completion']) for r in good]
    says(lambda: go(rows), 'my.jsonl', "'frage', 'antwort'", 'mapping: {prompt: frage, completion: antwort}')
    assert go(rows, mapping=dict(prompt='frage', completion='antwort'))['rows']==8

def test_a_mapping_to_a_missing_column_names_the_nearest():
    says(lambda: go([dict(frage='a', antwort='b')], mapping=dict(prompt='frag', completion='antwort')), 'mapping', "'frag'", "Did you mean 'frage'?")

def test_a_wrong_type_in_a_field_is_set_aside(small):
    assert aside(go([*good, dict(prompt='And?', completion=5), dict(prompt=dict(a=1), completion='b')]))==[
        ('my.jsonl', 9, 'completion is int, not text'), ('my.jsonl', 10, 'prompt is dict, not text')]

recipes = [('learnig_rate: 1', ['learnig_rate', "Did you mean 'learning_rate'?"]),
    ('lora_r: 0', ['lora_r: 0', 'below 1']),
    ('lora_r: many', ['lora_r', "'many'", 'a whole number']),
    ('num_train_epochs: [1]', ['num_train_epochs', '[1]', 'a number']),
    ('peft: lora_plus', ['peft', "'lora_plus'", 'full, lora, qlora']),
    ('bf16: true\nfp16: true', ['bf16 and fp16 exclude each other', 'keep one']),
    ('temperature: 0.5', ['temperature: 0.5', 'set do_sample: true']),
    ('lora_r: 4\nlora_r: 8', ['lora_r stands twice', 'line 2'])]

@pytest.mark.parametrize('text,parts', recipes, ids=[t.split('\n')[0] for t,_ in recipes])
def test_a_wrong_recipe_names_the_key_and_the_line(text, parts):
    Path('r.yaml').write_text(f'dataset: demo\n{text}\n')
    says(lambda: load_recipe('r.yaml'), 'r.yaml', 'line', *parts)

def test_four_bits_with_full_fine_tuning_names_both_ways_out():
    Path('r.yaml').write_text('peft: full\nload_in_4bit: true\n')
    says(lambda: load_recipe('r.yaml'), 'r.yaml, line 2', 'load_in_4bit with peft: full', 'set peft: lora', 'leave load_in_4bit out')

def test_a_folder_that_is_no_model_says_what_it_lacks():
    Path('nomodel').mkdir()
    Path('nomodel/notes.txt').write_text('x')
    says(lambda: go(good, model_name_or_path='nomodel'), 'nomodel is not a model folder', 'config.json', 'notes.txt')

def test_an_adapter_is_not_a_model():
    Path('tuned').mkdir()
    Path('tuned/adapter_config.json').write_text('{"base_model_name_or_path": "me/base"}')
    says(lambda: go(good, model_name_or_path='tuned'), 'adapter', 'set model_name_or_path to its base, me/base')

def test_a_misspelt_short_name_gets_the_nearest(): says(lambda: go(good, model_name_or_path='smollm2-135'), 'smollm2-135', "Did you mean 'smollm2-135m'?")

@pytest.mark.parametrize('how', [lambda: go(good, model_name_or_path='nobody/nothing-here'), lambda: read_config('nobody/nothing-here')], ids=['prepare', 'config'])
def test_a_hub_model_without_network_says_so(how): says(how, 'nobody/nothing-here', 'check the network', 'or give a folder')

def test_a_hub_data_set_without_network_says_so():
    says(lambda: go(name='nobody/no-rows-here'), 'nobody/no-rows-here', 'check the path, or the network')

def test_bf16_on_a_device_without_it_names_the_other_type():
    from ftnb.load import Device, pick_dtype
    r = make_recipe(dict(bf16=True))
    says(lambda: pick_dtype(r, Device('cpu', 'Old CPU', False, False)), 'bf16: true', 'Old CPU', 'set bf16: false')
    says(lambda: pick_dtype(r, Device('cuda', 'Old GPU', False, True)), 'bf16: true', 'Old GPU', 'set fp16: true')

@pytest.fixture
def tiny(tmp_path):
    "A file system of 64 kB"
    if not hasattr(os, 'geteuid') or os.geteuid(): pytest.skip('mounting a small file system needs root')
    d = tmp_path/'disk'
    d.mkdir()
    try: p = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', str(d)], capture_output=True, text=True)
    except FileNotFoundError: pytest.skip('there is no mount')
    if p.returncode: pytest.skip(f'mounting is not allowed here: {p.stderr.strip()}')
    yield d
    subprocess.run(['umount', str(d)], check=True)

def test_a_full_disk_keeps_the_old_file(tiny):
    f = write_atomic(tiny/'state.json', 'old')
    says(lambda: write_atomic(f, b'x'*200_000), 'The disk is full', str(f), 'free', 'set output_dir to another disk')
    assert f.read_text()=='old' and [p.name for p in tiny.iterdir()]==['state.json']

def test_a_full_disk_in_stage_1_is_one_sentence(tiny, small):
    rows = [dict(prompt=f'{i}: '+'why? '*40, completion=f'{i}: '+'because. '*40) for i in range(120)]
    write('my.jsonl', rows)
    says(lambda: prepare(Run(tiny/'r', make_recipe(dict(dataset='my.jsonl')))), 'The disk is full', 'output_dir')

@pytest.mark.parametrize('no,part', [(errno.ENOSPC, 'The disk is full'), (errno.EROFS, 'may write to')])
def test_a_failing_rename_keeps_the_old_file(monkeypatch, tmp_path, no, part):
    f = write_atomic(tmp_path/'d/a.txt', 'old')
    def fail(*_): raise OSError(no, os.strerror(no))
    with monkeypatch.context() as m:
        m.setattr(base.os, 'replace', fail)
        says(lambda: write_atomic(f, 'new'), part, 'a.txt')
    assert f.read_text()=='old' and [p.name for p in f.parent.iterdir()]==['a.txt']

def defect(why): return pytest.mark.xfail(strict=True, raises=(AssertionError, TypeError, ValueError, OverflowError, pytest.fail.Exception), reason=why)

ways = dict(
    missing=(None, 'my.jsonl', defect('sources.find_sources: with no like-named file there is no way out')),
    empty=('', 'it', defect('sources.read_rows: an empty file is told without a way out')),
    not_json=('a\nb\n', 'line 1', defect('prepare.read_all: no readable row is told without a way out')),
    no_answer=('{"prompt": "a", "completion": ""}\n', 'no answer', defect('prepare.prepare: no row left is told without file, line and way out')))

@pytest.mark.parametrize('text,part', [pytest.param(t, p, id=k, marks=m) for k,(t,p,m) in ways.items()])
def test_the_way_out_is_named(text, part):
    if text is not None: Path('my.jsonl').write_text(text)
    said = says(lambda: go(), part)
    assert 'my.jsonl' in said and any(w in said for w in ('set ', 'Set ', 'check ', 'Check ', 'write ', 'Did you mean', 'such as', 'one JSON object per line')), said

odd = dict(
    history=(dict(instruction='a', output='b', history=5), 'records._alpaca: history that is no list raises TypeError'),
    text_part=(dict(messages=[dict(role='user', content=[dict(type='text', text=5)]), dict(role='assistant', content='x')]),
        'records._text: a text part that is no text raises TypeError'),
    surrogate=('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}',
        'sources._jsonl: half a surrogate pair passes and the tokenizer raises TypeError'),
    long_number=('{"prompt": ' + '9'*5000 + ', "completion": "b"}', 'sources._jsonl: a number of over 4,300 digits raises ValueError'))

@pytest.mark.parametrize('bad', [pytest.param(b, id=k, marks=defect(w)) for k,(b,w) in odd.items()])
def test_an_odd_row_is_set_aside_not_a_crash(small, bad):
    like = {'messages': dict(messages=[dict(role='user', content='q{i}'), dict(role='assistant', content='a{i}')]), 'history': dict(instruction='q{i}', output='a{i}')}
    shape = 'history' if isinstance(bad, dict) and 'history' in bad else 'messages' if 'messages' in bad else None
    rows = [json.loads(json.dumps(like[shape]).replace('{i}', str(i))) for i in range(8)] if shape else good
    rep = go([*rows, bad])
    assert [a[:2] for a in aside(rep)]==[('my.jsonl', 9)]

@defect('prepare.read_all: `if r.raw` takes {} for unreadable, the message ends in "line 1: None."')
def test_rows_without_a_key_are_told_as_such(): assert 'None' not in says(lambda: go([{}, {}]), 'my.jsonl', 'line 1')

sources = dict(
    limit=(dict(path='my.jsonl', limit='many'), 'sources.find_sources: limit is not checked, TypeError in read_rows'),
    negative_limit=(dict(path='my.jsonl', limit=-1), 'sources.read_rows: limit -1 is told as an empty file'),
    weight=(dict(path='my.jsonl', weight='many'), 'sources.find_sources: weight is not checked, ValueError'),
    no_weight=(dict(path='my.jsonl', weight=0), 'sources.find_sources: `weight or 1` turns 0 into 1'),
    mapping=(dict(path='my.jsonl', mapping={'prompt': ['prompt'], 'completion': 'completion'}), 'records.apply_mapping: a column that is no text raises TypeError'))

@pytest.mark.parametrize('source', [pytest.param(s, id=k, marks=defect(w)) for k,(s,w) in sources.items()])
def test_a_wrong_value_of_a_source_is_named(small, source):
    key = next(k for k in source if k!='path')
    write('my.jsonl', good)
    says(lambda: go(name=[source]), key)

@pytest.mark.parametrize('text', [pytest.param(t, marks=defect(w)) for t,w in [('lora_r: .inf', 'recipe._one: int(inf) raises OverflowError'),
    ('learning_rate: .nan', 'rules._one_field: nan passes every comparison'), ('learning_rate: .inf', 'rules._one_field: inf is above 0'),
    ('warmup_steps: nan', 'rules._one_field: nan passes every comparison')]])
def test_numbers_that_are_none_are_refused(text):
    Path('r.yaml').write_text(text+'\n')
    says(lambda: load_recipe('r.yaml'), 'r.yaml, line 1', text.split(':')[0])

@defect('tokenizer.load_tokenizer: passes on half of the library\'s message, without what is missing')
def test_a_model_folder_without_a_tokenizer_says_what_it_lacks():
    Path('m').mkdir()
    Path('m/config.json').write_text('{"model_type": "llama"}')
    says(lambda: go(good, model_name_or_path='m'), 'tokenizer.json')

@defect('models.model_path: an empty name is taken for the current folder')
def test_an_empty_model_name_is_named(): says(lambda: go(good, model_name_or_path=''), 'model_name_or_path')
