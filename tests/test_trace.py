"The exact path against real objects: bytes of weights, adapters, gradients and states; the peak of a real step; depth; published peaks"
import gc, json, logging, os
from pathlib import Path

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
torch = pytest.importorskip('torch')
import peft
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import ftnb.trace as ft
from ftnb.allocator import MiB, Allocator, replay, rounded
from ftnb.arch import Arch
from ftnb.base import UserError, shipped
from ftnb.faithful import _everywhere, _on_cuda, faithful, kernels
from ftnb.memory import at_least
from ftnb.standin import alike, make_optimizer, peft_config
from ftnb.step import Step
from ftnb.storages import Storages
from ftnb.trace import trace, trace_layers

tiny = dict(model_type='llama', hidden_size=64, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, intermediate_size=104, vocab_size=160, pad_token_id=0, tie_word_embeddings=False)
def step(config=tiny, **kw): return Step(config, **{**dict(batch=2, length=24, padded=False, activation_checkpointing=False), **kw})
def on_cpu(config=tiny, **kw): return step(config, **{**dict(device='cpu', dtype='float32', autocast=None, loss='full'), **kw})

@pytest.fixture(scope='module')
def traced():
    "A trace to be counted, not to be looked at"
    return trace_layers(step(), 5)

# ---- bytes of what stays, against the real objects of a real step

def nbytes(tensors): return sum({s.data_ptr(): s.nbytes() for t in tensors if t is not None for s in [t.untyped_storage()]}.values())

def real_model(s, folder):
    "The model of a step as `from_pretrained` and PEFT make it, on the CPU"
    config = AutoConfig.for_model(**s.config)
    if not (folder/'config.json').exists(): AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    q = {16: None, 8: BitsAndBytesConfig(load_in_8bit=True), 4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=s.double_quant, bnb_4bit_compute_dtype=getattr(torch, s.dtype))}[s.bits]
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=q, dtype=getattr(torch, s.dtype), device_map='cpu')
    if s.peft!='full': model = peft.get_peft_model(model, peft_config(s))
    if s.bits<16: # as TRL's trainer does
        for p in model.parameters():
            if p.requires_grad: p.data = p.data.to(torch.bfloat16)
    return model.train()

def beside(model):
    "Buffers, and what belongs to quantised weights"
    states = [o for m in model.modules() if (q := getattr(getattr(m, 'weight', None), 'quant_state', None)) for o in [q, *([q.state2] if q.nested else [])]]
    scales = [o.SCB for m in model.modules() for o in (getattr(m, 'weight', None), getattr(m, 'state', None)) if getattr(o, 'SCB', None) is not None]
    return [t for o in states for t in (o.absmax, o.code, o.offset)]+scales+list(model.buffers())

def real_bytes(s, folder):
    "{owner: bytes} after a real optimizer step"
    model = real_model(s, folder)
    opt = make_optimizer(s, model)
    ids = torch.zeros(s.batch, s.length, dtype=torch.long)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    opt.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    return {'frozen weights': nbytes([p for p in model.parameters() if not p.requires_grad]+beside(model)), 'trained weights': nbytes(trained), 'gradients': nbytes([p.grad for p in trained]),
        'optimizer': nbytes([t for d in opt.state.values() for t in d.values() if isinstance(t, torch.Tensor)])}

cases = dict(full=dict(peft='full'), lora={}, lora_bias_and_copy=dict(lora_bias='all', modules_to_save=('lm_head',)), nf4=dict(bits=4, dtype='bfloat16'), nf4_single=dict(bits=4, double_quant=False, dtype='bfloat16'), int8=dict(bits=8, dtype='bfloat16'),
    prompt=dict(peft='prompt'), prefix=dict(peft='prefix'), ia3=dict(peft='ia3'), half=dict(dtype='bfloat16'),
    adam_8bit=dict(peft='full', optim='adamw_8bit'), lion=dict(peft='full', optim='lion_8bit'), adafactor=dict(peft='full', optim='adafactor'), momentum_free=dict(optim='sgd'))
@pytest.mark.parametrize('name', cases)
def test_what_stays_is_that_of_the_real_objects_to_the_byte(name, tmp_path):
    s = on_cpu(dict(tiny, num_hidden_layers=2), **cases[name])
    traced = trace_layers(s, 2).owners['optimizer step']
    real = real_bytes(s, tmp_path)
    assert {k: traced.get(k, 0) for k in real}==real

