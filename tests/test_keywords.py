"""Every keyword of the usual scripts of 2023 to 2025 is a recipe field, is mapped with a sentence, or is refused by name.

`keywords.json` lists the keywords by class or script. They were read from the sources of transformers 4.28 to 5.23, TRL 0.4 to 1.16 and
PEFT 0.3 to 0.21. A newer library that has more of them turns `test_installed_libraries_are_listed` red: add the name to the list, and a
field, an alias or a reason to ftnb."""
import dataclasses, inspect, json, re
from pathlib import Path

import pytest

from ftnb.aliases import needless, renamed, reshaped, respelled
from ftnb.base import UserError
from ftnb.fields import defaults, help_of, names, types
from ftnb.recipe import make_recipe
from ftnb.refused import refused

keywords = json.loads((Path(__file__).parent/'keywords.json').read_text())
every = sorted({k for ks in keywords.values() for k in ks})

# What a script would give, where a value made from the field's type would be none
given = dict(dtype='bfloat16', merge_dtype='bfloat16', bnb_4bit_compute_dtype='float16', attn_implementation='flash_attention_2',
    lora_bias='none', peft='lora',
    excess_length_strategy='drop', packing_strategy='wrapped', train_sampling_strategy='group_by_length', lr_scheduler_type='linear',
    optim='adamw_8bit',
    bnb_4bit_quant_type='fp4', eval_strategy='epoch', save_strategy='epoch', hub_strategy='every_save', report_to='wandb', method='sft',
    export_formats=['merged'],
    max_steps=100, spec=None, activation_checkpointing_kwargs=dict(use_reentrant=False), learning_rate=1e-4, warmup_ratio=.03,
    peft_type='LORA',
    truncation_mode='keep_start', loss_type='dft', label_smoothing=.1, f_divergence_type='forward_kl', mixed_precision='bf16', use_peft=True, group_by_length=True, dataset_text_field='content',
    completion_only_loss=True,
    use_flash_attention_2=True, adafactor=True, torchdynamo='inductor', gradient_checkpointing_use_reentrant=False,
    validation_split_percentage=5)
beside = dict(temperature=dict(do_sample=True), top_p=dict(do_sample=True), top_k=dict(do_sample=True),
    push_to_hub=dict(hub_model_id='me/mine'), trainable_modules=dict(peft='full'), loss_weights=dict(method='dpo', loss_type=['sigmoid']),
    **dict.fromkeys(('label_smoothing', 'f_divergence_type', 'beta', 'precompute_ref_log_probs'), dict(method='dpo')), **dict.fromkeys(('desirable_weight', 'undesirable_weight'), dict(method='kto')),
    dataloader_persistent_workers=dict(dataloader_num_workers=2), dataloader_prefetch_factor=dict(dataloader_num_workers=2))
by_type = {bool: True, int: 2, float: .5, str: 'x', list: ['x'], dict: dict(x='y')}

def value_of(key):
    "A plausible value of `key`"
    f = renamed.get(key, key)
    if f in given: return given[f]
    if f in reshaped: pytest.fail(f'{key} is reshaped: give it a value in this test')
    if f not in types: return 4
    order = getattr(types[f], '__args__', None) or (types[f],)
    return by_type[next(t for t in order if t in by_type)]

def said(e): return str(e.value if hasattr(e, 'value') else e)
def has_word(key, text): return re.search(rf'(?<!\w){re.escape(key)}(?!\w)', text)

@pytest.mark.parametrize('key', every)
def test_keyword_is_a_field_or_mapped_or_refused(key):
    notes, values = [], {key: value_of(key), **beside.get(key, {})}
    if key in refused:
        with pytest.raises(UserError) as e: make_recipe(values)
        assert said(e)==f'{key} is no recipe field: {refused[key]}.'
        return
    recipe = make_recipe(values, notes=notes) # anything that is not refused by name makes a recipe
    if key in names: assert getattr(recipe, key)==values[key] and not notes
    else: assert len(notes)==1 and has_word(key, notes[0])

