"Lengths, cache, stages, offload and resident memory against real objects"
import os, random
import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
torch = pytest.importorskip('torch')
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from ftnb.arch import Arch
from ftnb.base import UserError
from ftnb.fields import Recipe
from ftnb.forecast import forecast
from ftnb.inference import inference
from ftnb.kvcache import kv_cache
from ftnb.lengths import batch_lengths, batches, histogram, mean, packed_rows
from ftnb.offload import offload
from ftnb.stage_memory import libraries, ram_of, stage_memory
from ftnb.step import Step

# ---- lengths

def rows(seed, n=300):
    rng = random.Random(seed)
    return [min(512, max(3, int(rng.lognormvariate(4.2, .7)))) for _ in range(n)]

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('strategy', ['bfd', 'wrapped'])
def test_packing_makes_as_many_sequences_as_trl(seed, strategy):
    from datasets import Dataset
    from trl import pack_dataset
    lens = rows(seed)
    packed = pack_dataset(Dataset.from_dict(dict(input_ids=[[1]*n for n in lens])), 512, strategy)
    assert packed_rows(histogram(lens), 512, strategy)==len(packed)

@pytest.mark.parametrize('by_length', [False, True])
def test_padding_is_that_of_stage_3(by_length):
    from ftnb.arguments import padding_share
    lens = rows(7, 900)
    drawn = [padding_share(lens, 8, by_length, seed) for seed in range(1 if by_length else 40)]
    got = batches(Recipe(per_device_train_batch_size=8, max_length=512), lens, by_length)
    assert abs(got.padding-sum(drawn)/len(drawn))<.01 and got.longest==max(lens)

def test_the_order_is_chosen_as_stage_3_chooses_it():
    from ftnb.arguments import sampling
    for lens in (rows(1), [100]*50, [50]*40+[60]*40):
        r = Recipe(per_device_train_batch_size=8, max_length=512)
        assert abs(batches(r, lens).padding-sampling(r, lens)[1])<.02

def test_shares_of_batches_sum_to_one():
    for b in (1, 3, 8, 1000): assert abs(sum(batch_lengths(histogram(rows(2)), b).values())-1)<1e-9
    assert abs(mean(batch_lengths(histogram(rows(2)), 1))-sum(rows(2))/300)<1e-6

# ---- the cache

tiny = dict(hidden_size=64, num_hidden_layers=7, num_attention_heads=4, vocab_size=160, intermediate_size=104, pad_token_id=0, max_position_embeddings=256)
families = dict(llama=dict(num_key_value_heads=2), mistral=dict(num_key_value_heads=2, sliding_window=16), qwen2=dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=16, max_window_layers=3), qwen3=dict(num_key_value_heads=2, head_dim=24),
    gemma2=dict(num_key_value_heads=2, head_dim=24, sliding_window=16), gemma3_text=dict(num_key_value_heads=1, head_dim=24, sliding_window=16), phi=dict(), phi3=dict(num_key_value_heads=2, sliding_window=16),
    mixtral=dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2), falcon=dict(multi_query=True), falcon_new=dict(new_decoder_architecture=True, num_kv_heads=2))

