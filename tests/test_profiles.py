"Profiles against what publishers print, against the config classes of transformers, and against what handbooks get wrong"
import json
import os
from pathlib import Path

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')

from ftnb.adapters import trained
from ftnb.arch import Arch
from ftnb.base import UserError, read_json, shipped
from ftnb.models import known_models, read_config
from ftnb.profiles import config_of, profile, profiles, profiles_table, tasks

# As the publishers' files add up (safetensors indices, model cards, print_trainable_parameters)
published = {'llama-3.1-8b': 8_030_261_248, 'llama-3.1-70b': 70_553_706_496, 'mistral-7b-v0.1': 7_241_732_096, 'mistral-7b-v0.2': 7_241_732_096, 'mistral-7b-v0.3': 7_248_023_552, 'mixtral-8x7b': 46_702_792_704,
    'falcon-7b': 6_921_720_704, 'falcon-40b': 41_303_293_952, 'open-llama-7b': 6_738_415_616, 'open-llama-13b': 13_015_864_320, 'llama-3.2-1b': 1_235_814_400, 'llama-3.2-3b': 3_212_749_824, 'qwen2.5-0.5b': 494_032_768,
    'qwen2.5-7b': 7_615_616_512, 'gemma-2-2b': 2_614_341_888, 'gemma-2-9b': 9_241_705_984, 'phi-3-mini': 3_821_079_552, 'smollm2-135m': 134_515_008, 'powerlm-3b': 3_510_819_072}

def test_every_model_asked_for_has_a_profile(): assert {p.name for p in profiles()}==set(published)

@pytest.mark.parametrize('name', published)
def test_parameters_are_the_published_ones(name):
    p = profile(name)
    assert p.arch.params==p.params==published[name]

def test_a_wrong_number_in_a_config_would_be_seen():
    for name in published:
        c = profile(name).config
        for k in ('num_hidden_layers', 'vocab_size', 'hidden_size'): assert Arch.read({**c, k: c[k]*2}).params!=published[name]

@pytest.mark.parametrize('name', published)
def test_configs_are_what_transformers_reads(name):
    "The true config class, and the true model on the meta device, agree with what is shipped"
    torch, tf = pytest.importorskip('torch'), pytest.importorskip('transformers')
    c, a = profile(name).config, profile(name).arch
    real = tf.AutoConfig.for_model(**{k:v for k,v in c.items() if not k.startswith('_') and k not in ('architectures', 'torch_dtype')})
    assert real.max_position_embeddings==a.max_position_embeddings and (getattr(real, 'sliding_window', None) or None)==a.sliding_window
    real.num_hidden_layers = 1
    if getattr(real, 'layer_types', None): real.layer_types = real.layer_types[:1]
    with torch.device('meta'): model = tf.AutoModelForCausalLM.from_config(real)
    assert model.num_parameters()==Arch.read({**c, 'num_hidden_layers': 1}).params
    assert type(model).__name__==c['architectures'][0]

@pytest.mark.parametrize('name', published)
def test_targets_are_layers_of_the_model(name):
    "The names are the model's own, and all of its linear layers but the head; a mixture's experts are left out"
    p = profile(name)
    own = {m.name for m in p.arch.modules() if m.kind=='linear' and m.path!='lm_head'}
    assert set(p.targets)==own
    assert trained(p.arch, 'lora', 8, p.targets)
    if not p.arch.experts: assert sum(t.params for t in trained(p.arch, 'lora', 8, p.targets))==sum(t.params for t in trained(p.arch, 'lora', 8, 'all-linear'))

@pytest.mark.parametrize('name', published)
def test_a_profile_says_everything(name):
    p = profile(name)
    for v in (p.hub, p.licence, p.template, p.quirks, p.best_for, p.when, p.tasks, p.speed): assert v
    assert set(p.tasks)<=set(tasks) and (p.mmlu is None or (25<p.mmlu<90 and p.mmlu_source))
    if name not in known_models: assert p.config['_source'] and p.config['_licence']==p.licence and p.config['_name_or_path']==p.hub
    assert p.hub in repr(p) and p.hub in p._repr_html_()