def test_installed_libraries_are_listed():
    transformers, peft, trl = (pytest.importorskip(o) for o in ('transformers', 'peft', 'trl'))
    fields = lambda c: {f.name for f in dataclasses.fields(c)}
    params = lambda f: {k for k,p in inspect.signature(f).parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}-{'self'}
    public = lambda ks: {k for k in ks if not k.startswith('_')}
    have = dict(TrainingArguments=fields(transformers.TrainingArguments), LoraConfig=fields(peft.LoraConfig),
        SFTConfig=fields(trl.SFTConfig)-fields(transformers.TrainingArguments), SFTTrainer=params(trl.SFTTrainer.__init__),
        Seq2SeqTrainingArguments=fields(transformers.Seq2SeqTrainingArguments)-fields(transformers.TrainingArguments),
        ModelConfig=fields(trl.ModelConfig), ScriptArguments=fields(trl.ScriptArguments),
        BitsAndBytesConfig=params(transformers.BitsAndBytesConfig.__init__), GenerationConfig=public(vars(transformers.GenerationConfig())),
        generate=params(transformers.GenerationMixin.generate), from_pretrained=params(transformers.PreTrainedModel.from_pretrained))
    new = {c: sorted(public(ks)-set(keywords[c])) for c,ks in have.items()}
    assert not {c: ks for c,ks in new.items() if ks}

def test_keyword_arguments_that_from_pretrained_takes_out_are_listed():
    modeling = pytest.importorskip('transformers.modeling_utils')
    taken = re.findall(r'kwargs\.pop\(\s*"([a-z]\w*)"', inspect.getsource(modeling.PreTrainedModel.from_pretrained))
    assert len(taken)>15 and not set(taken)-set(keywords['from_pretrained'])

# The tables

def test_a_key_stands_in_one_table():
    for a,b in ((renamed, reshaped), (renamed, refused), (reshaped, refused)): assert not set(a)&set(b)
    fields_too = sorted(set(names)&{*renamed, *reshaped, *refused})
    assert not fields_too, f'{fields_too} are recipe fields: take them out of the tables'

def test_targets_are_fields():
    assert not {*renamed.values(), *respelled}-set(names)
    assert not set(needless)-set(refused)-set(names) # any other value of it is refused, or is the field's

foreign = set('accelerator_config min_num_params auto_wrap_policy transformer_layer_cls_to_wrap embed_tokens tokens_per_second '
    'group_by_length'.split())
@pytest.mark.parametrize('key', sorted(refused))
def test_successor_exists(key):
    words = {w for w in re.findall(r'[a-z0-9]+(?:_[a-z0-9]+)+', refused[key])}
    assert not words-set(names)-foreign
    assert all(w in names for w in re.findall(r'(?<!data )\bset ([a-z]\w*)', refused[key]))

# Values whose meaning moved

@pytest.mark.parametrize('old,new', [
    (dict(completion_only_loss=False), dict(assistant_only_loss=False)),
    (dict(response_only_loss=False), dict(assistant_only_loss=False)),
    (dict(train_on_inputs=True), dict(assistant_only_loss=False)),
    (dict(completion_only_loss=None), {}),
    (dict(warmup_ratio=0), dict(warmup_steps=0)),
    (dict(warmup_ratio='0.1'), dict(warmup_steps=.1)),
    (dict(gradient_checkpointing=True), dict(activation_checkpointing=True)),
    (dict(use_gradient_checkpointing='unsloth'), dict(activation_checkpointing=True)),
    (dict(gradient_checkpointing_kwargs=dict(use_reentrant=False)), dict(activation_checkpointing_kwargs=dict(use_reentrant=False))),
    (dict(evaluation_strategy='steps', eval_steps=50), dict(eval_strategy='steps', eval_steps=50)),
    (dict(evaluation_strategy=False), dict(eval_strategy='no')), # YAML reads `no` as false
    (dict(save_strategy=False), dict(save_strategy='no')),
    (dict(bias='lora_only'), dict(lora_bias='lora_only')),
    (dict(lora_bias=False), {}), # PEFT's own lora_bias, which is another thing
    (dict(val_size=.1), dict(valid_size=.1)),
    (dict(validation_split_percentage=5), dict(valid_size=.05)),
    (dict(optim='paged_adamw_32bit'), dict(optim='paged_adamw_32bit')),
    (dict(optim='adamw_hf'), dict(optim='adamw_torch')),
    (dict(torch_dtype='torch.bfloat16'), dict(dtype='bfloat16')),
    (dict(torch_dtype='bf16'), dict(dtype='bfloat16')),
    (dict(dtype='fp16'), dict(dtype='float16')),
    (dict(dtype=None), dict(dtype='auto')),
    (dict(bnb_4bit_compute_dtype='torch.float16', load_in_4bit=True), dict(bnb_4bit_compute_dtype='float16', peft='qlora',
        load_in_4bit=True)),
    (dict(bnb_4bit_quant_storage='torch.uint8'), dict(bnb_4bit_quant_storage='uint8')),
    (dict(packing_strategy='ffd'), dict(packing_strategy='bfd')),
    (dict(use_peft=False), dict(peft='full')),
    (dict(use_peft=True, load_in_4bit=True), dict(peft='qlora', load_in_4bit=True)),
    (dict(fsdp=['full_shard', 'auto_wrap']), dict(fsdp='full_shard auto_wrap')),
    (dict(task_type='CAUSAL_LM', inference_mode=False, num_beams=1), {}),
])
def test_value_keeps_its_meaning(old, new):
    recipe = make_recipe(old)
    assert {k: getattr(recipe, k) for k in new}==new
    if not new: assert recipe==make_recipe({})

