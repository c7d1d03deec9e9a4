"A configuration of another tool becomes a valid recipe, and no key of it gets lost in silence"
import json, shutil
from pathlib import Path
import pytest, yaml

from ftnb.base import UserError
from ftnb.fields import names
from ftnb.import_config import import_config
from ftnb.peer_tables import peers, which_peer
from ftnb.peers import became, read_key
from ftnb.recipe import load_recipe, make_recipe

FILES = sorted((Path(__file__).parent/'peers').glob('*.yaml'))
ids = [p.stem for p in FILES]

def keys_of(conf, tool):
    "Every key of a file as it stands there: those of sections, of blocks and of entries of lists by themselves"
    for k,v in conf.items():
        inner = (tool=='unsloth' and isinstance(v, dict)) or (k in peers[tool].nested and v)
        if inner and isinstance(v, dict): yield from (f'{k}.{n}' for n in v)
        elif inner and isinstance(v, list): yield from (f'{k}[{i}].{n}' for i,d in enumerate(v) for n in d)
        else: yield k

def take(tmp_path, text, name='c.yaml', **kw):
    p = tmp_path/name
    p.write_text(text if isinstance(text, str) else yaml.safe_dump(text, sort_keys=False))
    return import_config(p, **kw)
def row(got, key): return next(r for r in got.rows if r.key==key)

def test_there_are_twenty_files_of_the_four_tools():
    assert len(FILES)>=20 and {p.name.split('-')[0] for p in FILES}==set(peers)

@pytest.mark.parametrize('path', FILES, ids=ids)
def test_every_key_is_accounted_for(path):
    got, conf = import_config(path), yaml.safe_load(path.read_text())
    assert got.tool==path.name.split('-')[0]
    said = [r for r in got.rows if r.became!='default']
    assert {r.key for r in said}==set(keys_of(conf, got.tool))
    assert all(r.became in became and r.here for r in got.rows) and not [r for r in got.rows if r.became=='unknown']

@pytest.mark.parametrize('path', FILES, ids=ids)
def test_the_recipe_is_valid_and_reads_back(path, tmp_path):
    got = import_config(path)
    assert load_recipe(got.save(tmp_path/'r.yaml'))==got.recipe
    text = got.yaml()
    assert all(f'#   {r.key}: ' in text for r in got.lost) and ('# Not carried:' in text)==bool(got.lost)

@pytest.mark.parametrize('path', FILES, ids=ids)
def test_strict_stops_where_something_is_lost(path):
    got = import_config(path)
    if not got.lost: assert import_config(path, strict=True).recipe==got.recipe
    else:
        with pytest.raises(UserError, match='can not be carried'): import_config(path, strict=True)

@pytest.mark.parametrize('path', FILES, ids=ids)
def test_a_key_that_no_tool_has_is_named(path, tmp_path):
    conf = yaml.safe_load(path.read_text())
    conf['lorra_rank'] = 3
    got = take(tmp_path, conf, tool=import_config(path).tool)
    assert row(got, 'lorra_rank').became=='unknown' and 'Did you mean' in row(got, 'lorra_rank').here
    assert got.recipe==import_config(path).recipe

# what the files mean

