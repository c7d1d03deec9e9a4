"Advice: quiet about sound recipes, plain about unusual ones, every sentence with its source; the page made from it is up to date"
import sys
from pathlib import Path
import pytest
from ftnb.advice import Case, advice, advice_table, rules, sources
from ftnb.fields import Recipe, defaults, names
from ftnb.form import presets
from ftnb.recipe import load_recipe, make_recipe

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tools'))

def fields(rows=None, lengths=None, **values): return [a.field for a in advice(make_recipe(dict(dataset='my.jsonl', **values)), rows, lengths)]

def test_the_defaults_and_the_demo_bring_no_warning():
    assert advice(Recipe())==[]
    assert not [a for a in advice(load_recipe(ROOT/'data/demo/demo.yaml'), rows=440) if a.kind=='warn']

@pytest.mark.parametrize('name', presets)
def test_no_preset_of_the_form_is_warned_about(name):
    assert not [str(a) for a in advice(make_recipe({k: v for k,v in presets[name].items() if v is not None}), rows=5000) if a.kind=='warn']

def test_every_rule_has_a_source_that_can_be_followed_and_every_source_is_used_or_cited():
    assert all(o.source in sources for o in rules)
    assert all(u.startswith('https://') for u in sources.values())
    import choosing
    cited = {o.source for o in rules} | {s for _,_,_,ss in choosing.parameters for s in ss}
    assert set(sources)==cited

# a recipe on which each rule speaks: (values, rows, lengths) by (field, condition)
SHOWN = {
    ('lora_alpha', 'alpha / r over 4'): dict(lora_r=8, lora_alpha=64), ('lora_alpha', 'alpha / r under 0.5'): dict(lora_r=64, lora_alpha=16), ('lora_alpha', 'use_rslora with alpha / sqrt(r) over 8'): dict(use_rslora=True, lora_alpha=64),
    ('lora_r', 'r of 64 or more for under 1,000 rows'): (dict(lora_r=64, lora_alpha=64), 500), ('lora_r', 'fewer adapter weights than tokens'): (dict(lora_r=1, lora_alpha=1), None, {1000: 2000}), ('lora_r', 'r over 256 without use_rslora'): dict(lora_r=512, lora_alpha=512),
    ('lora_dropout', 'over 0.2'): dict(lora_dropout=.5), ('lora_target_modules', 'attention layers only'): dict(lora_target_modules=['q_proj', 'v_proj']), ('lora_modules_to_save', 'embeddings or output layer'): dict(lora_modules_to_save=['lm_head']), ('lora_bias', 'not none'): dict(lora_bias='all'), ('use_dora', 'on'): dict(use_dora=True),
    ('init_lora_weights', 'false'): dict(init_lora_weights=False), ('init_lora_weights', 'pissa or olora'): dict(init_lora_weights='pissa'), ('peft', '4 bits for a model under 1 billion weights'): dict(peft='qlora'), ('bnb_4bit_quant_type', 'fp4'): dict(peft='qlora', bnb_4bit_quant_type='fp4'), ('use_bnb_nested_quant', 'off, in 4 bits'): dict(peft='qlora', use_bnb_nested_quant=False),
    ('learning_rate', 'under 5e-5 for an adapter'): dict(learning_rate=1e-5), ('learning_rate', 'over 1e-3 for an adapter'): dict(learning_rate=1e-2), ('learning_rate', 'over 1e-4 for an adapter of a model from 30 billion weights on'): dict(model_name_or_path='llama-3.1-70b'), ('learning_rate', 'over 1e-4 for full fine-tuning'): dict(peft='full', learning_rate=2e-4),
    ('warmup_steps', 'as many steps as the run has, or more'): dict(max_steps=5, warmup_steps=10), ('warmup_steps', 'over 30 % of the steps'): dict(warmup_steps=.5), ('warmup_steps', 'none, in full fine-tuning'): dict(peft='full', warmup_steps=0),
    ('per_device_train_batch_size', 'over 128 rows a step for an adapter'): dict(gradient_accumulation_steps=32), ('per_device_train_batch_size', 'one row a step'): dict(per_device_train_batch_size=1), ('per_device_train_batch_size', 'a step takes all rows'): (dict(), 5), ('gradient_accumulation_steps', 'over 32'): dict(gradient_accumulation_steps=64),
    ('num_train_epochs', 'over 5 passes, without early stopping or the best checkpoint'): dict(num_train_epochs=10), ('num_train_epochs', 'under 1, by intent'): dict(num_train_epochs=.5), ('max_steps', 'stops before every row was seen'): (dict(max_steps=2), 5000), ('num_train_epochs', 'under 20 steps in all'): (dict(), 40),
    ('optim', 'paged or 8 bits on a CPU'): dict(use_cpu=True, optim='paged_adamw_8bit'), ('optim', 'sgd'): dict(optim='sgd'), ('weight_decay', 'over 0.1'): dict(weight_decay=.5), ('max_grad_norm', '0'): dict(max_grad_norm=0), ('label_smoothing_factor', 'over 0'): dict(label_smoothing_factor=.1), ('neftune_noise_alpha', 'over 15'): dict(neftune_noise_alpha=50),
    ('max_length', 'more than twice the longest row, not packed'): (dict(), None, [100]*500), ('max_length', 'rows are longer'): (dict(), None, [100]*500+[2000]), ('max_length', 'over the positions of the model'): dict(max_length=100000), ('excess_length_strategy', 'truncate'): dict(excess_length_strategy='truncate'),
    ('packing', 'without FlashAttention'): dict(packing=True), ('packing', 'rows fill most of a sequence alone'): (dict(packing=True), None, [900]*500), ('packing_strategy', 'wrapped'): dict(packing=True, packing_strategy='wrapped'), ('attn_implementation', 'eager'): dict(attn_implementation='eager'), ('assistant_only_loss', 'off'): dict(assistant_only_loss=False),
    ('dtype', 'float16, in full fine-tuning'): dict(peft='full', dtype='float16'), ('dtype', 'bfloat16, in full fine-tuning'): dict(peft='full', dtype='bfloat16'), ('fp16', 'in full fine-tuning'): dict(peft='full', fp16=True), ('activation_checkpointing', 'on, on a CPU'): dict(use_cpu=True, activation_checkpointing=True),
    ('activation_checkpointing', 'off, for a model from 3 billion weights on'): dict(model_name_or_path='llama-3.1-8b', activation_checkpointing=False), ('torch_compile', 'without packing'): dict(torch_compile=True), ('full_determinism', 'on'): dict(full_determinism=True), ('eval_strategy', 'no'): dict(eval_strategy='no'),
    ('valid_size', '0, with a data set that has no split of its own'): dict(valid_size=0), ('test_size', '0'): dict(test_size=0), ('max_eval_samples', 'under 50'): dict(max_eval_samples=20), ('save_strategy', 'no'): dict(save_strategy='no'), ('save_steps', 'as many steps as the run has, or more'): (dict(save_steps=9000), 8000),
    ('save_total_limit', 'none, with checkpoints by steps'): dict(save_total_limit=None), ('save_only_model', 'on'): dict(save_only_model=True), ('trust_remote_code', 'on'): dict(trust_remote_code=True), ('hub_private_repo', 'off, with push_to_hub'): dict(push_to_hub=True, hub_model_id='me/it', hub_private_repo=False), ('report_to', 'a tracker that is a service'): dict(report_to='wandb'),
}