# ---- what handbooks get wrong

def test_windows_of_mistral():
    v1, v2, v3 = [profile(f'mistral-7b-v0.{i}') for i in (1, 2, 3)]
    assert (v1.window, v1.context)==(4096, 32768) and v2.window is None and v3.window is None
    assert v1.params==v2.params<v3.params and v3.arch.vocab_size-v1.arch.vocab_size==768

def test_experts_of_mixtral():
    a = profile('mixtral-8x7b').arch
    assert round(a.params/1e9, 1)==46.7 and round(a.active_params/1e9, 1)==12.9 and (a.experts, a.experts_per_token)==(8, 2)
    assert '8-bit' not in profile('mixtral-8x7b').when and any('16 bits' in q for q in profile('mixtral-8x7b').quirks)

def test_heads_and_context_of_falcon():
    for n,kv in (('7b', 1), ('40b', 8)): assert (profile(f'falcon-{n}').arch.kv_heads, profile(f'falcon-{n}').context)==(kv, 2048)

def test_context_of_llama(): assert {profile(n).context for n in ('llama-3.1-8b', 'llama-3.1-70b')}=={131072} and {profile(n).context for n in ('open-llama-7b', 'open-llama-13b')}=={2048}

def test_templates():
    for n in published:
        if n.startswith(('llama', 'mistral', 'mixtral', 'gemma')): assert profile(n).template.startswith('none in the base model')
        if 'mistral' in n or 'mixtral' in n: assert 'no newline after [/INST]' in profile(n).template and '<s>' in profile(n).template

def test_speed_follows_the_parameters_a_token_meets():
    order = ['very fast', 'fast', 'medium', 'slow', 'very slow']
    by = sorted(profiles(), key=lambda p: p.arch.active_params)
    assert [order.index(p.speed) for p in by]==sorted(order.index(p.speed) for p in by)
    assert profile('mixtral-8x7b').speed=='slow' and profile('llama-3.1-70b').speed=='very slow' and profile('smollm2-135m').speed=='very fast'

# ---- names

@pytest.mark.parametrize('name,want', [('Llama-3.1-8B', 'llama-3.1-8b'), ('meta-llama/Meta-Llama-3.1-8B-Instruct', 'llama-3.1-8b'), ('mistralai/Mistral-7B-Instruct-v0.2', 'mistral-7b-v0.2'), ('google/gemma-2-9b-it', 'gemma-2-9b'),
    ('HuggingFaceTB/SmolLM2-135M-Instruct', 'smollm2-135m'), ('microsoft/Phi-3-mini-4k-instruct', 'phi-3-mini')])
def test_names(name, want): assert profile(name).name==want

def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'mixtral-8x7b'"): profile('mixtral-8x7')
    with pytest.raises(UserError, match='no profile of .Llama-2-8b.'): profile('Llama-2-8b')

def test_no_hub_id_stands_for_two_models():
    ids = [n.lower() for p in profiles() for n in (p.name, p.hub, *p.also)]
    assert len(ids)==len(set(ids))

def test_config_of_finds_shipped_and_own_configs(tmp_path):
    assert config_of('mistralai/Mixtral-8x7B-v0.1')==read_json(shipped('data', 'models', 'mixtral-8x7b.json'))
    assert config_of('smollm2-135m')==read_config('smollm2-135m')
    (tmp_path/'config.json').write_text(json.dumps(dict(model_type='llama')))
    assert config_of(str(tmp_path))==dict(model_type='llama')
    with pytest.raises(UserError): config_of('no-such-model')

def test_the_table_has_every_model(): assert {r['model'] for r in profiles_table()}==set(published)

def test_every_config_that_ships_belongs_to_a_profile(): assert {p.stem for p in Path(shipped('data', 'models', 'smollm2-135m.json')).parent.glob('*.json')}==set(published)