@pytest.mark.parametrize('old,why', [
    (dict(warmup_ratio=1.0), 'set warmup_steps'), # all steps, not one step
    (dict(validation_split_percentage=100), 'set valid_size'),
    (dict(lora_bias=True), 'none, all or lora_only'),
    (dict(bias=True), 'none, all or lora_only'),
    (dict(max_prompt_length=128), 'set max_length'), # of the prompt alone
    (dict(eval_packing=True), 'packing'), # of the validation rows alone
    (dict(truncation_mode='keep_end'), 'excess_length_strategy'),
    (dict(peft_type='LILY'), 'is not offered: its router'),
    (dict(task_type='SEQ_CLS'), 'CAUSAL_LM'),
    (dict(num_beams=4), 'do_sample'),
    (dict(use_peft='perhaps'), 'true or false'),
    (dict(mixed_precision='fp8'), 'set bf16 or fp16'),
    (dict(warmup_ratio=.03, warmup_steps=100), 'keep one'),
    (dict(batch_size=128, micro_batch_size=4), 'keep one'), # the whole batch in one script, a device's in others
    (dict(completion_only_loss=True, assistant_only_loss=False), 'keep one'),
])
def test_value_that_can_not_keep_its_meaning_is_refused(old, why):
    with pytest.raises(UserError) as e: make_recipe(old)
    assert why in said(e) and all(has_word(k, said(e)) for k in old)

def test_max_length_is_the_length_of_a_row():
    assert re.search(r'row.*prompt and answer together', help_of()['max_length'])
    assert 'answer' in help_of()['max_new_tokens'] and 'max_length is the length of a row' in refused['generation_max_length']

def test_types_of_torch_and_enums_are_read():
    torch, transformers, peft = (pytest.importorskip(o) for o in ('torch', 'transformers', 'peft'))
    recipe = make_recipe(dict(torch_dtype=torch.bfloat16, lr_scheduler_type=transformers.SchedulerType.LINEAR,
        task_type=peft.TaskType.CAUSAL_LM,
        peft_type=peft.PeftType.LORA, evaluation_strategy=transformers.IntervalStrategy.EPOCH))
    assert (recipe.dtype, recipe.lr_scheduler_type, recipe.peft, recipe.eval_strategy)==('bfloat16', 'linear', 'lora', 'epoch')

def test_respelled_optimizers_exist():
    optims = {o.value for o in pytest.importorskip('transformers.training_args').OptimizerNames}
    for old in ('adamw_hf', 'adamw_apex_fused', 'paged_adamw_32bit', 'adamw_bnb_8bit', 'adafactor', 'lion_8bit'):
        assert make_recipe(dict(optim=old)).optim in optims

def test_a_token_is_not_repeated():
    for key in (k for k,v in refused.items() if 'HF_TOKEN' in v):
        with pytest.raises(UserError) as e: make_recipe({key: 'hf_secret'})
        assert 'hf_secret' not in said(e)

def test_the_line_of_a_mapped_or_refused_key_is_named(tmp_path):
    from ftnb.recipe import load_recipe
    (tmp_path/'r.yaml').write_text('seed: 1\nwarmup_ratio: 1.0\n')
    with pytest.raises(UserError, match=r'line 2: warmup_ratio: 1\.0 is not a share'): load_recipe(tmp_path/'r.yaml')
    (tmp_path/'r.yaml').write_text('num_beam_groups: 2\n')
    with pytest.raises(UserError, match='line 1: num_beam_groups is no recipe field'): load_recipe(tmp_path/'r.yaml')
