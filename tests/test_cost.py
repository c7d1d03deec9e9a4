"Arithmetic against what PyTorch counts, time against published speeds and real runs, prices against examples worked by hand"
import json
import os
from pathlib import Path

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')

from ftnb.arch import Arch
from ftnb.base import UserError
from ftnb.cost import break_even, colab_cost, kv_bytes, month, roi, serving, training_cost
from ftnb.devices import Device, device, devices
from ftnb.flops import Time, eta, eval_steps, flops, run_time, seen_pairs, step_time, utilisation
from ftnb.memory import at_least
from ftnb.profiles import profile, profiles
from ftnb.step import Step

G = 2**30
tiny = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=160, intermediate_size=104, num_key_value_heads=2)
families = dict(llama=dict(model_type='llama'), phi=dict(model_type='phi', num_key_value_heads=4), tied=dict(model_type='llama', tie_word_embeddings=True), gemma2=dict(model_type='gemma2', head_dim=24), phi3=dict(model_type='phi3'), falcon=dict(model_type='falcon'),
    mixtral=dict(model_type='mixtral', num_local_experts=4, num_experts_per_tok=2))

# ---- counted against PyTorch

@pytest.fixture(scope='module')
def counted():
    "Operations of a real forward and backward pass, as `FlopCounterMode` counts them; eager attention, all logits"
    torch = pytest.importorskip('torch')
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM
    def count(cfg, peft, checkpointing, batch=3, length=20):
        torch.manual_seed(0)
        m = AutoModelForCausalLM.from_config(AutoConfig.for_model(**cfg, pad_token_id=0, use_cache=False), attn_implementation='eager')
        if peft=='lora': m = get_peft_model(m, LoraConfig(r=4, target_modules='all-linear'))
        m.train()
        if checkpointing:
            m.gradient_checkpointing_enable(dict(use_reentrant=False))
            if peft=='lora': m.enable_input_require_grads()
        x = torch.randint(1, 160, (batch, length))
        with FlopCounterMode(display=False) as c: m(input_ids=x, labels=x).loss.backward()
        return c.get_total_flops()
    return count

@pytest.mark.parametrize('name', [n for n in families if n!='mixtral'])
@pytest.mark.parametrize('peft', ['full', 'lora'])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_operations_are_those_of_a_real_step(counted, name, peft, checkpointing):
    cfg = {**tiny, **families[name]}
    ours = flops(Step(cfg, peft=peft, lora_r=4, batch=3, length=20, attn='eager', loss='full', activation_checkpointing=checkpointing))
    assert ours.total==pytest.approx(counted(cfg, peft, checkpointing), rel=1e-9 if peft=='full' else .01)

def test_experts_a_token_is_not_sent_to_cost_nothing(counted):
    "The real count of a mixture depends on its kernels; ours is that of a dense model with as many active weights"
    cfg = {**tiny, **families['mixtral']}
    f = flops(Step(cfg, peft='full', batch=1, length=8, loss='full'))
    assert f.backward_weights==2*8*(Arch.read(cfg).active_params-160*64-5*64)
    assert flops(Step({**cfg, 'num_local_experts': 8}, peft='full', batch=1, length=8, loss='full')).total-f.total<.01*f.total

def test_a_fault_in_a_term_would_be_seen(counted):
    "Each of the four parts is more than the tolerance of the comparison"
    f = flops(Step({**tiny, **families['llama']}, peft='full', batch=3, length=20, attn='eager', loss='full', activation_checkpointing=True))
    for part in ('forward', 'recompute', 'backward_inputs', 'backward_weights'): assert getattr(f, part)>.1*f.total

def test_only_labelled_tokens_meet_the_vocabulary():
    s = Step(profile('llama-3.1-8b').config, batch=1, length=1024)
    assert flops(s).total-flops(s.but(trained_share=.25)).total==pytest.approx(.75*6*1024*128256*4096)
    assert flops(s.but(loss='full')).total==flops(s.but(loss='full', trained_share=.25)).total

def test_windows_and_masks():
    v1, v2 = [profile(f'mistral-7b-v0.{i}').arch for i in (1, 2)]
    assert seen_pairs(v1, 4096)==seen_pairs(v2, 4096) and seen_pairs(v1, 32768)<.3*seen_pairs(v2, 32768)
    assert seen_pairs(profile('gemma-2-9b').arch, 8192)==(seen_pairs(v1, 8192)+seen_pairs(v2, 8192))/2
    assert seen_pairs(v2, 100, skips=False)==10_000