WANT = {'axolotl-lora-1b': dict(model_name_or_path='NousResearch/Llama-3.2-1B', peft='lora', dataset='teknium/GPT4-LLM-Cleaned', valid_size=.1, max_length=2048, packing=True, lora_r=16, lora_alpha=32, lora_dropout=.05,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=1., optim='adamw_8bit', learning_rate=2e-4, warmup_steps=.1, eval_strategy='steps', eval_steps=.25, save_strategy='epoch', pad_token='<|end_of_text|>',
        activation_checkpointing=True, attn_implementation='flash_attention_2', assistant_only_loss=True, bf16=None),
    'axolotl-fft-8b': dict(peft='full', optim='paged_adamw_8bit', max_length=8192, gradient_accumulation_steps=8, learning_rate=2e-5, eval_steps=.5, activation_checkpointing_kwargs=dict(use_reentrant=False)),
    'axolotl-qlora-fsdp-70b': dict(peft='qlora', load_in_4bit=True, lora_target_modules='all-linear', lora_r=8, num_train_epochs=4.),
    'axolotl-instruct-dpo-lora-8b': dict(peft='lora', load_in_8bit=True, chat_template_path='llama3', valid_size=.05),
    'llamafactory-qwen3_lora_sft': dict(peft='lora', lora_r=8, lora_alpha=16, lora_target_modules='all-linear', max_length=2048, max_train_samples=None, learning_rate=1e-4, warmup_steps=.1, lr_scheduler_type='cosine', bf16=True, valid_size=0., eval_strategy='no', save_steps=500.),
    'llamafactory-qwen3_lora_sft_otfq': dict(peft='qlora', load_in_4bit=True),
    'llamafactory-qwen3_full_sft': dict(peft='full', deepspeed='examples/deepspeed/ds_z3_config.json', learning_rate=1e-5),
    'llamafactory-pissa_llama3_lora_sft': dict(init_lora_weights='pissa_niter_16'),
    'llamafactory-qwen3_lora_pretrain': dict(packing=True, packing_strategy='wrapped'),
    'trl-sft-lora': dict(peft='lora', lora_r=32, lora_alpha=16, lora_dropout=.05, lora_target_modules=['q_proj', 'v_proj'], learning_rate=2e-4, lr_scheduler_type='linear', warmup_steps=0., packing=True, eval_steps=100., dataset='trl-lib/Capybara'),
    'trl-sft-full': dict(peft='full', learning_rate=2e-5),
    'trl-kto-qlora': dict(peft='qlora', use_bnb_nested_quant=False, warmup_steps=.1, lr_scheduler_type='cosine', eval_strategy='no'),
    'unsloth-lora': dict(model_name_or_path='me/base-1b', peft='qlora', lora_r=24, lora_alpha=48, use_rslora=True, lora_target_modules=['q_proj', 'v_proj'], seed=11, packing=True, save_strategy='no', max_steps=-1, num_train_epochs=2.,
        report_to=['wandb', 'tensorboard'], activation_checkpointing=True, assistant_only_loss=True),
    'unsloth-full': dict(peft='full', load_in_4bit=False, dataset='rows/train.jsonl', max_steps=40, learning_rate=2e-5, max_length=2048, gradient_accumulation_steps=4, warmup_steps=5., seed=3407, weight_decay=.01)}

@pytest.mark.parametrize('name', WANT)
def test_the_values_are_those_that_the_file_means(name):
    r = import_config(next(p for p in FILES if p.stem==name)).recipe
    assert {k: getattr(r, k) for k in WANT[name]}==WANT[name]

@pytest.mark.parametrize('name, method', [('axolotl-instruct-dpo-lora-8b', 'dpo'), ('axolotl-mistral-qlora-orpo', 'orpo'), ('axolotl-qlora-1b-kto', 'kto'), ('llamafactory-qwen3_lora_dpo', 'dpo'), ('llamafactory-qwen3_lora_kto', 'kto')])
def test_a_file_of_preferences_keeps_its_method_and_the_rest_is_mapped(name, method):
    got = import_config(next(p for p in FILES if p.stem==name))
    assert row(got, 'rl' if got.tool=='axolotl' else 'stage').value==got.recipe.method==method
    assert got.recipe.lora_r in (8, 16, 32) and got.recipe.model_name_or_path.count('/')==1

def test_a_trl_file_is_told_its_subcommand():
    p = next(p for p in FILES if p.stem=='trl-dpo-lora')
    assert 'does not name its subcommand' in row(import_config(p), 'method').here
    assert row(import_config(p, method='dpo'), 'method').became=='same'

# silent faults, planted

def test_what_the_tool_assumes_is_carried_where_the_file_is_silent(tmp_path):
    got = take(tmp_path, dict(model_name_or_path='a/b', stage='sft', finetuning_type='lora', template='llama3'))
    r = got.recipe
    assert (r.lora_r, r.lora_alpha, r.learning_rate, r.lr_scheduler_type, r.warmup_steps, r.max_length, r.valid_size)==(8, 16, 5e-5, 'linear', 0., 2048, 0.)
    assert row(got, 'lora_r').became=='default' and 'LLaMA-Factory assumes it' in row(got, 'lora_r').here
    assert take(tmp_path, dict(base_model='a/b', micro_batch_size=3, datasets=[])).recipe.per_device_eval_batch_size==3

