"The instant path against the exact one on a grid; speed, depth, and what can't be said"
import json, os, subprocess, sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
torch = pytest.importorskip('torch')

from ftnb.arch import Arch
from ftnb.base import UserError, shipped
from ftnb.devices import device
from ftnb.fit import changes, fits as on_device
from ftnb.flops import step_time
from ftnb.forecast import forecast
from ftnb.memory import at_least
from ftnb.recipe import make_recipe
from ftnb.step import Step, step_of
from ftnb.trace import trace

# ---- the grid: every architecture tiny and with the widths of a real model, each with its own dozen of settings

tiny = dict(hidden_size=128, num_attention_heads=4, intermediate_size=320, vocab_size=512, max_position_embeddings=4096, pad_token_id=0)
gqa, moe = dict(num_key_value_heads=2), dict(num_local_experts=4, num_experts_per_tok=2)
models = dict(
    llama=(dict(model_type='llama', **gqa), dict(hidden_size=2048, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192, vocab_size=128256)), # Llama 3.2 1B
    mistral=(dict(model_type='mistral', **gqa, sliding_window=64), dict(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, vocab_size=32000, sliding_window=None)), # 7B v0.2
    qwen2=(dict(model_type='qwen2', **gqa, tie_word_embeddings=True), dict(hidden_size=896, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864, vocab_size=151936)), # Qwen2.5 0.5B
    qwen3=(dict(model_type='qwen3', **gqa, head_dim=64), dict(hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=128, intermediate_size=3072, vocab_size=151936)), # 0.6B
    gemma=(dict(model_type='gemma', num_key_value_heads=1, head_dim=64), dict(hidden_size=2048, num_attention_heads=8, num_key_value_heads=1, head_dim=256, intermediate_size=16384, vocab_size=256000)), # 2B
    gemma3=(dict(model_type='gemma3_text', num_key_value_heads=2, head_dim=64, sliding_window=64), dict(hidden_size=1152, num_attention_heads=4, num_key_value_heads=1, head_dim=256, intermediate_size=6912, vocab_size=262144, sliding_window=512)), # 1B
    phi=(dict(model_type='phi', qk_layernorm=True, hidden_act='gelu'), dict(hidden_size=2560, num_attention_heads=32, intermediate_size=10240, vocab_size=51200, hidden_act='gelu_pytorch_tanh', partial_rotary_factor=.4, resid_pdrop=.1, qk_layernorm=False)), # phi-2
    phi3=(dict(model_type='phi3', **gqa), dict(hidden_size=3072, num_attention_heads=32, num_key_value_heads=32, intermediate_size=8192, vocab_size=32064)), # mini
    falcon=(dict(model_type='falcon', new_decoder_architecture=False, multi_query=False, bias=True), dict(hidden_size=8192, num_attention_heads=128, num_kv_heads=8, vocab_size=65024, new_decoder_architecture=True, bias=False)), # 40B
    mixtral=(dict(model_type='mixtral', **gqa, **moe), dict(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, vocab_size=32000, num_local_experts=8)), # 8x7B
    granite=(dict(model_type='granite', **gqa), dict(hidden_size=2048, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192, vocab_size=49155))) # 3.0 2B

whole, kbit = dict(activation_checkpointing=False), dict(bits=4, kbit_prep=True)
settings = [{}, whole, dict(peft='full'), dict(bits=4), dict(bits=8), dict(whole, loss='full', padded=True), dict(peft='full', dtype='float32'), dict(whole, bits=4, lora_dropout=.1, padded=True), dict(whole, lora_dropout=.05, lora_r=64),
    dict(peft='full', autocast=None, optim='adamw_torch', loss='full'), dict(kbit, loss='full'), dict(whole, attn='eager'), dict(attn='flash_attention_2', padded=True), dict(whole, autocast=None, padded=True),
    dict(peft='ia3', **whole), dict(peft='prompt', padded=True), dict(peft='prefix', **whole), dict(peft='full', optim='adamw_8bit', **whole), dict(packed=True, trained_share=.5), dict(accumulates=True, peft='full', autocast=None),
    dict(dtype='float32', **whole), dict(dtype='float16', autocast='float16', padded=True), dict(whole, bits=8, loss='full'), dict(bits=4, double_quant=False, lora_r=4, padded=True), dict(lora_bias='all', padded=True), dict(modules_to_save=('lm_head',), bits=4),
    dict(dtype='float32', autocast=None, **whole), dict(peft='full', optim='adafactor', padded=True), dict(era='4.48', loss='full', padded=True), dict(era='4.45', peft='full', autocast=None, loss='full', optim='adamw_torch'), dict(era='4.48', loss='full', **kbit)]
