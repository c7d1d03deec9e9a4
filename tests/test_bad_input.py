"A user's mistake is one sentence: what, where, what to do"
import json, os, re, subprocess
import pytest

from conftest import short_rows, write_rows
from ftnb.base import UserError, write_atomic
from ftnb.models import check_folder, model_path
from ftnb.prepare import prepare
from ftnb.recipe import load_recipe, make_recipe
from ftnb.runs import Run

def refused(f, *has):
    "The sentence with which `f()` is refused; `has` are the value, the place and the way out it must hold"
    with pytest.raises(UserError) as e: f()
    text = str(e.value)
    assert '\n' not in text and 15<len(text)<500, text
    assert not [h for h in has if h not in text], text
    return text

@pytest.fixture
def prep(tmp_path, tiny):
    "Stage 1 on some rows or a path"
    def go(data, **kw):
        path = write_rows(tmp_path/'mine.jsonl', data) if isinstance(data, list) else str(data)
        run = Run(tmp_path/'run', make_recipe(dict(dict(dataset=path, model_name_or_path=tiny, test_size=0), **kw)))
        return run, prepare(run).report
    return go

# data

def test_a_missing_file_names_the_nearest_one(prep, tmp_path):
    write_rows(tmp_path/'tickets.jsonl', short_rows(3))
    refused(lambda: prep(tmp_path/'ticket.jsonl'), 'There is no file', 'ticket.jsonl', 'looked from', "Did you mean 'tickets.jsonl'?")

@pytest.mark.parametrize('ending, text', [('jsonl', ''), ('jsonl', '\n\n'), ('csv', ''), ('csv', 'prompt,completion\n'), ('json', '[]')])
def test_an_empty_file_is_said_to_be_empty(prep, tmp_path, ending, text):
    p = tmp_path/f'none.{ending}'
    p.write_text(text)
    refused(lambda: prep(p), str(p), 'is empty')

def test_an_empty_json_file_is_said_to_be_empty(prep, tmp_path):
    (tmp_path/'none.json').write_text('')
    refused(lambda: prep(tmp_path/'none.json'), 'is empty')

def aside(report): return {a['line']: a['reason'] for a in report['set_aside']}

def test_a_line_that_is_not_json_is_set_aside_with_line_and_reason(prep):
    rows = short_rows(12)
    rows[2] = '{"prompt": "cut off'
    run, rep = prep(rows)
    assert list(aside(rep))==[3] and re.search(r'not JSON: .* at column \d+', aside(rep)[3])
    kept = [json.loads(l) for l in run.path('data', 'set_aside.jsonl').read_text().splitlines()]
    assert kept[0]['line']==3 and 'line 3: not JSON' in rep['line']
    assert rep['rows']==12==sum(rep['splits'].values())+len(rep['set_aside'])

def test_a_file_of_nothing_but_broken_lines_is_one_sentence(prep, tmp_path):
    refused(lambda: prep(['{"prompt"', 'hello', '[1']), 'mine.jsonl', 'no row can be read', 'line 1: not JSON')

def test_broken_json_names_line_and_column(prep, tmp_path):
    (tmp_path/'bad.json').write_text('[\n{"prompt": "a", "completion": "b"},\n{"prompt": "c" "completion": "d"}\n]')
    refused(lambda: prep(tmp_path/'bad.json'), 'bad.json, line 3', 'column')

def test_rows_without_an_answer_are_set_aside(prep):
    ask = dict(role='user', content='Hello?')
    rows = [dict(messages=[ask, dict(role='assistant', content=f'Yes {i}')]) for i in range(10)]
    rows = [dict(messages=[dict(ask, content=f'{i}?'), r['messages'][1]]) for i,r in enumerate(rows)]
    rows += [dict(messages=[ask]), dict(messages=[ask, dict(role='assistant', content='  ')]), dict(messages=[]), dict(messages=[dict(role='assistant', content='a'), ask])]
    _, rep = prep(rows)
    why = aside(rep)
    assert list(why)==[11, 12, 13, 14] and all('no answer' in why[l] for l in (11, 12, 14)) and 'no messages' in why[13]

def test_no_answer_in_any_row_stops_with_the_reason(prep):
    refused(lambda: prep([dict(messages=[dict(role='user', content=f'{i}?')]) for i in range(5)]), 'No row is left to train on', '5 were read', 'no answer')