def test_names_of_a_registry_become_its_files(tmp_path):
    (tmp_path/'data').mkdir()
    info = dict(mine=dict(file_name='mine.json', formatting='sharegpt', columns=dict(messages='talk')), hub=dict(hf_hub_url='me/rows', split='train', num_samples=50), pairs=dict(file_name='p.json', ranking=True))
    (tmp_path/'data'/'dataset_info.json').write_text(json.dumps(info))
    got = take(tmp_path, dict(model_name_or_path='a/b', stage='sft', template='x', dataset='mine,hub', dataset_dir='data', max_samples=10))
    assert got.recipe.dataset==[dict(path=str(tmp_path/'data'/'mine.json'), mapping=dict(messages='talk'), limit=10), dict(path='me/rows', limit=10)] and not got.lost
    lost = take(tmp_path, dict(model_name_or_path='a/b', stage='sft', template='x', dataset='mine, pears,pairs')).lost
    assert any("Did you mean 'pairs'" in r.here for r in lost) and any('preferences' in r.here for r in lost)

def test_names_of_a_registry_that_is_not_there_must_become_files():
    r = row(import_config(next(p for p in FILES if p.stem=='llamafactory-qwen3_lora_sft')), 'dataset')
    assert 'a name of dataset_info.json' in r.here and 'a file or a hub id' in r.here

def test_sources_keep_their_columns_limits_and_roles(tmp_path):
    got = take(tmp_path, dict(base_model='a/b', micro_batch_size=1, datasets=[dict(path='json', data_files='x.jsonl', type='chat_template', field_messages='talk', split='train[:200]'), dict(path='me/text', type='completion', field='body'),
        dict(path='q.csv', type=dict(field_instruction='frage', field_output='antwort'))], test_datasets=[dict(path='held.jsonl', type='chat_template', split='train')]))
    assert got.recipe.dataset==[dict(path='x.jsonl', mapping=dict(messages='talk'), limit=200), dict(path='me/text', mapping=dict(text='body')), dict(path='q.csv', mapping=dict(prompt='frage', completion='antwort')), dict(path='held.jsonl', split='valid')]
    assert not got.lost
    got = take(tmp_path, dict(model_name_or_path='a/b', use_peft=True, datasets=[dict(path='me/a', split='train', fraction=.25), dict(path='me/b', columns=['messages'])]))
    assert got.recipe.dataset==[dict(path='me/a', weight=.25), dict(path='me/b')]

def test_a_prompt_of_its_own_is_not_dropped(tmp_path):
    got = take(tmp_path, dict(base_model='a/b', micro_batch_size=1, datasets=[dict(path='x.jsonl', type=dict(field_instruction='q', field_output='a', format='Q: {instruction}')), dict(path='y.jsonl', type='jeopardy', shardz=2)]))
    assert [(r.key, r.became) for r in got.lost]==[('datasets[0].type', 'not supported'), ('datasets[1].type', 'not supported'), ('datasets[1].shardz', 'unknown')]

def test_two_keys_for_one_field_are_not_settled_in_silence(tmp_path):
    got = take(tmp_path, dict(base_model='a/b', micro_batch_size=1, sequence_len=512, max_seq_length=2048))
    assert got.recipe.max_length==512 and row(got, 'max_seq_length').here=='max_length is 512 already, by sequence_len'

def test_a_value_that_no_recipe_has_is_refused_with_the_recipe_s_own_words(tmp_path):
    got = take(tmp_path, dict(base_model='a/b', micro_batch_size=1, lr_scheduler='rex', optimizer='muon', adapter='mora', lora_r=0))
    assert [r.key for r in got.lost]==['lr_scheduler', 'optimizer', 'adapter', 'lora_r']
    assert 'is not one of linear, cosine' in row(got, 'lr_scheduler').here and 'below 1' in row(got, 'lora_r').here
    got = take(tmp_path, dict(model='a/b', training=dict(training_type='full', load_in_4bit=True)))
    assert row(got, 'training.load_in_4bit').became=='not supported' and 'can not train' in row(got, 'training.load_in_4bit').here

def test_a_token_is_neither_carried_nor_shown(tmp_path):
    for conf in (dict(model='a/b', training={}, logging=dict(hf_token='hf_verysecret')), dict(model_name_or_path='a/b', stage='sft', hf_hub_token='hf_verysecret'), dict(model_name_or_path='a/b', dataset_name='c/d', hub_token='hf_verysecret')):
        got = take(tmp_path, conf)
        assert 'hf_verysecret' not in repr(got)+got._repr_html_()+got.yaml() and got.lost
        with pytest.raises(UserError) as e: take(tmp_path, conf, strict=True)
        assert 'verysecret' not in str(e.value)

