"Shapes and counts against the real classes: every module of every family, every tensor PEFT trains, published sizes"
import json, os
from collections import Counter
from dataclasses import fields

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
torch = pytest.importorskip('torch')
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from torch import nn

from ftnb.adapters import trained
from ftnb.arch import Arch, Linear, defaults, families
from ftnb.base import UserError
from ftnb.targets import expert_names, resolve

tiny = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=160, intermediate_size=96)
experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
gqa = dict(num_key_value_heads=2)
# name: (model_type, what it adds to `tiny`); each family with the keys that change its shapes
variants = dict(
    llama=('llama', {}), llama_tied_gqa=('llama', dict(gqa, tie_word_embeddings=True)), llama_biases=('llama', dict(gqa, attention_bias=True, mlp_bias=True)),
    llama_head_dim=('llama', dict(gqa, head_dim=24)), llama_null=('llama', dict(num_key_value_heads=None, head_dim=None)),
    granite=('granite', gqa), granite_biases=('granite', dict(gqa, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    mistral=('mistral', gqa), mistral_head_dim=('mistral', dict(gqa, head_dim=24, tie_word_embeddings=True)),
    mixtral=('mixtral', dict(gqa, num_local_experts=4, num_experts_per_tok=2)), mixtral_head_dim=('mixtral', dict(gqa, num_local_experts=3, num_experts_per_tok=1, head_dim=24)),
    qwen2=('qwen2', gqa), qwen2_tied=('qwen2', dict(gqa, tie_word_embeddings=True)), qwen2_head_dim=('qwen2', dict(gqa, head_dim=24)),
    qwen3=('qwen3', gqa), qwen3_biases=('qwen3', dict(gqa, head_dim=24, attention_bias=True, tie_word_embeddings=True)),
    qwen2_moe=('qwen2_moe', dict(gqa, **experts, shared_expert_intermediate_size=48)),
    qwen2_moe_dense=('qwen2_moe', dict(gqa, **experts, shared_expert_intermediate_size=48, qkv_bias=False, mlp_only_layers=[1])),
    qwen3_moe=('qwen3_moe', dict(gqa, **experts, head_dim=24)), qwen3_moe_dense=('qwen3_moe', dict(gqa, **experts, attention_bias=True, decoder_sparse_step=2)),
    gemma=('gemma', gqa), gemma_untied=('gemma', dict(gqa, head_dim=24, tie_word_embeddings=False, attention_bias=True)),
    gemma2=('gemma2', gqa), gemma2_untied=('gemma2', dict(gqa, head_dim=24, tie_word_embeddings=False)),
    gemma3=('gemma3_text', gqa), gemma3_head_dim=('gemma3_text', dict(gqa, head_dim=24, attention_bias=True)),
    phi=('phi', {}), phi_norms=('phi', dict(gqa, qk_layernorm=True)), phi_tied=('phi', dict(tie_word_embeddings=True)),
    phi3=('phi3', {}), phi3_gqa_tied=('phi3', dict(gqa, tie_word_embeddings=True)),
    falcon_7b=('falcon', {}), falcon_untied=('falcon', dict(tie_word_embeddings=False)), falcon_40b=('falcon', dict(new_decoder_architecture=True, num_kv_heads=2)),
    falcon_11b=('falcon', dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1)),
    falcon_rw=('falcon', dict(alibi=True, bias=True, multi_query=False, parallel_attn=False)), falcon_ffn=('falcon', dict(ffn_hidden_size=100, multi_query=False)))


def config(name):
    t, extra = variants[name]
    return dict(tiny, **extra, model_type=t)

def real(cfg):
    "The real class, on the meta device: shapes without memory"
    with torch.device('meta'): return AutoModelForCausalLM.from_config(AutoConfig.for_model(**dict(cfg, pad_token_id=None)))

def real_modules(model):
    "What `Arch.modules` claims, from the real model: (path, kind, shape, bias) of whatever owns weights"
    res = []
    for path,m in model.named_modules():
        own = dict(m.named_parameters(recurse=False))
        if not own: continue
        if type(m).__name__.endswith('Experts'): res += [(f'{path}.{n}', 'experts', tuple(p.shape), False) for n,p in own.items()]
        else:
            kind = 'linear' if isinstance(m, nn.Linear) else 'embedding' if isinstance(m, nn.Embedding) else 'router' if 'Router' in type(m).__name__ else 'norm'
            assert set(own) <= {'weight', 'bias'}, (path, own)
            res.append((path, kind, tuple(m.weight.shape), own.get('bias') is not None))
    return res


def test_every_family_has_a_variant(): assert {t for t,_ in variants.values()}==set(families)

@pytest.mark.parametrize('name', variants)
def test_modules(name):
    cfg = config(name)
    arch, model = Arch.read(cfg), real(cfg)
    assert sorted(tuple(m) for m in arch.modules())==sorted(real_modules(model))
    assert arch.params==model.num_parameters()==sum(p.numel() for p in model.parameters())
    assert arch.embedding_params==model.get_input_embeddings().weight.numel()
    assert arch.tied==(model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    norms = [m for m in model.modules() if 'Norm' in type(m).__name__]
    assert arch.norm_params==sum(p.numel() for m in norms for p in m.parameters())
    linear = Counter((n.rpartition('.')[2], m.in_features, m.out_features, m.bias is not None) for n,m in model.named_modules() if isinstance(m, nn.Linear))
    assert set(arch.linears())=={Linear(*k[:3], n, k[3]) for k,n in linear.items()}

@pytest.mark.parametrize('name', variants)
def test_fields(name):
    cfg = config(name)
    arch, c = Arch.read(cfg), AutoConfig.for_model(**cfg)
    assert (arch.layers, arch.heads, arch.hidden_size, arch.vocab_size)==(c.num_hidden_layers, c.num_attention_heads, c.hidden_size, c.vocab_size)
    assert arch.max_position_embeddings==c.max_position_embeddings
    assert (arch.sliding_window or 0)==(getattr(c, 'sliding_window', None) or 0)
    attn = real(cfg).get_submodule(f'{arch.layout.block}.0.{arch.layout.attn}')
    assert arch.head_dim==attn.head_dim
    kv = attn.num_kv_heads if arch.model_type=='falcon' else c.num_key_value_heads
    assert arch.kv_heads==kv

@pytest.mark.parametrize('name', [n for n,(t,_) in variants.items() if 'mo' in t or 'mix' in t])
def test_active_params(name):
    "Counted on the real model: of each fused tensor, the slices of the experts a token is sent to"
    cfg = config(name)
    k, model = cfg['num_experts_per_tok'], real(cfg)
    assert Arch.read(cfg).active_params==sum(p[:k].numel() if p.ndim==3 else p.numel() for p in model.parameters())

# ---- what PEFT trains

def real_trained(cfg, **lora):
    if lora['target_modules']=='all-linear' and cfg['model_type'] in expert_names: lora['target_modules'] = resolve(Arch.read(cfg), 'all-linear', experts=True) # without the router
    model = get_peft_model(real(cfg), LoraConfig(r=8, task_type='CAUSAL_LM', **lora))
    return Counter(tuple(p.shape) for p in model.parameters() if p.requires_grad)

def ours_trained(cfg, target_modules='all-linear', **k): return Counter(t.shape for t in trained(Arch.read(cfg), 'lora', 8, target_modules, **k))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('lora', [dict(target_modules='all-linear'), dict(target_modules='all-linear', bias='all'), dict(target_modules='all-linear', bias='lora_only'),
    dict(target_modules='all-linear', modules_to_save=['lm_head']), dict(target_modules='all-linear', modules_to_save=['lm_head'], bias='all')],
    ids=['all', 'bias_all', 'bias_lora', 'head', 'head_bias'])
@pytest.mark.parametrize('name', variants)
def test_lora_all_linear(name, lora):
    got = real_trained(config(name), **lora)
    assert ours_trained(config(name), **lora)==got
    assert sum(n*torch.Size(s).numel() for s,n in got.items())==Arch.read(config(name)).lora_params(8, 'all-linear', lora.get('modules_to_save'), lora.get('bias', 'none'))

lists = [('llama', ['q_proj', 'v_proj']), ('llama_biases', ['self_attn.o_proj', 'down_proj', 'lm_head']), ('llama_tied_gqa', ['embed_tokens', 'q_proj']),
    ('llama', ['model.layers.1.mlp.up_proj']), ('llama', r'.*\.(0|2)\.self_attn\.[qk]_proj'), ('llama', ['q_proj', 'no_such_layer']), ('falcon_7b', ['query_key_value']),
    ('phi', ['fc1', 'dense']), ('phi3', ['qkv_proj', 'gate_up_proj']), ('mixtral', ['q_proj', 'v_proj']), ('mixtral', ['w1', 'w2', 'w3']), ('mixtral', ['gate', 'experts.w2']),
    ('qwen3_moe', ['gate_proj', 'up_proj']), ('qwen3_moe_dense', ['q_proj', 'gate_proj', 'up_proj', 'down_proj']), ('qwen2_moe_dense', ['gate_proj', 'shared_expert_gate']),
    ('qwen2_moe', ['gate_proj', 'up_proj', 'down_proj'])]

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name,targets', lists)
def test_lora_lists(name, targets): assert ours_trained(config(name), targets)==real_trained(config(name), target_modules=targets)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('save', [['embed_tokens'], ['embed_tokens', 'lm_head'], ['mlp'], ['norm'], ['layers.1.self_attn']])
@pytest.mark.parametrize('name', ['llama_biases', 'llama_tied_gqa'])
def test_modules_to_save(name, save):
    lora = dict(target_modules=['q_proj', 'v_proj'], modules_to_save=save)
    assert ours_trained(config(name), **lora)==real_trained(config(name), **lora)

def test_what_peft_refuses_is_refused():
    for name,targets in [('mixtral', ['w1']), ('qwen3_moe', ['gate_proj']), ('qwen2_moe', ['gate']), ('llama', ['norm']), ('mixtral', ['gate_proj'])]:
        with pytest.raises(UserError): trained(Arch.read(config(name)), 'lora', 8, targets)
        with pytest.raises(ValueError): real_trained(config(name), target_modules=targets)
    with pytest.raises(UserError, match='list of names'): trained(Arch.read(config('mixtral')), 'lora', 8, '.*q_proj')

@pytest.mark.parametrize('name', variants)
def test_full(name):
    got = Counter(tuple(p.shape) for p in real(config(name)).parameters())
    assert Counter(t.shape for t in trained(Arch.read(config(name)), 'full'))==got

# ---- published models: their config.json, shortened to the keys that give shapes

published = dict(
    llama2_7b=(6_738_415_616, dict(model_type='llama', hidden_size=4096, intermediate_size=11008, max_position_embeddings=4096, num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=32, tie_word_embeddings=False, vocab_size=32000)),
    llama31_8b=(8_030_261_248, dict(model_type='llama', attention_bias=False, hidden_size=4096, intermediate_size=14336, max_position_embeddings=131072,
        mlp_bias=False, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, tie_word_embeddings=False, vocab_size=128256)),
    mistral_7b=(7_241_732_096, dict(model_type='mistral', hidden_size=4096, intermediate_size=14336, max_position_embeddings=32768, num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=8, sliding_window=4096, tie_word_embeddings=False, vocab_size=32000)),
    mixtral_8x7b=(46_702_792_704, dict(model_type='mixtral', hidden_size=4096, intermediate_size=14336, max_position_embeddings=32768, num_attention_heads=32,
        num_experts_per_tok=2, num_hidden_layers=32, num_key_value_heads=8, num_local_experts=8, sliding_window=None, tie_word_embeddings=False, vocab_size=32000)),
    falcon_7b=(6_921_720_704, dict(model_type='falcon', alibi=False, bias=False, hidden_size=4544, multi_query=True, new_decoder_architecture=False,
        num_attention_heads=71, num_hidden_layers=32, parallel_attn=True, vocab_size=65024)),
    smollm2_135m=(134_515_008, dict(model_type='llama', attention_bias=False, hidden_size=576, intermediate_size=1536, max_position_embeddings=8192, mlp_bias=False,
        num_attention_heads=9, num_hidden_layers=30, num_key_value_heads=3, tie_word_embeddings=True, vocab_size=49152)),
    qwen25_05b=(494_032_768, dict(model_type='qwen2', hidden_size=896, intermediate_size=4864, max_position_embeddings=32768, num_attention_heads=14,
        num_hidden_layers=24, num_key_value_heads=2, tie_word_embeddings=True, use_sliding_window=False, sliding_window=32768, vocab_size=151936)),
    gemma_2b=(2_506_172_416, dict(model_type='gemma', head_dim=256, hidden_size=2048, intermediate_size=16384, max_position_embeddings=8192,
        num_attention_heads=8, num_hidden_layers=18, num_key_value_heads=1, vocab_size=256000)),
    phi2=(2_779_683_840, dict(model_type='phi', hidden_size=2560, intermediate_size=10240, max_position_embeddings=2048, num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=None, qk_layernorm=False, tie_word_embeddings=False, vocab_size=51200)),
    phi3_mini=(3_821_079_552, dict(model_type='phi3', hidden_size=3072, intermediate_size=8192, max_position_embeddings=4096, num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=32, sliding_window=2047, tie_word_embeddings=False, vocab_size=32064)))

@pytest.mark.parametrize('name', published)
def test_published_sizes(name):
    n, cfg = published[name]
    assert Arch.read(cfg).params==n==real(cfg).num_parameters()

# ---- defaults and mistakes

def real_default(t, key):
    "The default of `key` in the config class of `t`; None where it is no field"
    f = {f.name: f for f in fields(type(AutoConfig.for_model(t)))}
    return f[key].default if key in f else None

@pytest.mark.parametrize('t', defaults)
def test_defaults_are_those_of_the_config_class(t): assert defaults[t]=={k: real_default(t, k) for k in defaults[t]}

@pytest.mark.parametrize('t', families)
def test_a_config_without_optional_keys(t):
    "What a file leaves out is filled as transformers fills it: nothing but the required keys, at the family's own head count"
    c = AutoConfig.for_model(t)
    cfg = {k: getattr(c, k) for k in ('hidden_size', 'num_attention_heads', 'vocab_size')} | dict(model_type=t, num_hidden_layers=2)
    for k in ('intermediate_size', 'num_local_experts', 'num_experts', 'num_experts_per_tok', 'moe_intermediate_size', 'shared_expert_intermediate_size'):
        if hasattr(c, k): cfg[k] = getattr(c, k)
    assert Arch.read(cfg).params==real(cfg).num_parameters()

def test_a_missing_key_names_key_and_file(tmp_path):
    cfg = config('mixtral')
    for key in ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'vocab_size', 'num_experts_per_tok'):
        (tmp_path/'config.json').write_text(json.dumps({k:v for k,v in cfg.items() if k!=key}))
        with pytest.raises(UserError, match=rf"{tmp_path}/config.json has no key '{key}'"): Arch.read(tmp_path)
    (tmp_path/'config.json').write_text(json.dumps(cfg))
    assert Arch.read(tmp_path)==Arch.read(tmp_path/'config.json')==Arch.read(str(tmp_path))==Arch.read(cfg)
    (tmp_path/'config.json').write_text('{')
    with pytest.raises(UserError, match='no JSON'): Arch.read(tmp_path)

@pytest.mark.parametrize('t,near', [('gemma3', 'gemma'), ('qwen2_5', 'qwen2'), ('mistral3', 'mistral'), ('bert', None), (None, None)])
def test_an_unknown_type_is_named_and_never_guessed(t, near):
    with pytest.raises(UserError) as e: Arch.read(dict(tiny, model_type=t))
    assert repr(t) in str(e.value) and (near is None or f"Did you mean '{near}" in str(e.value))

def test_a_planted_fault_is_seen(monkeypatch):
    "Each term counts: without any one of the tensors of a block the comparison fails"
    for name in ('llama_biases', 'gemma3', 'falcon_rw', 'phi_norms', 'qwen2_moe_dense'):
        arch, want = Arch.read(config(name)), real(config(name)).num_parameters()
        for i in range(len(arch.modules())):
            kept = arch.modules()[:i]+arch.modules()[i+1:]
            monkeypatch.setattr(Arch, 'modules', lambda self: kept)
            assert arch.params!=want
            monkeypatch.undo()