# ---- time before the run

a100 = 'A100 80GB'
packed = Step(profile('mistral-7b-v0.2').config, batch=1, length=4096, loss='full', padded=False)

@pytest.mark.parametrize('change,k,low,high', [(dict(peft='full'), 8, .56, .57), (dict(), 6, .45, .46), (dict(bits=4), 6, .49, .50)])
def test_published_speeds_of_7b_lie_in_the_band(change, k, low, high):
    t = step_time(packed.but(**change), a100)
    for share in (low, high): assert t.low<4096/(share*312e12/(k*7.2417e9))<t.high
    assert t.high/t.seconds==pytest.approx(1.25) and not t.notes

@pytest.mark.parametrize('name,change,k,low,high', [('llama-3.1-70b', dict(bits=4), 6, .61, .61), ('llama-3.2-1b', dict(peft='full'), 8, .48, .52), ('llama-3.2-1b', dict(bits=4), 6, .32, .34)])
def test_published_speeds_of_1b_and_70b_lie_in_the_band(name, change, k, low, high):
    p = profile(name)
    t = step_time(packed.but(config=p.config, **change), a100)
    for share in (low, high): assert t.low<4096/(share*312e12/(k*p.params))<t.high

def test_the_speed_published_for_an_l40s_lies_in_the_band():
    "PEFT's method comparison: LoRA of Llama 3.2 3B, batch 4, rows of up to 643 tokens, no checkpointing: about 7,200 tokens a second; no constant is fitted to it"
    t = step_time(Step(profile('llama-3.2-3b').config, batch=4, length=643, lora_r=32, lora_target_modules=('q_proj', 'v_proj'), activation_checkpointing=False, loss='full'), 'L40S')
    assert t.low<4*643/7200<t.high and t.high/t.seconds==1.5

def test_no_device_is_thought_faster_than_its_products():
    for d in devices():
        if d.kind!='cuda': continue
        for p in profiles():
            s = Step(p.config, batch=1, length=2048, padded=False)
            assert 0<utilisation(s, p.arch)<.8 and flops(s).total/step_time(s, d).seconds<.8*d.flops

def test_bands_widen_where_nothing_was_measured():
    def band(s, d): t = step_time(s, d); return t.high/t.seconds, t.seconds/t.low, t.notes
    for s,d,f in [(packed, a100, 1.25), (packed, 'H100', 1.5), (packed.but(bits=8), a100, 2), (packed.but(config=profile('mixtral-8x7b').config), a100, 2), (packed.but(config=profile('smollm2-135m').config), a100, 2), (packed, 'CPU', 2.5)]:
        high, low, notes = band(s, d)
        assert high==pytest.approx(f)==low and bool(notes)==(f>1.25)

def test_a_device_without_rates_says_so():
    with pytest.raises(UserError, match='the speed of 24 GB is not in the table'): step_time(packed, '24GB')

def test_a_run_is_its_steps_and_its_evaluations():
    t = step_time(packed, a100).seconds
    assert run_time(packed, a100, 50, accumulate=2).seconds==pytest.approx(100*t)
    f = flops(packed)
    assert run_time(packed, a100, 50, eval_rows=10, evals=3).seconds==pytest.approx(50*t+30*t*f.forward/f.total)
    for bad in (dict(steps=-1), dict(steps=1, accumulate=0), dict(steps=1, evals=float('nan'))):
        with pytest.raises(UserError, match='is not a number from'): run_time(packed, a100, **bad)

def test_times_add_and_scale():
    t = Time(10, 8, 12, notes=('x',))+Time(1, 1, 2)
    assert (t.seconds, t.low, t.high, t.notes)==(11, 9, 14, ('x',)) and (2*t).seconds==22 and (t+5).high==19

# ---- time of a run that has begun: two real runs of the demo on a CPU

real = [json.loads(l) for l in (Path(__file__).parent/'expected/training_events.jsonl').read_text().splitlines()]
plans = dict(demo=dict(evals=eval_steps(167, 'epoch', per_epoch=111), eval_rows=44, rows=4), short=dict(evals=eval_steps(24, 'epoch', per_epoch=15), eval_rows=44, rows=4))