def test_bytes_on_cuda_are_rounded_to_512_and_hold_two_workspaces():
    t = trace_layers(step(num_virtual_tokens=3, peft='prompt'), 5)
    assert t.owners['optimizer step']['trained weights']==rounded(3*64*4)
    assert t.owners['optimizer step']['workspace']>=2*8_519_680

@pytest.mark.parametrize('optim', ['adamw_torch_fused', 'adamw_8bit', 'lion_8bit', 'paged_adamw_32bit', 'adafactor', 'sgd'])
def test_optimizer_states_are_those_of_the_closed_form(optim):
    config = dict(tiny, num_hidden_layers=2)
    e = at_least(Arch.read(config), 'full', dtype='float32', optim=optim)
    assert trace_layers(on_cpu(config, peft='full', optim=optim), 2).owners['optimizer step'].get('optimizer', 0)==e.optimizer

# ---- the peak of a real step

def profiled(f):
    "Most bytes that `f` holds at a time, as torch's profiler sees its allocations"
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: f()
    now = [0]
    for e in sorted((e for e in prof.profiler.kineto_results.events() if e.name()=='[memory]'), key=lambda e: e.start_ns()): now.append(now[-1]+e.nbytes())
    return max(now)

@pytest.mark.parametrize('kw', [dict(), dict(peft='full'), dict(lora_dropout=.1, attn='eager'), dict(bits=4, dtype='bfloat16')], ids=str)
def test_the_traced_peak_on_the_cpu_is_that_of_a_real_step(kw, tmp_path):
    s = on_cpu(dict(tiny, hidden_size=128, intermediate_size=256, vocab_size=512), batch=4, length=128, **kw)
    model = real_model(s, tmp_path)
    if s.attn=='eager': model.set_attn_implementation('eager')
    opt = make_optimizer(s, model)
    def steps():
        for _ in range(2):
            ids, labels, third = (torch.zeros(s.batch, s.length, dtype=torch.long) for _ in range(3))
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            loss.backward()
            del loss
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1., foreach=False)
            opt.step()
            opt.zero_grad()
    real = profiled(steps)+nbytes([*model.parameters(), *beside(model)])
    print('traced', traced := trace(s, layers=(5,), cache=False).peak, 'real', real)
    assert traced==pytest.approx(real, rel=1e-4)

@pytest.mark.parametrize('double', [False, True])
def test_a_4bit_product_takes_what_its_kernel_takes(double):
    import bitsandbytes as bnb
    layer = bnb.nn.Linear4bit(256, 128, bias=False, compute_dtype=torch.float32, compress_statistics=double, quant_type='nf4').to('cpu')
    layer.support_avx512bf16_for_cpu, x = False, torch.ones(64, 256, requires_grad=True)
    s = Storages(kernels(device='cpu'), 1)
    for t in [x, layer.weight, *beside(layer)]: t is None or s.see(t, 'frozen weights')
    held = s.now
    with s: layer(x)
    assert s.peaks['start'][0]-held==pytest.approx(profiled(lambda: layer(x)), abs=1024)

# ---- depth

@pytest.mark.parametrize('kw', [dict(activation_checkpointing=True), dict(peft='full', dtype='float32'), dict(bits=4, kbit_prep=True, loss='full', era='4.48', attn='flash_attention_2', padded=True, activation_checkpointing=True), dict(lora_dropout=.1, attn='eager', packed=True),
    dict(peft='full', optim='adamw_torch', accumulates=True), dict(peft='prefix')], ids=str)
def test_three_and_four_layers_tell_the_peak_of_all(kw):
    s = step(dict(tiny, num_hidden_layers=6), length=64, **kw)
    few, whole = (trace(s, layers=d, cache=False) for d in ((3, 4), (6,)))
    assert (few.peak, few.phase, few.by_owner, few.by_phase, few.params_total, few.params_trained)==(whole.peak, whole.phase, whole.by_owner, whole.by_phase, whole.params_total, whole.params_trained)

def test_layers_that_differ_are_traced_one_by_one(monkeypatch, traced):
    s = step(dict(tiny, model_type='qwen3', head_dim=16, use_sliding_window=True, sliding_window=8, layer_types=['full_attention']*4+['sliding_attention']))
    depths = []
    monkeypatch.setattr(ft, 'trace_layers', lambda s, n: depths.append(n) or traced)
    trace(s, cache=False)
    trace(step(dict(tiny, num_hidden_layers=9)), cache=False)
    assert depths==[5, 3, 4] and not alike(s)