def test_switches_that_are_off_and_faster_kernels_cost_nothing(tmp_path):
    got = take(tmp_path, dict(base_model='a/b', micro_batch_size=1, qat=None, use_mora=False, relora=False, liger_rope=True, plugins=['axolotl.integrations.liger.LigerPlugin'], deepspeed=None))
    assert [r.key for r in got.lost]==['use_mora']
    assert row(got, 'liger_rope').became==row(got, 'plugins').became=='needless'

@pytest.mark.parametrize('value', [None, True, 0, -1, 1e400, 'x', '', [], [1], [[]], {}, dict(a=1), 'null', '1e-4', 'ä', [None]], ids=repr)
@pytest.mark.parametrize('tool', peers)
def test_any_value_of_any_key_gives_a_row_or_a_sentence(tool, value, tmp_path):
    peer = peers[tool]
    for k in sorted(peer.known-set(peer.nested)):
        fields, r = read_key(peer, k, value, {k: value}, names)
        assert r.became in became and isinstance(fields, dict)
    conf = {k: value for k in sorted(peer.known)}
    if tool=='unsloth': conf = dict(model='a/b', training=conf, lora=value)
    (tmp_path/'c.yaml').write_text(yaml.safe_dump(conf))
    try: got = import_config(tmp_path/'c.yaml', tool)
    except UserError as e: assert '\n' not in str(e)
    else: make_recipe(yaml.safe_load(got.yaml()) or {})

def test_whose_file_it_is_must_be_clear(tmp_path):
    with pytest.raises(UserError, match='do not show whose file this is; say tool: axolotl, llamafactory, unsloth, trl'): take(tmp_path, dict(foo=1))
    with pytest.raises(UserError, match="tool: 'axolot' is not one of .* Did you mean 'axolotl'"): take(tmp_path, dict(foo=1), tool='axolot')
    with pytest.raises(UserError, match="There is no file .* Did you mean 'c.yaml'"): import_config(tmp_path/'d.yaml')
    with pytest.raises(UserError, match='not valid YAML'): take(tmp_path, 'a: [1')
    with pytest.raises(UserError, match='stands twice'): take(tmp_path, 'base_model: a/b\nbase_model: c/d\n')

def test_an_existing_file_is_not_overwritten(tmp_path):
    got = import_config(FILES[0])
    got.save(tmp_path/'r.yaml')
    with pytest.raises(UserError, match='exists already'): got.save(tmp_path/'r.yaml')

def test_tables_name_recipe_fields_only():
    coming = {'beta', 'desirable_weight', 'undesirable_weight', 'precompute_ref_log_probs'} # fields of training on preferences
    for p in peers.values():
        assert not set(p.renamed.values())-set(names)-coming
        assert len(p.known)==sum(map(len, (p.renamed, p.reshaped, p.needless, p.refused, p.nested)))

# The schemas

SCHEMA = {k: ' '.join(v).split() for k,v in json.loads((Path(__file__).parent/'peers'/'schema.json').read_text()).items()}

@pytest.mark.parametrize('which', [k for k in SCHEMA if 'datasets' not in k])
def test_no_key_of_a_tool_s_own_schema_is_unknown(which):
    peer = peers[which.split()[0]]
    assert len(SCHEMA[which])>30 and not [k for k in SCHEMA[which] if k not in peer.nested and read_key(peer, k, True, {}, names)[1].became=='unknown']

def test_no_key_of_an_entry_of_axolotl_s_data_is_unknown():
    from ftnb.peer_axolotl_data import of_datasets
    assert not set(SCHEMA['axolotl 0.19.0, datasets'])-set(of_datasets)

def test_no_field_of_the_installed_trl_is_unknown():
    import dataclasses
    trl = pytest.importorskip('trl')
    have = {f.name for c in (trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments, trl.DPOConfig, trl.KTOConfig, trl.DatasetMixtureConfig) for f in dataclasses.fields(c) if not f.name.startswith('_')}
    assert len(have)>150 and not [k for k in sorted(have-set(peers['trl'].nested)) if read_key(peers['trl'], k, True, {}, names)[1].became=='unknown']