@pytest.mark.parametrize('name', families)
def test_the_cache_is_that_of_transformers_to_the_byte(name):
    config = dict(tiny, model_type=name.removesuffix('_new'), **families[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16, attn_implementation='eager' if name=='gemma2' else 'sdpa').eval()
    cache = DynamicCache(config=model.config)
    def held(): return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for l in cache.layers for t in (l.keys, l.values)}.values())
    def counted(): return sum(t.numel()*t.element_size() for l in cache.layers for t in (l.keys, l.values))
    with torch.no_grad():
        model(torch.ones(3, 30, dtype=torch.long), past_key_values=cache, use_cache=True)
        assert (counted(), held())==((c := kv_cache(config, 3, 30)).total, c.prompt)
        for i in range(5): model(torch.ones(3, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        assert counted()==kv_cache(config, 3, 35).total

# ---- a forward pass without gradients, against the true code on tensors without bytes

def traced(s, head, layers):
    "Peak of the true model's forward pass without gradients"
    from torch._subclasses.fake_tensor import FakeTensorMode
    from ftnb.faithful import faithful, kernels
    from ftnb.loss import parts, selected_loss
    from ftnb.standin import build
    from ftnb.storages import Storages
    from ftnb.trace import _see_model
    with FakeTensorMode(allow_non_fake_inputs=True), faithful(s.device, False):
        model = build(s, layers).eval()
        t = Storages(kernels(s.trained_share, s.device), 512 if s.device=='cuda' else 1, set())
        _see_model(model, t)
        with t, torch.no_grad():
            ids, mask = torch.zeros(s.batch, s.length, dtype=torch.long), torch.zeros(s.batch, s.length, dtype=torch.long)
            if head=='last': model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits.float()
            else:
                dec, lm = parts(model)
                selected_loss(lm, dec(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state, torch.zeros(s.batch, s.length, dtype=torch.long))
    return max(n for n,_ in t.peaks.values())

wide = dict(num_hidden_layers=2, vocab_size=50_000, pad_token_id=0, max_position_embeddings=4096)
widths = [dict(wide, model_type='llama', hidden_size=2048, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192), dict(wide, model_type='gemma3_text', hidden_size=1152, num_attention_heads=4, num_key_value_heads=1, head_dim=256, intermediate_size=6912, sliding_window=512),
    dict(wide, model_type='phi', hidden_act='gelu', hidden_size=1024, num_attention_heads=16, intermediate_size=4096), dict(wide, model_type='mixtral', hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, intermediate_size=3584, num_local_experts=8, num_experts_per_tok=2)]

@pytest.mark.parametrize('head', ['last', 'loss'])
@pytest.mark.parametrize('i', range(len(widths)), ids=[w['model_type'] for w in widths])
def test_a_forward_pass_without_gradients_is_within_2_percent(i, head):
    names = ('q_proj', 'v_proj') if i==3 else 'all-linear'
    for kw in (dict(autocast=None), dict(bits=4 if i!=3 else 16, autocast=None, batch=2), dict(dtype='float32', autocast=None)):
        if i==3 and 'dtype' in kw: continue # `grouped_mm` of bfloat16 only
        s = Step(widths[i], **{**dict(batch=4, length=600, trained_share=.3, lora_target_modules=names, activation_checkpointing=False), **kw})
        assert abs(inference(s, head).peak/traced(s, head, 2)-1)<.02, kw

def test_the_cache_is_an_owner_of_its_own():
    s = Step(widths[0], batch=4, length=600, autocast=None)
    a, b = inference(s), inference(s, cache=700)
    assert 'cache' not in a.by_owner and b.peak-a.peak==b.by_owner['cache']==kv_cache(s.config, 4, 700).peak and 'cache' in repr(b)

# ---- stages and offload

llama = dict(model_type='llama', hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, vocab_size=128256, tie_word_embeddings=False)

def test_every_stage_has_its_memory():
    a = Arch.read(llama)
    m = stage_memory(Recipe(peft='qlora', load_in_4bit=True), Step(llama, bits=4), steps=120)
    assert [r['stage'] for r in m.rows]==['load', 'train', 'evaluate', 'merge', 'convert']
    assert m['train']['gpu']==forecast(Step(llama, bits=4)).peak and m['load']['disk']==2*a.params
    own, states = m.forecast.by_owner['trained weights'], m.forecast.by_owner['optimizer']
    assert m['train']['disk']==3*(own+states)+own # two checkpoints are kept, and the oldest goes when the next is there
    assert m['merge']['gpu']==4*a.params and m['merge']['ram']>libraries and all(r['ram']>=libraries for r in m.rows)
    full = stage_memory(Recipe(peft='full'), Step(llama, peft='full', autocast=None))
    assert full['evaluate']['gpu']>2*2*a.params and 'two models' in full['evaluate']['what']
    cpu = stage_memory(Recipe(), Step(llama, device='cpu', loss='selected', batch=2, length=256))
    assert not any(r['gpu'] for r in cpu.rows) and cpu['train']['ram']==cpu.resident.likely
    for text in (repr(m), m._repr_html_()):
        for word in ('load', 'convert', 'RAM'): assert word in text

def test_a_merge_without_room_on_the_gpu_is_in_ram():
    a, s = Arch.read(llama), Step(llama, bits=4)
    m = stage_memory(Recipe(peft='qlora', load_in_4bit=True), s, room=24*2**30)['merge']
    assert m['gpu']==0 and m['ram']>4*a.params and 'GPU has not the room' in m['what']

def test_pages_of_their_own_begin_where_the_heap_lets_them():
    from ftnb.heap import large
    from ftnb.stage_memory import apart, holes
    s = Step(llama, device='cpu', loss='selected', batch=1, length=64)
    assert apart==large and holes(s)[1]==1.5 and holes(s.but(length=4096))[1]<1.05

def test_offload_moves_what_the_arithmetic_says():
    s = Step(llama, peft='full', autocast=None, optim='paged_adamw_32bit', batch=1, length=2048, padded=False)
    n, room = Arch.read(llama).params, 24*2**30
    paged, two, three = (offload(s, room, 2**40, w) for w in ('paged', 'zero2', 'zero3'))
    over = forecast(s).peak-room
    assert (paged.gpu, paged.ram, paged.moved)==(room, over, 2*over) if over<8*n else paged.ram==pytest.approx(8*n, rel=.001)
    assert two.ram==14*n and two.moved==pytest.approx(4*n, rel=.001) and two.seconds==pytest.approx(two.moved/25e9)
    assert three.gpu<two.gpu-10*2**30 and three.moved>two.moved
    assert offload(s, room, 2**40, 'zero2', dict(ram=50e9, disk=3e9)).seconds==pytest.approx(two.seconds/2)

def test_a_model_is_split_as_accelerate_splits_it():
    "Blocks on the device, then in RAM, then on disk"
    from accelerate import infer_auto_device_map, init_empty_weights
    config = dict(llama, num_hidden_layers=16)
    with init_empty_weights(): model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    s = Step(config, batch=1, length=16, autocast=None, lora_r=1, lora_target_modules=('q_proj',))
    device, ram = 5*2**30, 2*2**30
    o = offload(s, device, ram, 'device_map')
    work = inference(s).peak-sum(p.numel()*2 for p in model.parameters())
    where = infer_auto_device_map(model, {0: device-int(work), 'cpu': ram, 'disk': 2**40}, no_split_module_classes=['LlamaDecoderLayer'])
    def theirs(d): return sum(p.numel()*2 for n,p in model.named_parameters() if any(n.startswith(m) and v==d for m,v in where.items()))
    assert theirs('disk') and o.disk==pytest.approx(theirs('disk'), rel=.01) and o.ram==pytest.approx(theirs('cpu'), rel=.01)

def test_mistakes_are_sentences():
    s = Step(llama)
    for f,said in ((lambda: offload(s, 1, 1, 'zero'), "Did you mean 'zero"), (lambda: offload(s, 1, -1), 'ram'), (lambda: offload(s, 1, 1, 'zero2', dict(ram=0, disk=1)), 'ram: 0'), (lambda: kv_cache(llama, 0), 'batch: 0'), (lambda: kv_cache(llama, 1, 1, 'int3'), 'dtype'), (lambda: histogram([]), 'no row')):
        with pytest.raises(UserError, match=said): f()

# ---- resident memory of a real process

TRAIN = '''
import json, resource, sys
from ftnb.heap import give_back
give_back()
from ftnb.prepare import prepare
from ftnb.recipe import make_recipe
from ftnb.runs import Run
from ftnb.train import train
evaluation = sys.argv[2]=='with'
run = Run(sys.argv[1], make_recipe(dict(dataset='demo', use_cpu=True, lora_r=16, per_device_train_batch_size=4, per_device_eval_batch_size=96, max_length=512, max_steps=3, save_strategy='no',
    eval_strategy='steps' if evaluation else 'no', eval_steps=3))).save()
lens = prepare(run).report['lengths']
share = run.report('prepare')
rep = train(run)
print('RESULT', json.dumps(dict(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024, longest=rep['memory']['row']['seq_len'], valid=lens['valid'], share=share['trained_tokens']/share['train_tokens'])))
'''

@pytest.mark.soak
@pytest.mark.parametrize('evaluation', ['without', 'with'])
def test_the_forecast_of_resident_memory_is_within_15_percent_of_a_real_training(tmp_path, evaluation):
    import json, subprocess, sys
    from ftnb.models import read_config
    p = subprocess.run([sys.executable, '-c', TRAIN, str(tmp_path/'run'), evaluation], capture_output=True, text=True, timeout=1200, env={**os.environ, 'HF_HUB_OFFLINE': '1'})
    assert p.returncode==0, p.stderr[-2000:]
    got = json.loads(p.stdout.rpartition('RESULT ')[2])
    s = Step(read_config('smollm2-135m'), device='cpu', loss='selected', activation_checkpointing=False, batch=4, length=got['longest'], trained_share=got['share'])
    ram = ram_of(s, (got['valid']['n'], got['valid']['max']) if evaluation=='with' else None, 3)
    assert abs(ram.likely/got['peak']-1)<.15, (ram, got)

def test_resident_memory_has_parts_that_sum():
    s = Step(dict(wide, model_type='llama', hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536), device='cpu', loss='selected', activation_checkpointing=False, batch=4, length=225, trained_share=.2)
    a, b = ram_of(s), ram_of(s, (44, 232), 10)
    assert a.least<a.likely<a.most and b.likely>a.likely and b.parts['compiled kernels'][1]==10*a.parts['compiled kernels'][1]
    assert a.least>libraries+forecast(s).peak
    assert 'compiled kernels' not in ram_of(s.but(dtype='float32', autocast=None)).parts
