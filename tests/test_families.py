"Every model family, as a tiny random model of its true class: loaded, quantised, adapted, trained, saved, merged, counted, and fit for GGUF or not"
import math, shutil
from dataclasses import replace

import pytest

torch = pytest.importorskip('torch')
from conftest import Made, make_tiny
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from ftnb.arch import Arch
from ftnb.base import UserError
from ftnb.falcon import PlainFalcon
from ftnb.gguf_ready import gguf_ready
from ftnb.load import load_model
from ftnb.memory import at_least
from ftnb.models import read_config
from ftnb.packing import packed_difference
from ftnb.plan import plan
from ftnb.recipe import make_recipe
from ftnb.runs import Run
from ftnb.train import make_trainer
from ftnb.tune import count_parameters, make_trainable

wide = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
moe = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
# family: (model_type, what makes it that family, the models of that class, as the guide says them)
families = {
    'Llama 3.1, 3.2': ('llama', dict(rope_parameters=dict(rope_type='llama3', rope_theta=5e5, factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=64), tie_word_embeddings=False)),
    'OpenLLaMA, Llama 2': ('llama', dict(num_key_value_heads=4, tie_word_embeddings=False)),
    'SmolLM2': ('llama', dict(tie_word_embeddings=True)),
    'Mistral': ('mistral', dict(sliding_window=16, tie_word_embeddings=False)),
    'Mixtral': ('mixtral', dict(num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)),
    'Falcon 7B': ('falcon', dict(multi_query=True, parallel_attn=True, bias=False, num_key_value_heads=None)),
    'Falcon 40B': ('falcon', dict(new_decoder_architecture=True, num_kv_heads=2, bias=False, num_key_value_heads=None)),
    'Falcon RW': ('falcon', dict(alibi=True, bias=True, multi_query=False, parallel_attn=False, num_key_value_heads=None)),
    'Qwen2, Qwen2.5': ('qwen2', {}),
    'Qwen2-MoE': ('qwen2_moe', dict(moe, shared_expert_intermediate_size=64)),
    'Qwen3': ('qwen3', dict(head_dim=16)),
    'Qwen3-MoE': ('qwen3_moe', dict(moe, head_dim=16)),
    'Gemma': ('gemma', dict(head_dim=16, num_key_value_heads=1)),
    'Gemma 2': ('gemma2', dict(head_dim=16, sliding_window=16)),
    'Gemma 3': ('gemma3_text', dict(head_dim=16, sliding_window=16)),
    'Phi-1, Phi-2': ('phi', dict(num_key_value_heads=4, tie_word_embeddings=False)),
    'Phi-3': ('phi3', dict(tie_word_embeddings=False)),
    'Granite': ('granite', {}),
    'GPT-2': ('gpt2', {}),
    'GPT-NeoX, Pythia': ('gpt_neox', dict(tie_word_embeddings=False))}
uncounted = ('GPT-2', 'GPT-NeoX, Pythia') # trained, without a forecast of memory
kernel = {'Gemma 2': 'eager'}
not_packed = ('Falcon 7B', 'Falcon 40B', 'Falcon RW')
no_gguf = ('Falcon RW',)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Saved tiny models, made when asked for"
    made = {}
    def make(name):
        kind, kw = families[name]
        if name not in made: made[name] = make_tiny(tmp_path_factory.mktemp('family')/kind, kind, **{**wide, **kw})
        return made[name]
    return make

def recipe(folder, name, **kw):
    return make_recipe(dict(dict(model_name_or_path=folder(name), dtype='float32', use_cpu=True, peft='lora', lora_r=4, attn_implementation=kernel.get(name, 'sdpa')), **kw))

ids = torch.arange(10, 44)[None]
def logits(model):
    model.eval()
    with torch.no_grad(): return model(input_ids=ids, use_cache=False).logits

def linear4(model): return sum(type(m).__name__=='Linear4bit' for m in model.modules())
def adapted(model): return sorted({n.rpartition('.')[2] for n,m in model.named_modules() if isinstance(m, BaseTunerLayer) and hasattr(m, 'lora_A') and len(m.lora_A)})

@pytest.fixture(scope='module')
def prepared(tiny, tmp_path_factory):
    "A run with prepared rows; all families here have one tokenizer"
    return Made(tiny, tmp_path_factory.mktemp('prepared'))([dict(prompt=f'What is {i}?', completion=f'{i}.') for i in range(24)], peft='lora', lora_r=4, max_steps=1, valid_size=0, learning_rate=1e-2, lr_scheduler_type='constant', warmup_steps=0, per_device_train_batch_size=2)