def test_other_formats_in_a_file_are_set_aside_and_named(prep):
    rows = short_rows(12)+[dict(messages=[dict(role='user', content='a'), dict(role='assistant', content='b')]), dict(conversations=[{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]), dict(colour='red')]
    _, rep = prep(rows)
    assert aside(rep)=={13: 'messages in a file of prompt_completion', 14: 'sharegpt in a file of prompt_completion', 15: 'unknown columns in a file of prompt_completion'}

def test_unknown_columns_name_them_and_the_line_to_write(prep):
    refused(lambda: prep([dict(frage='a', antwort='b')]*3), 'mine.jsonl', "'frage', 'antwort'", 'mapping: {prompt: frage, completion: antwort}')
    assert prep([dict(frage=f'a{i}', antwort='b') for i in range(9)], mapping=dict(prompt='frage', completion='antwort'))[1]['rows']==9

def test_a_mapping_to_no_column_names_the_nearest(prep):
    refused(lambda: prep([dict(frage='a', antwort='b')]*3, mapping=dict(prompt='frag', completion='antwort')), 'line 1', "no column 'frag'", "Did you mean 'frage'?")

def test_a_value_of_the_wrong_type_is_set_aside_and_named(prep):
    rows = short_rows(10)+[dict(prompt=5, completion='a'), dict(prompt='a', completion=['x']), dict(prompt='b', completion={'c': 1}), '[1, 2]', '"text"']
    why = aside(prep(rows)[1])
    assert list(why)==[11, 12, 13, 14, 15]
    assert 'prompt is int, not text' in why[11] and 'int' not in why[13] and 'completion is dict, not text' in why[13] and 'not a JSON object but list' in why[14] and 'str' in why[15]

def test_wrong_types_inside_messages_are_set_aside_and_named(prep):
    good = [dict(messages=[dict(role='user', content=f'q{i}'), dict(role='assistant', content='a')]) for i in range(10)]
    bad = [dict(messages=['hello']), dict(messages=[dict(content='x')]), dict(messages=[dict(role='boss', content='x')]), dict(messages=[dict(role='user', content=3), dict(role='assistant', content='a')])]
    why = aside(prep(good+bad)[1])
    assert [why[l] for l in (11, 12, 13, 14)]==['message 1 is str, not an object', 'message 1 has no role', "message 1 has the unknown role 'boss'", 'message 1 is int, not text']

def test_a_file_that_is_not_text_is_refused(prep, tmp_path):
    (tmp_path/'x.csv').write_bytes(b'prompt,completion\n\xff\xfe,b\n')
    refused(lambda: prep(tmp_path/'x.csv'), 'x.csv', 'not UTF-8', 'save it as UTF-8')
    (tmp_path/'x.parquet').write_bytes(b'no parquet at all')
    refused(lambda: prep(tmp_path/'x.parquet'), 'x.parquet', 'not a Parquet file')
    (tmp_path/'x.docx').write_bytes(b'x')
    refused(lambda: prep(tmp_path/'x.docx'), '.docx', '.jsonl')

def test_rows_longer_than_allowed_stop_with_the_value_that_keeps_them(prep):
    text = refused(lambda: prep(short_rows(20), max_length=32), 'rows are longer than max_length: 32', 'mine.jsonl, line', 'excess_length_strategy: drop or truncate')
    n = int(re.search(r'set max_length: (\d+)', text)[1])
    assert not prep(short_rows(20), max_length=n)[1]['set_aside']

# recipes

def recipe(tmp_path, text):
    (tmp_path/'my.yaml').write_text(text)
    return load_recipe(tmp_path/'my.yaml')

def test_an_unknown_key_names_its_line_and_the_nearest_key(tmp_path):
    refused(lambda: recipe(tmp_path, 'dataset: a.jsonl\nlearnig_rate: 1e-4\n'), "unknown key 'learnig_rate'", 'my.yaml, line 2', "Did you mean 'learning_rate'?")

def test_a_rank_of_zero_names_its_line_and_the_bound(tmp_path):
    refused(lambda: recipe(tmp_path, 'lora_r: 0\n'), 'my.yaml, line 1', 'lora_r: 0', 'below 1')

def test_a_value_of_the_wrong_kind_names_its_line(tmp_path):
    refused(lambda: recipe(tmp_path, 'dataset: a\nlora_r: many\n'), 'my.yaml, line 2', "lora_r: 'many'")
    refused(lambda: recipe(tmp_path, 'learning_rate: [1, 2]\n'), 'my.yaml, line 1', 'learning_rate')

@pytest.mark.parametrize('bits', [4, 8])
def test_few_bits_with_full_fine_tuning_are_refused_with_two_ways_out(tmp_path, bits):
    refused(lambda: recipe(tmp_path, f'peft: full\nload_in_{bits}bit: true\n'), 'my.yaml, line 2', f'load_in_{bits}bit with peft: full', 'set peft: lora', f'leave load_in_{bits}bit out')

# models

def test_a_folder_that_is_no_model_says_what_it_holds(tmp_path, prep):
    (tmp_path/'stuff').mkdir()
    (tmp_path/'stuff/notes.txt').write_text('x')
    refused(lambda: prep(short_rows(9), model_name_or_path=str(tmp_path/'stuff')), str(tmp_path/'stuff'), 'not a model folder', 'no config.json', 'notes.txt')

def test_an_adapter_given_as_a_model_names_its_base(tmp_path):
    (tmp_path/'ad').mkdir()
    (tmp_path/'ad/adapter_config.json').write_text('{"base_model_name_or_path": "me/base"}')
    refused(lambda: check_folder(tmp_path/'ad'), 'holds an adapter, not a model', 'me/base', 'model_name_or_path')

def test_a_folder_with_a_broken_config_is_refused(tmp_path, tiny):
    import shutil
    from ftnb.load import load_model
    shutil.copytree(tiny, tmp_path/'m')
    (tmp_path/'m/model.safetensors').unlink()
    refused(lambda: load_model(make_recipe(dict(model_name_or_path=str(tmp_path/'m'), use_cpu=True))), str(tmp_path/'m'), 'safetensors')

def test_a_path_that_is_not_there_and_a_short_name_that_is_nearly_one(tmp_path):
    refused(lambda: model_path(str(tmp_path/'none')), str(tmp_path/'none'), 'There is no model', 'hub id')
    refused(lambda: model_path('smollm2-135'), "Did you mean 'smollm2-135m'?")

def test_a_hub_id_without_a_network_says_so(prep):
    from ftnb.load import load_model
    r = make_recipe(dict(model_name_or_path='someone/no-such-model', use_cpu=True))
    refused(lambda: load_model(r), 'someone/no-such-model', 'hub can not be reached', 'HF_HUB_OFFLINE', 'smollm2-135m')
    refused(lambda: prep(short_rows(9), model_name_or_path='someone/no-such-model'), 'someone/no-such-model', 'hub can not be reached', 'check the network')

def test_a_data_set_of_the_hub_without_a_network_says_so(prep):
    refused(lambda: prep('someone/no-such-data'), 'someone/no-such-data', 'hub can not be reached', 'check the path')

def test_bf16_on_a_device_without_it_names_the_device_and_the_way_out():
    from ftnb.load import Device, pick_dtype, precision_args
    cpu, gpu = Device('cpu', 'Old CPU', False, False), Device('cuda', 'Tesla T4', False, True)
    r = make_recipe(dict(bf16=True))
    refused(lambda: pick_dtype(r, cpu), 'bf16: true', 'Old CPU (cpu)', 'bf16: false')
    refused(lambda: precision_args(r, gpu), 'bf16: true', 'Tesla T4 (cuda)', 'fp16: true')
    refused(lambda: pick_dtype(make_recipe(dict(fp16=True)), cpu), 'fp16: true', 'needs a GPU', 'leave fp16 out')

# a full disk

@pytest.fixture
def small_disk(tmp_path):
    "A disk of 200 kB"
    d = tmp_path/'disk'
    d.mkdir()
    if os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=200k', 'tmpfs', str(d)], capture_output=True).returncode: pytest.skip('no small disk can be mounted here')
    yield d
    subprocess.run(['umount', '-l', str(d)])

def test_a_full_disk_keeps_the_old_file_and_says_what_is_free(small_disk):
    write_atomic(small_disk/'a.json', 'old')
    refused(lambda: write_atomic(small_disk/'a.json', b'x'*400_000), 'The disk is full', str(small_disk/'a.json'), 'free', 'output_dir')
    assert (small_disk/'a.json').read_text()=='old' and len(list(small_disk.iterdir()))==1

def test_a_full_disk_in_stage_1_is_one_sentence(small_disk, tiny, tmp_path):
    rows = [dict(r, completion=r['completion']*200) for r in short_rows(80)]
    r = make_recipe(dict(dataset=write_rows(tmp_path/'mine.jsonl', rows), model_name_or_path=tiny, max_length=100_000))
    refused(lambda: prepare(Run(small_disk/'run', r)), 'The disk is full', str(small_disk), 'output_dir')

@pytest.mark.parametrize('when', ['checkpoint', 'end'])
def test_a_full_disk_while_training_saves_is_one_sentence(small_disk, made, when):
    from ftnb.train import train
    run = made(max_steps=2, **(dict(save_strategy='steps', save_steps=1) if when=='checkpoint' else {}))
    target = run.path('checkpoints' if when=='checkpoint' else 'model')
    target.symlink_to(small_disk)
    refused(lambda: train(run), 'The disk is full', target.name, 'Free some space')

# on the command line

def test_every_mistake_is_one_line_without_a_traceback(tmp_path, monkeypatch, capsys):
    from ftnb.cli import main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path/'none'))
    for text,code in (('dataset: none.jsonl\n', 3), ('lora_r: 0\n', 2), ('learnig_rate: 1\n', 2), ('load_in_4bit: true\npeft: full\n', 2), ('a: [\n', 2)):
        (tmp_path/'my.yaml').write_text(text)
        got = main(['run', 'my.yaml', '--to', 'prepare'])
        err = capsys.readouterr().err.strip()
        assert got==code and len(err.splitlines())==1 and 'Traceback' not in err, (text, err)