shapes = [(1, 512), (2, 384), (4, 128), (3, 200), (1, 1024)]
names = {'phi3': ('qkv_proj', 'down_proj'), 'falcon': ('query_key_value', 'dense_4h_to_h'), 'phi': ('q_proj', 'fc2')}

def fits(model, kw):
    "Whether the libraries run this at all"
    if model=='falcon': return kw.get('attn', 'sdpa')=='sdpa' and kw.get('peft')!='prefix'
    if model=='mixtral' and (kw.get('dtype', 'bfloat16')!='bfloat16' or kw.get('lora_dropout')): return False # `grouped_mm` of bfloat16 only; no dropout on experts
    return not (model in ('mixtral', 'granite') and kw.get('peft')=='ia3')

def grid():
    "(name, step): 10 settings for each model, half of them tiny; two have two blocks, the others one"
    for i,(model, (small, large)) in enumerate(models.items()):
        mine = [s for s in settings if fits(model, s)]
        for j in range(10):
            k = (i*5+j*3) % len(mine)
            kw, real = dict(mine[k]), j%2
            config = dict(tiny, **small, num_hidden_layers=1+(j in (4, 9))) | (large if real else {})
            batch, length = shapes[(i+j) % len(shapes)]
            if kw.get('peft', 'lora')=='lora' and j%3==0: kw['lora_target_modules'] = names.get(model, ('q_proj', 'v_proj'))
            if kw.get('packed'): batch, length = 1, batch*length
            yield f'{model}-{"real" if real else "tiny"}-{k}-{batch}x{length}', Step(config, **{**dict(batch=batch, length=length, padded=False), **kw})

cases = dict(grid())

def test_the_grid_is_wide():
    steps = list(cases.values())
    assert len(steps)>=100 and len({s.config['model_type'] for s in steps})>=6
    for k,n in dict(peft=5, bits=3, activation_checkpointing=2, loss=2, attn=3, padded=2, batch=4, length=5, optim=4, lora_r=3, lora_target_modules=3, lora_dropout=3, dtype=3, era=3).items(): assert len({getattr(s, k) for s in steps})>=n, k
    assert min(Counter(s.peft for s in steps).values())>=2

@pytest.mark.parametrize('name', cases)
def test_closed_form_is_within_2_percent_of_the_trace(name):
    s = cases[name]
    virtual = s.num_virtual_tokens if s.peft=='prompt' else 0 # the trace takes them for labelled
    t, f = trace(s, layers=(s.config['num_hidden_layers'],), cache=False), forecast(s.but(trained_share=s.trained_share*(1+virtual/s.length)), inplace=False)
    assert (f.params_total, f.params_trained)==(t.params_total, t.params_trained)
    assert abs(f.peak/t.peak-1)<.02, (f, t)

# ---- depth, speed, and the real engine

real = {k: dict(tiny, **small, num_hidden_layers=26) | large for k,(small, large) in models.items()}
def whole_and_by_names(model, **kw):
    "The peak from three or four blocks, and from a walk through all, which names with a path ask for"
    a, b = {'phi3': ('self_attn', 'qkv_proj'), 'falcon': ('self_attention', 'query_key_value')}.get(model, ('self_attn', 'q_proj'))
    s = Step(real[model], **{**dict(batch=2, length=600), **kw})
    return [forecast(s.but(lora_target_modules=(n,))) for n in (b, f'{a}.{b}')]