# ---- what the tracing leaves behind: nothing

def everything(): return [getattr(o, k, None) for o,k,_ in _everywhere(False)+_on_cuda()]+[gc.isenabled(), logging.root.manager.disable, torch.is_autocast_enabled('cpu')]

def test_foreign_functions_are_put_back_also_after_an_error(monkeypatch):
    from bitsandbytes.functional import name2qmap
    from bitsandbytes.optim import GlobalOptimManager
    from transformers.masking_utils import AttentionMaskInterface
    before, tables, masks = everything(), dict(name2qmap), dict(AttentionMaskInterface._global_mapping)
    with faithful(): assert everything()!=before
    assert everything()==before
    for s in (step(bits=4), step(bits=8), step(peft='full', optim='adamw_8bit')): trace_layers(s, 1)
    monkeypatch.setattr(ft, 'loss_of', lambda *a: 1/0)
    with pytest.raises(ZeroDivisionError): trace_layers(step(bits=4), 1)
    assert everything()==before and not GlobalOptimManager.get_instance().pid2config
    assert dict(AttentionMaskInterface._global_mapping)==masks and dict(name2qmap)==tables
    assert torch.nn.functional.dropout(torch.ones(1000), .5).count_nonzero()<1000

def test_a_real_training_step_works_after_a_trace(tmp_path):
    trace_layers(step(), 1)
    assert real_bytes(on_cpu(bits=4, dtype='bfloat16'), tmp_path)['gradients']

# ---- the allocator

def play(*sizes): return [e for i,n in enumerate(sizes) for e in ((i, n), (i, -1))]