@pytest.mark.parametrize('name', families)
def test_a_family_goes_all_the_way(folder, prepared, tmp_path, name):
    "Load, adapter on all linear layers, one step by ftnb's trainer, save, load into a fresh model, merge"
    r = recipe(folder, name)
    shutil.copytree(prepared.folder, tmp_path/'run')
    trainer = make_trainer(Run(tmp_path/'run', replace(prepared.recipe, model_name_or_path=r.model_name_or_path, attn_implementation=r.attn_implementation)))
    trainer.train()
    loss = next(h['loss'] for h in trainer.state.log_history if 'loss' in h)
    moved = [p for n,p in trainer.model.named_parameters() if 'lora_B' in n]
    assert math.isfinite(loss) and moved and sum(p.any().item() for p in moved)>=len(moved)/2
    want = logits(trainer.model)
    trainer.save_model(str(tmp_path/'adapter'))
    base = load_model(r)
    base.config.use_cache = False
    plain = logits(base)
    again = PeftModel.from_pretrained(base, str(tmp_path/'adapter'))
    assert torch.equal(logits(again), want) and (want-plain).abs().max()>1e-5
    merged = again.merge_and_unload(safe_merge=True)
    assert (logits(merged)-want).abs().max()<=1e-5*want.abs().max()
    merged.save_pretrained(tmp_path/'merged')
    assert (logits(load_model(r, path=tmp_path/'merged'))-want).abs().max()<=1e-5*want.abs().max()

@pytest.mark.parametrize('name', families)
@pytest.mark.filterwarnings('ignore:bitsandbytes')
def test_qlora_stands_on_real_4bit_layers_and_they_are_counted(folder, name):
    r = recipe(folder, name, peft='qlora')
    whole, model = load_model(recipe(folder, name)), load_model(r)
    if name not in uncounted: n = sum(m.kind=='linear' and m.path!='lm_head' for m in Arch.read(folder(name)).modules())
    else: n = 2*4
    assert linear4(model)==n
    packed = sum(2*p.numel() for m in model.modules() if type(m).__name__=='Linear4bit' for p in [m.weight])
    assert count_parameters(model)[0]==sum(p.numel() for p in whole.parameters()) and packed>n*64*16
    model = make_trainable(model, r).train()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert math.isfinite(loss.item()) and all(p.grad is not None for n,p in model.named_parameters() if 'lora_B' in n)

@pytest.mark.parametrize('name', [n for n in families if n not in uncounted])
def test_arithmetic_knows_the_family(folder, name):
    "Parameters, what a LoRA trains, and the plan's forecast, from config.json alone"
    r, arch = recipe(folder, name), Arch.read(folder(name))
    model = load_model(r)
    assert arch.params==sum(p.numel() for p in model.parameters())
    assert arch.lora_params(4)==count_parameters(make_trainable(model, r))[1]==at_least(arch, lora_r=4).params_trained
    p = plan(r, '24GB', rows=10, search=False)
    assert p.report['memory'] and not any('no forecast' in n for n in p.report['notes'])

@pytest.mark.parametrize('name', uncounted)
def test_a_family_that_is_not_counted_is_said_to_be(folder, name):
    assert any('no forecast of memory' in n and repr(families[name][0]) in n for n in plan(recipe(folder, name), '24GB', rows=10, search=False).report['notes'])

@pytest.mark.parametrize('name', families)
def test_packing_is_clean_or_refused(folder, name):
    d = packed_difference(recipe(folder, name))
    assert d>1e-3 or d!=d if name in not_packed else d<1e-5

@pytest.mark.parametrize('name', families)
def test_gguf_is_known_or_refused(folder, name):
    g = gguf_ready(read_config(folder(name)))
    assert bool(g)==(name not in no_gguf) and bool(g.why)==(not g)

# what is special in a family

def test_fused_layers_are_targets_by_their_own_names(folder):
    for name,fused in (('Falcon 7B', ['query_key_value']), ('Phi-3', ['gate_up_proj', 'qkv_proj'])):
        m = make_trainable(load_model(recipe(folder, name)), recipe(folder, name))
        assert set(fused)<=set(adapted(m))
        only = make_trainable(load_model(recipe(folder, name)), recipe(folder, name, lora_target_modules=fused))
        assert adapted(only)==fused and count_parameters(only)[1]==Arch.read(folder(name)).lora_params(4, fused)

def test_a_router_stays_frozen_unless_it_is_named_and_experts_are_trained(folder):
    for name in ('Mixtral', 'Qwen3-MoE'):
        trained = {n for n,p in make_trainable(load_model(recipe(folder, name)), recipe(folder, name)).named_parameters() if p.requires_grad}
        assert any('.experts.' in n for n in trained) and not any('.gate.' in n for n in trained)
        asked = make_trainable(load_model(recipe(folder, name)), r := recipe(folder, name, lora_target_modules=['all-linear', 'gate']))
        assert any('.gate.' in n for n,p in asked.named_parameters() if p.requires_grad)
        assert count_parameters(asked)[1]==Arch.read(folder(name)).lora_params(4, r.lora_target_modules)>Arch.read(folder(name)).lora_params(4)