@pytest.mark.parametrize('run,steps', [('demo', [20, 30, 50, 80, 110, 120, 150, 160]), ('short', [20, 22])])
def test_after_20_steps_within_a_tenth(run, steps):
    es = [e for e in real if e['run']==run]
    took = es[-1]['t']
    for n in steps:
        at = max(e['t'] for e in es if e['event']=='log' and e['step']<=n)
        r = eta([e for e in es if e['t']<=at], **plans[run])
        assert r.step==n and abs(r.total.seconds/took-1)<.10, (n, r.total.seconds, took)
        assert r.total.low<took<r.total.high, (n, r.total, took)
        assert r.left==pytest.approx(r.total.seconds-at, abs=1e-6)

def test_a_pause_for_evaluation_is_no_spread_of_the_speed():
    es = [e for e in real if e['run']=='demo']
    at = next(e['t'] for e in es if e['event']=='log' and e['step']==120)
    r = eta([e for e in es if e['t']<=at], **plans['demo'])
    assert r.total.high-r.total.seconds==pytest.approx(.05*r.left+14.7725/2, rel=.01)

def test_before_20_steps_the_prior_is_all_there_is():
    es = [e for e in real if e['run']=='demo' and e['t']<30]
    prior = Time(500, 200, 1250)
    assert eta(es) is None and eta(es, prior=prior).total==prior and eta([], prior=prior) is None

def test_the_prior_of_the_demo_is_honest():
    "167 steps of 4 rows of about 205 tokens on the two cores it ran on"
    s = Step(profile('smollm2-135m').config, batch=4, length=214, activation_checkpointing=False, loss='selected', trained_share=.2, device='cpu', dtype='float32', autocast=None)
    two = Device('CPU', 8*G, 40e9, core_flops=device('CPU').core_flops*2/(os.cpu_count() or 1), kind='cpu')
    t = run_time(s, two, 167, eval_rows=44, evals=2)
    assert t.low<422.6<t.high, t

def test_a_finished_run_tells_what_it_took():
    es = [e for e in real if e['run']=='demo']
    r = eta(es)
    assert r.total.seconds==es[-1]['t'] and r.left==0 and r.step==167

def test_only_the_newest_training_counts():
    es = [e for e in real if e['run']=='demo']
    again = [dict(e, t=e['t']+1000) for e in es if e['t']<100]
    assert eta([*es, *again], **plans['demo']).total.seconds==pytest.approx(eta([e for e in es if e['t']<100], **plans['demo']).total.seconds)

def test_steps_of_evaluations():
    assert eval_steps(100, 'no')==[] and eval_steps(100, 'steps', every=.3)==[30, 60, 90] and eval_steps(9, 'epoch', per_epoch=3)==[3, 6, 9] and eval_steps(10, 'steps')==[]

# ---- prices

card = Device('card', 24*G, 1e12, 1e14, price=2.)

def test_training_costs_what_its_hours_cost():
    c = training_cost(card, Time(3600, 1800, 7200), evaluate=1800, export=900, gpus=2)
    assert (c.amount, c.low, c.high)==(4+2+1, 2+2+1, 8+2+1) and c.parts==dict(train=4, evaluate=2, export=1)
    assert training_cost('T4', 3600).amount==device('T4').price and device('T4').price_date in training_cost('T4', 3600).note

@pytest.mark.parametrize('call,said', [(lambda: training_cost(Device('x', price=-1.), 5), 'price: -1.0 for x|price: -1.0 is not'), (lambda: training_cost(card, -5), 'train: -5'), (lambda: training_cost(card, 5, evaluate=-1), 'evaluate: -1'),
    (lambda: training_cost(card, float('nan')), 'train: nan'), (lambda: training_cost(card, 5, gpus=0), 'gpus: 0'), (lambda: training_cost('CPU', 5), r'an hour of CPU has no price'), (lambda: training_cost('T44', 5), "Did you mean 'T4'"),
    (lambda: colab_cost('RTX 4090', 5), 'does not offer'), (lambda: colab_cost('T4', 5, unit_price=-1), 'unit_price: -1'), (lambda: roi(1, -1), 'saved: -1'), (lambda: roi(1, 1, months=-3), 'months: -3'),
    (lambda: serving(profile('llama-3.1-8b').config, card, batch=0), 'batch: 0'), (lambda: serving(profile('llama-3.1-8b').config, card, load=0), 'load: 0'), (lambda: serving(profile('llama-3.1-8b').config, card, bits=5), 'bits: 5'),
    (lambda: serving(profile('llama-3.1-8b').config, '24GB'), 'has no price'), (lambda: break_even(serving(profile('llama-3.1-8b').config, card), card, -1), 'api_price: -1')])