@pytest.mark.parametrize('events, reserved, allocated', [
    ([(0, 1)], 2*MiB, 512), ([(0, MiB), (1, MiB)], 2*MiB, 2*MiB), ([(0, MiB), (1, MiB), (2, 1)], 4*MiB, 2*MiB+512), # small ones share a segment of 2 MiB
    ([(0, MiB+1), (1, 9*MiB)], 20*MiB, 10*MiB+512), ([(0, 10*MiB), (1, 10*MiB)], 20*MiB, 20*MiB), # middle ones one of 20 MiB, large ones have their own
    ([(0, 11*MiB+1)], 12*MiB, 12*MiB), # a rest of less than 1 MiB stays with its block
    ([(0, 30*MiB), (0, -1), (1, 20*MiB), (2, 10*MiB)], 30*MiB, 30*MiB), # a freed block is cut
    ([(0, 30*MiB), (0, -1), (1, 28*MiB+MiB//2), (2, MiB+MiB//4)], 30*MiB, 30*MiB), # a rest of more than 1 MiB is a block
    ([(0, 20*MiB), (1, 40*MiB), (0, -1), (1, -1), (2, 16*MiB), (3, 40*MiB)], 60*MiB, 60*MiB), # best fit: the 40 stays whole
    ([(0, 40*MiB), (0, -1), (1, 20*MiB), (2, 20*MiB), (1, -1), (2, -1), (3, 40*MiB)], 40*MiB, 40*MiB)]) # neighbours join again
def test_the_allocator_on_lists_made_by_hand(events, reserved, allocated):
    d = replay(events)
    assert (d.peak_reserved, d.peak_allocated)==(reserved, allocated)

def test_at_the_limit_free_segments_go_back_first():
    events = play(100*MiB, 200*MiB, 300*MiB)
    assert [(d.peak_reserved//MiB, d.retries, d.out_of_memory) for d in (replay(events, m*MiB) for m in (600, 599, 300, 299))]==[(600, 0, False), (300, 1, False), (300, 1, False), (300, 2, True)]

def test_a_used_block_keeps_its_segment_at_the_limit():
    d = replay([(0, 30*MiB), (1, 10*MiB), (0, -1), (2, 30*MiB), (2, -1), (3, 60*MiB)], 70*MiB)
    assert (d.retries, d.out_of_memory, d.reserved)==(1, False, 70*MiB)

def test_no_byte_is_lost():
    import random
    rng, d, live = random.Random(0), Allocator(), {}
    for i in range(4000):
        if live and rng.random()<.5: d.free(live.popitem()[0] if rng.random()<.5 else (k := rng.choice(list(live)), live.pop(k))[0])
        else:
            live[i] = int(10**rng.uniform(1, 7.7))
            d.malloc(i, live[i])
        assert d.reserved==sum(b.size for b in d.blocks.values()) and d.allocated==sum(b.size for b in d.blocks.values() if not b.free)
        assert d.allocated>=sum(map(rounded, live.values()))
    for k in list(live): d.free(k)
    assert d.allocated==0 and all(b.prev is None and b.next is None for b in d.blocks.values())

def test_reserved_and_the_limit_of_a_step(monkeypatch, traced):
    s = step()
    monkeypatch.setattr(ft, 'trace_layers', lambda s, n: traced)
    f = trace(s, reserved=True, cache=False)
    assert f.peak<=f.reserved and f.fits is None
    assert [trace(s, limit=n, cache=False).fits for n in (f.reserved, f.peak//2)]==[True, False]

# ---- what the forecast says

def test_fused_experts_stay_whole_under_bitsandbytes_and_the_forecast_says_so():
    moe = dict(tiny, model_type='mixtral', num_local_experts=4, num_experts_per_tok=2)
    whole, small = (trace(step(moe, bits=b, lora_target_modules=('q_proj',)), cache=False) for b in (16, 4))
    experts = 5*4*3*64*104*2
    assert small.by_owner['frozen weights']>experts>.8*whole.by_owner['frozen weights']
    assert any('experts' in n for n in small.notes) and not any('experts' in n for n in whole.notes)
    assert not any('experts' in n for n in trace(step(bits=4), cache=False).notes)

@pytest.mark.parametrize('s, said', [(lambda: step(dict(model_type='brainy', auto_map={'AutoConfig': 'x'})), 'auto_map'), (lambda: step(dict(tiny, model_type='lama')), "Did you mean 'llama'"), (lambda: step({k: v for k,v in tiny.items() if k!='num_hidden_layers'}), 'num_hidden_layers'),
    (lambda: step(dict(tiny, quantization_config={})), 'quantised already'), (lambda: step(peft='bottleneck'), 'bottleneck'), (lambda: step(peft='prefix', activation_checkpointing=True), 'activation_checkpointing'), (lambda: step(optim='adamw_troch'), "Did you mean 'adamw_torch'"),
    (lambda: step(lora_target_modules=('q_prj',)), 'q_prj'), (lambda: step(dict(model_type='gemma2', hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=104, vocab_size=160)), 'take eager')])
def test_what_can_not_be_traced_says_so_in_one_sentence(s, said):
    with pytest.raises(UserError) as e: trace(s(), cache=False)
    assert said in str(e.value) and '\n' not in str(e.value)

def test_a_forecast_is_kept_for_this_step_and_these_versions(monkeypatch, traced, tmp_path):
    monkeypatch.setenv('FTNB_HOME', str(tmp_path))
    s, runs = step(), []
    monkeypatch.setattr(ft, 'trace_layers', lambda s, n: runs.append(n) or traced)
    f = trace(s)
    assert trace(s)==f and runs==[3, 4]
    trace(s.but(lora_r=8))
    assert runs==[3, 4]*2
    monkeypatch.setattr(ft, 'version', lambda p: '0.0')
    trace(s)
    assert runs==[3, 4]*3

# ---- published peaks: `max_memory_allocated` on an A100, foundation-model-stack/fms-acceleration, scripts/benchmarks (Apache-2.0); packed rows of 4096 tokens, adapters on q, k, v, o
@pytest.mark.parametrize('model, measured, kw', [
    ('mistral-7b-v0.1', 26704571904, dict(era='4.48', batch=4, autocast=None)), ('mistral-7b-v0.1', 20669338112, dict(era='4.48', batch=4, bits=4, kbit_prep=True)),
    ('mistral-7b-v0.1', 72434837504, dict(era='4.48', batch=4, peft='full', autocast=None)), ('powerlm-3b', 28134687232, dict(era='4.45', batch=8, bits=4))], ids=['LoRA', 'QLoRA', 'full', 'QLoRA, Granite'])
def test_published_peaks(model, measured, kw):
    config = json.loads(Path(shipped('data', 'models', f'{model}.json')).read_text())
    s = Step(config, length=4096, padded=False, lora_target_modules=('q_proj', 'k_proj', 'v_proj', 'o_proj'), lora_dropout=.1, adapter_dtype='float32', attn='flash_attention_2', loss='full', optim='adamw_torch', **kw)
    assert trace(s, cache=False).peak==pytest.approx(measured, rel=.001)