def test_the_loss_of_a_mixture_holds_its_gate_loss_as_in_trl(folder, prepared, tmp_path):
    shutil.copytree(prepared.folder, tmp_path/'run')
    t = make_trainer(Run(tmp_path/'run', replace(prepared.recipe, model_name_or_path=folder('Mixtral'))))
    batch = next(iter(t.get_train_dataloader()))
    t.current_gradient_accumulation_steps = 1
    def loss(): return t.compute_loss(t.model.eval(), dict(batch), num_items_in_batch=(batch['labels'][:, 1:]!=-100).sum()).item()
    assert t.aux_loss_enabled and t.model.config.output_router_logits
    small = loss()
    t.model.config.router_aux_loss_coef = t.router_aux_loss_coef = t.model.get_base_model().router_aux_loss_coef = 1.
    assert loss()>small+.5

def test_experts_that_stay_whole_in_4_bits_are_said_with_their_bytes(folder):
    r = recipe(folder, 'Mixtral', peft='qlora')
    assert any('experts stay' in n and 'GiB' in n for n in plan(r, '24GB', rows=10, search=False).report['notes'])
    experts = [p for n,p in load_model(r).named_parameters() if '.experts.' in n]
    assert experts and all(p.dtype==torch.float32 and p.ndim==3 for p in experts)

def test_a_soft_cap_asks_for_eager_attention_in_one_sentence(folder):
    with pytest.raises(UserError, match='attn_implementation: sdpa .*eager'): load_model(recipe(folder, 'Gemma 2', attn_implementation='sdpa'))
    assert any('eager' in n for n in plan(recipe(folder, 'Gemma 2', attn_implementation='sdpa'), '24GB', rows=10, search=False).report['notes'])

def test_a_window_cuts_what_a_model_sees_and_what_its_cache_holds(folder):
    from ftnb.kvcache import kv_cache
    for name in ('Mistral', 'Gemma 2', 'Gemma 3'):
        c = read_config(folder(name))
        assert kv_cache(c, length=400).total<kv_cache({**c, 'sliding_window': None, 'layer_types': None}, length=400).total

def test_biases_of_qwen_stay_frozen_and_come_along(folder):
    r = recipe(folder, 'Qwen2, Qwen2.5')
    m = load_model(r)
    torch.nn.init.normal_(m.model.layers[0].self_attn.q_proj.bias)
    want = logits(m)
    m = make_trainable(m, r)
    assert not any(p.requires_grad for n,p in m.named_parameters() if n.endswith('bias'))
    assert torch.allclose(logits(m.merge_and_unload()), want, atol=1e-5)

@pytest.mark.parametrize('name', ['SmolLM2', 'Qwen2, Qwen2.5', 'Gemma', 'Falcon 7B'])
def test_tied_embeddings_stay_tied_when_an_adapter_is_merged(folder, tmp_path, name):
    r = recipe(folder, name)
    make_trainable(load_model(r), r).merge_and_unload().save_pretrained(tmp_path)
    m = load_model(r, path=tmp_path)
    assert m.config.tie_word_embeddings and m.get_output_embeddings().weight is m.get_input_embeddings().weight

def test_a_falcon_in_4_bits_answers_as_one_in_16_but_for_the_rounding(folder):
    whole, small = load_model(recipe(folder, 'Falcon 40B')), load_model(recipe(folder, 'Falcon 40B', peft='qlora'))
    assert type(small) is PlainFalcon
    back = logits(small.dequantize(torch.float32))
    assert 0<(back-logits(whole)).abs().max()<.2*logits(whole).abs().max()

def test_gguf_asks_for_what_the_converter_needs_otherwise(folder):
    assert gguf_ready(read_config(folder('Falcon 7B'))).settings==dict(num_kv_heads=1)
    assert [n for n in families if gguf_ready(read_config(folder(n))).files]==['Gemma', 'Gemma 2', 'Phi-3']
    assert 'post_attention_layernorm' in gguf_ready(read_config(folder('Falcon RW'))).why

def test_the_guide_says_what_is_tested_here():
    import importlib.util
    from pathlib import Path
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location('families_page', root/'tools/families.py')
    spec.loader.exec_module(m := importlib.util.module_from_spec(spec))
    assert (root/'guides/families.qmd').read_text()==m.page(), 'run python tools/families.py'