@pytest.mark.parametrize('kw', [{}, dict(activation_checkpointing=False), dict(bits=4, loss='full'), dict(bits=8), dict(dtype='float32'), dict(era='4.48', loss='full'), dict(padded=False, attn='flash_attention_2')], ids=str)
def test_blocks_that_were_left_out_count_as_if_they_were_walked(kw):
    for m in ('llama', 'gemma3', 'phi', 'mixtral'):
        some, every = whole_and_by_names(m, **kw)
        assert abs(some.peak/every.peak-1)<1e-3 and some.phase==every.phase and some.params_total==every.params_total, m
        assert all(abs(some.by_phase[k]/every.by_phase[k]-1)<1e-3 for k in every.by_phase), m

def test_full_training_in_depth_equals_the_trace():
    config = dict(tiny, **models['llama'][0], num_hidden_layers=9)
    for kw in (dict(peft='full', dtype='float32'), dict(peft='full', autocast=None, activation_checkpointing=False), dict(bits=8, loss='full', length=1024)):
        s = Step(config, **dict(dict(batch=4, length=256), **kw), padded=False)
        assert abs(forecast(s).peak/trace(s, layers=(9,), cache=False).peak-1)<.005, kw

def test_a_call_takes_milliseconds_not_seconds_and_loads_no_torch():
    code = '''
import json, statistics, sys, time
from ftnb.devices import device
from ftnb.fit import changes, fits as on_device
from ftnb.flops import step_time
from ftnb.forecast import forecast
from ftnb.recipe import make_recipe
from ftnb.step import Step, step_of
for c in json.loads(sys.stdin.read()):
    for kw in ({}, dict(activation_checkpointing=False), dict(bits=4), dict(peft='full')):
        def once(s=Step(c, **kw)):
            t = time.perf_counter()
            forecast(s)
            return time.perf_counter()-t
        print(f"{1e3*min(once() for _ in range(9)):.2f} {c['model_type']} {kw}")
assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)
'''
    p = subprocess.run([sys.executable, '-c', code], input=json.dumps(list(real.values())), capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert p.returncode==0, p.stderr
    slow = [l for l in p.stdout.splitlines() if float(l.split()[0])>=100]
    assert len(p.stdout.splitlines())==4*len(real) and not slow, slow

def added(loss):
    "Names of the sums that autograd's engine makes of large gradients in a backward pass"
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as p: loss.backward()
    return [e.name for e in p.events() if e.name.startswith('aten::add') and e.input_shapes[0]==[500, 64]]

class Fresh(torch.autograd.Function):
    "A loss whose weight's gradient is a tensor of its own, as TRL's is"
    @staticmethod
    def forward(ctx, h, w):
        ctx.save_for_backward(h, w)
        return (h@w.t()).sum()
    @staticmethod
    def backward(ctx, g): return tuple(torch.zeros_like(x) for x in ctx.saved_tensors)

def test_the_engine_adds_gradients_in_place_unless_the_first_is_a_view():
    "What `Tape` does and a trace can't: under a dispatch mode every sum is a new tensor"
    emb, ids = torch.nn.Embedding(500, 64), torch.zeros(2, 8, dtype=torch.long)
    assert added(Fresh.apply(emb(ids).tanh().flatten(0, 1), emb.weight))==['aten::add_']
    emb.weight.grad = None
    assert added(torch.nn.functional.linear(emb(ids).tanh(), emb.weight).sum())==['aten::add']
    tied = Step(dict(tiny, model_type='llama', num_hidden_layers=2, vocab_size=50_000, tie_word_embeddings=True), peft='full', autocast=None, batch=1, length=64, padded=False)
    head = 50_000*128*2
    for loss,n in (('fused', head), ('full', 0)):
        a, b = (forecast(tied.but(loss=loss), inplace=i).by_phase['end of backward'] for i in (True, False))
        assert abs(b-a-n)<.1*head, loss

# ---- published peaks: torch's max_memory_allocated on an A100, foundation-model-stack/fms-acceleration, scripts/benchmarks/refs/a100_80gb.csv and refs/requirements_granite.txt

published = [('mistral-7b-v0.1', 72434837504, dict(peft='full', autocast=None, batch=4)), ('mistral-7b-v0.1', 26704571904, dict(autocast=None, batch=4)), ('mistral-7b-v0.1', 38742912512, dict(autocast=None, batch=8)),
    ('mistral-7b-v0.1', 20669338112, dict(bits=4, kbit_prep=True, batch=4)), ('mistral-7b-v0.1', 37002646016, dict(bits=4, kbit_prep=True, batch=8)), ('mistral-7b-v0.1', 16373838336, dict(bits=4, batch=4)), ('mistral-7b-v0.1', 28412178944, dict(bits=4, batch=8)),
    ('powerlm-3b', 35134836736, dict(peft='full', autocast=None, batch=4, era='4.45')), ('powerlm-3b', 47059390976, dict(peft='full', autocast=None, batch=8, era='4.45')), ('powerlm-3b', 20169870848, dict(autocast=None, batch=4, era='4.45')), ('powerlm-3b', 28134687232, dict(bits=4, batch=8, era='4.45'))]

@pytest.mark.parametrize('model, peak, kw', published, ids=lambda v: str(v)[:40])
def test_published_peaks(model, peak, kw):
    "A thousandth off, with nothing fitted to them"
    config = json.loads(shipped('data', 'models', f'{model}.json').read_text())
    s = Step(config, **{**dict(era='4.48', length=4096, padded=False, attn='flash_attention_2', loss='full', optim='adamw_torch', lora_dropout=.1, lora_target_modules=('q_proj', 'k_proj', 'v_proj', 'o_proj'), adapter_dtype='auto' if kw.get('peft')=='full' else 'float32'), **kw})
    assert abs(forecast(s).peak/peak-1)<.001

# ---- what is said

def test_static_bytes_are_those_of_at_least():
    s = Step(real['llama'], bits=4, optim='adamw_8bit')
    f, e = forecast(s), at_least(Arch.read(s.config), load_in_4bit=True, optim='adamw_8bit')
    for owner,n in (('frozen weights', e.frozen_weights), ('trained weights', e.trained_weights), ('optimizer', e.optimizer)): assert abs(f.by_owner[owner]/n-1)<.002 # tensors are rounded up to 512 bytes
    assert (f.params_total, f.params_trained)==(e.params_total, e.params_trained)

def test_owners_sum_to_the_peak_and_the_peak_is_the_highest_phase():
    for s in cases.values():
        f = forecast(s)
        assert sum(f.by_owner.values())==f.peak==max(f.by_phase.values())==f.by_phase[f.phase]

def test_experts_stay_in_16_bits_and_it_says_so():
    f = forecast(Step(real['mixtral'], bits=4, lora_target_modules=('q_proj',)))
    assert any('fused experts stay in bfloat16' in n for n in f.notes) and f.by_owner['frozen weights']>60*2**30
    with pytest.raises(UserError, match='lora_dropout'): forecast(Step(real['mixtral'], lora_dropout=.1))

@pytest.mark.parametrize('change, said', [(dict(num_hidden_layers=None), 'num_hidden_layers'), (dict(model_type='lama'), "Did you mean 'llama'"), (dict(hidden_size=0), 'hidden_size')])
def test_a_config_that_is_none_is_a_sentence(change, said):
    c = {k: v for k,v in dict(real['llama'], **change).items() if v is not None}
    with pytest.raises(UserError, match=said): forecast(Step(c))

def test_bad_settings_are_sentences():
    for kw,said in ((dict(batch=0), 'batch'), (dict(length=0), 'length'), (dict(lora_r=3000), 'over the width of model.layers.0.self_attn.q_proj, 2048'), (dict(optim='adamw'), 'optim'), (dict(peft='prefix', config=dict(real['falcon'], multi_query=True, new_decoder_architecture=False)), 'falcon')):
        with pytest.raises(UserError, match=said): forecast(Step(**{**dict(config=real['llama']), **kw}))
    assert 'over the 4,096 positions' in ' '.join(forecast(Step(real['llama'], length=8192)).notes)

# ---- preferences

preferred = dict(dpo=dict(method='dpo', reference='shared'), kto=dict(method='kto', reference='shared'), asked_before=dict(method='kto'), orpo=dict(method='orpo', loss='odds'), dpo_on_4_bits=dict(method='dpo', reference='shared', bits=4), dpo_whole_graph=dict(method='dpo', reference='shared', activation_checkpointing=False))

@pytest.mark.parametrize('model', ['llama', 'falcon', 'gemma3', 'mixtral'])
@pytest.mark.parametrize('what', preferred)
def test_a_step_on_preferences_is_that_of_the_trace(what, model):
    if model=='mixtral' and what=='dpo_on_4_bits': pytest.skip('experts stay whole; see the note')
    s = Step(dict(tiny, **models[model][0], num_hidden_layers=2), **dict(dict(batch=2, length=256), **preferred[what]))
    t, f = trace(s, layers=(2,), cache=False), forecast(s, inplace=False)
    assert abs(f.peak/t.peak-1)<.02, (f, t)

def test_a_second_model_as_reference_is_counted_and_asking_it_before_is_offered():
    s = Step(dict(tiny, num_hidden_layers=8) | models['llama'][0] | models['llama'][1], method='dpo', reference='copy', peft='full', dtype='float32', batch=2, length=512)
    a, b = forecast(s), forecast(s.but(reference='none'))
    assert abs(a.by_owner['frozen weights']-4*(a.params_total))<4*a.params_total*.01 and 'frozen weights' not in b.by_owner
    assert 'precompute_ref_log_probs' in ' '.join(a.notes)
    room = on_device(b, 'A100 80GB').need[2]*1.02
    ways = changes(s, replace(device('A100 80GB'), memory=int(room)))
    assert any('precompute_ref_log_probs' in c.settings for c in ways), ways

def test_a_recipe_of_preferences_is_forecast_with_both_answers():
    config = dict(tiny, **models['llama'][0], num_hidden_layers=2)
    dpo, full, kto, orpo = (step_of(make_recipe(dict(method=m, peft=p, per_device_train_batch_size=4)), config) for m,p in (('dpo', 'lora'), ('dpo', 'full'), ('kto', 'lora'), ('orpo', 'lora')))
    assert (dpo.sequences, kto.sequences, orpo.sequences)==(8, 4, 8) and (dpo.asks, kto.asks, orpo.asks)==(1, 3, 0)
    assert (dpo.reference, full.reference, orpo.reference, orpo.loss)==('shared', 'copy', 'none', 'odds')
    assert step_of(make_recipe(dict(method='dpo', precompute_ref_log_probs=True)), config).asks==0
    assert step_time(dpo, 'A100 80GB').seconds>1.2*step_time(dpo.but(reference='none'), 'A100 80GB').seconds

@pytest.mark.parametrize('peft', ['dora', 'vera', 'hira', 'ln_tuning', 'ptuning'])
def test_a_method_that_is_taken_to_be_like_lora_is_near_its_trace(peft):
    "What it keeps beyond LoRA is counted by two coefficients, so it is near, and says so"
    config = dict(tiny, num_hidden_layers=2) | models['llama'][0] | models['llama'][1] | dict(vocab_size=512)
    s = step_of(make_recipe(dict(peft=peft, per_device_train_batch_size=2, max_length=512)), config)
    t, f = trace(s, layers=(2,), cache=False), forecast(s, inplace=False)
    assert f.params_trained==t.params_trained and abs(f.peak/t.peak-1)<.2, (f, t)
    if peft in ('dora', 'vera', 'hira'): assert 'counted as LoRA' in ' '.join(f.notes) and abs(f.peak/t.peak-1)<abs(forecast(s.but(adapter=None), inplace=False).peak/t.peak-1)