def test_each_rule_has_a_recipe_below_on_which_it_speaks(): assert set(SHOWN)=={(o.field, o.told) for o in rules}

@pytest.mark.parametrize('rule', rules, ids=lambda o: f'{o.field}: {o.told}')
def test_a_rule_speaks_where_it_should_and_its_sentence_names_the_values(rule):
    values, rows, lengths = (*(SHOWN[rule.field, rule.told] if isinstance(SHOWN[rule.field, rule.told], tuple) else (SHOWN[rule.field, rule.told],)), None, None)[:3]
    r = make_recipe(dict(dataset='my.jsonl', **values))
    c = Case(r, rows, lengths)
    said = rule.says.format(c=c, r=r)
    assert rule.when(c) and said in [a.text for a in advice(r, rows, lengths)]
    assert '{' not in said and 'None' not in said and len(said)<230
    assert not rule.when(Case(Recipe(dataset='my.jsonl'), rows=5000, lengths=[300]*5000+[900]*9))

def test_what_is_not_known_makes_no_rule_fail():
    for model in ('smollm2-135m', 'someone/unknown', ''):
        for kw in (dict(), dict(rows=1), dict(rows=10**9), dict(lengths=[1]), dict(lengths={1: 1})):
            for values, *_ in (v if isinstance(v, tuple) else (v,) for v in SHOWN.values()): assert isinstance(advice(make_recipe({'model_name_or_path': model, **values}), **kw), list)

def test_full_fine_tuning_is_not_told_about_adapters():
    assert not [f for f in fields(peft='full', lora_r=512, lora_alpha=4096, lora_dropout=.9, lora_target_modules=['q_proj']) if 'lora' in f]

def test_warnings_come_before_notes_and_the_table_says_the_same():
    r = make_recipe(dict(dataset='x', optim='sgd', weight_decay=.5, save_strategy='no', report_to='wandb'))
    assert [a.kind for a in advice(r)]==['warn', 'warn', 'note', 'note'] and [o['field'] for o in advice_table(r)]==[a.field for a in advice(r)]

def test_the_page_on_choosing_is_what_its_maker_writes_and_shows_the_recipes_defaults():
    import choosing
    page = (ROOT/'guides/choosing.qmd').read_text()
    assert page==choosing.page(), 'run python tools/choosing.py'
    assert all(f'`{f}`' in page for f in {o.field for o in rules}) and all(f in names for f,*_ in choosing.parameters)
    assert all(ss and set(ss) <= set(sources) for *_,ss in choosing.parameters)
    for f in ('lora_r', 'lora_alpha', 'seed', 'max_length'): assert f'| `{f}` | {defaults()[f]} ' in page