def test_what_can_not_be_is_refused(call, said):
    with pytest.raises(UserError, match=said): call()

def test_colab(): assert colab_cost('A100 80GB', 3600)==pytest.approx(.752)

def test_one_conversation_waits_for_the_weights():
    p = profile('llama-3.1-8b')
    s = serving(p.config, 'A100 80GB', batch=1, prompt=1, answer=100)
    bytes_a_token = 2*p.params+kv_bytes(p.arch, 51)
    assert s.bound=='bandwidth' and s.tokens_per_second==pytest.approx(2039e9*.6/bytes_a_token, rel=.01)
    assert s.price==pytest.approx(1.79/3600/s.tokens_per_second*1e6)

def test_keys_and_values():
    assert kv_bytes(profile('llama-3.1-8b').arch, 1)==2*32*8*128*2==131072
    assert kv_bytes(profile('falcon-7b').arch, 1)==2*32*1*64*2 and kv_bytes(profile('falcon-40b').arch, 1)==2*60*8*64*2
    v1, v2 = [profile(f'mistral-7b-v0.{i}').arch for i in (1, 2)]
    assert kv_bytes(v1, 4096)==kv_bytes(v2, 4096) and kv_bytes(v1, 32768)==kv_bytes(v1, 4096)<kv_bytes(v2, 32768)

def test_more_conversations_are_cheaper_until_arithmetic_binds():
    p = profile('llama-3.1-8b')
    rows = [serving(p.config, 'A100 80GB', batch=b, prompt=100, answer=100) for b in (1, 2, 8, 32)]
    assert [r.price for r in rows]==sorted((r.price for r in rows), reverse=True)
    assert serving(profile('llama-3.2-1b').config, 'L40S', batch=1024, prompt=10, answer=10).bound=='arithmetic'

def test_weights_in_4_bits_are_read_faster_and_mixtures_read_what_the_batch_meets():
    p, m = profile('llama-3.1-8b'), profile('mixtral-8x7b')
    assert serving(p.config, card, batch=1, bits=4).price<serving(p.config, card, batch=1).price
    assert serving(p.config, card, batch=1, bits=4).memory==pytest.approx(at_least(p.arch, load_in_4bit=True).frozen_weights+kv_bytes(p.arch, 1250))
    big = Device('big', 200*G, 1e12, 1e14, price=2.)
    one, many = [serving(m.config, big, batch=b, prompt=1, answer=100).tokens_per_second for b in (1, 64)]
    assert one==pytest.approx(1e12*.6/(2*m.arch.active_params), rel=.02) and many<64*one*.4
    assert serving(m.config, big).fits and not serving(m.config, card).fits

def test_break_even_by_hand():
    s = serving(profile('llama-3.2-1b').config, card, batch=8)
    b = break_even(s, card, api_price=1.)
    assert b.tokens==pytest.approx(2*month/1*1e6) and b.tokens<b.capacity==pytest.approx(s.tokens_per_second*3600*month)
    own = b.own_month+0; api = b.tokens/1e6*1.
    assert own==pytest.approx(api)
    assert break_even(s, card, api_price=.5).tokens==pytest.approx(2*b.tokens)
    never = break_even(s, card, api_price=.001)
    assert never.tokens is None and 'Never' in repr(never) and break_even(s, card, api_price=0).tokens is None

def test_an_api_that_costs_what_the_device_costs_breaks_even_at_full_load():
    s = serving(profile('llama-3.2-1b').config, card, batch=8)
    b = break_even(s, card, api_price=s.price*1.0001)
    assert b.tokens==pytest.approx(b.capacity, rel=.001)
    assert break_even(s, card, api_price=s.price*.999).tokens is None

def test_return_by_hand():
    r = roi(invested=1200, saved=300, running=100, months=12)
    assert (r.gain, r.roi, r.payback)==(1200, 1., 6.)
    assert roi(1200, 100, 100).payback is None and roi(1200, 100, 100).roi==-1 and roi(0, 10).payback==0 and roi(0, 0).roi==0

def test_steps_within_one_millisecond_are_not_an_error():
    "Events carry milliseconds; a fast machine writes many steps into one"
    es = [dict(t=5., event='train_begin', step=0, max_steps=40), *[dict(t=5., event='log', step=i) for i in range(1, 25)]]
    e = eta(es)
    assert (e.step, e.total.seconds, e.left)==(24, 0, 0)
