"Quantised bases for real, on the CPU: what is in 4 and 8 bits, what learns, what stays bit for bit; and checkpoints that were quantised before"
import hashlib, json
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('bitsandbytes')
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import Made, make_tiny
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, AutoModelForCausalLM

from ftnb.arch import Arch
from ftnb.base import UserError
from ftnb.export import export
from ftnb.load import load_model, unpacked
from ftnb.methods import methods as table
from ftnb.plan import plan
from ftnb.quantised import base_bits, packings, quantised_fault
from ftnb.recipe import make_recipe
from ftnb.train import make_trainer, train
from ftnb.tune import count_parameters

pytestmark = pytest.mark.filterwarnings('ignore:bitsandbytes', 'ignore:MatMul8bitLt')

@pytest.fixture(scope='module')
def wide(tmp_path_factory): return make_tiny(tmp_path_factory.mktemp('quantised')/'wide', hidden_size=64, intermediate_size=128)

@pytest.mark.parametrize('values, shape, stays', [({}, (64, 32), True), (dict(peft='qlora'), (64, 32), True), ({}, (64, 40), False), ({}, (96, 32), False), (dict(use_dora=True), (64, 32), False), (dict(peft='bottleneck'), (64, 32), False), (None, (64, 32), False)])
def test_the_packed_form_of_4_bit_layers_stays_where_nothing_is_trained_or_read(values, shape, stays):
    layer = Linear4bit(*shape, bias=False)
    layer.support_avx512bf16_for_cpu = True # as on a CPU that has it
    unpacked(torch.nn.Sequential(layer), values if values is None else make_recipe(values))
    assert layer.support_avx512bf16_for_cpu is stays

def tensors(w, layer):
    "All that a quantised weight is: packed numbers, scales, and the scales of the scales"
    q = getattr(w, 'quant_state', None)
    if q is None: return [w.data, *(t for t in (getattr(w, 'SCB', None), layer.state.SCB) if t is not None)][:2]
    return [w.data, q.absmax, q.code, *((q.offset, q.state2.absmax, q.state2.code) if q.nested else ())]

def fingerprint(model):
    "A hash of every frozen byte of the base, quantisation states included"
    h = hashlib.sha256()
    for n,m in model.named_modules():
        w = getattr(m, 'weight', None)
        if w is None or 'lora_' in n or hasattr(m, 'base_layer'): continue
        for t in tensors(w, m) if isinstance(m, (Linear4bit, Linear8bitLt)) else [w.data]: h.update(t.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()

kinds = {'nf4, double': (dict(load_in_4bit=True), 'Linear4bit'), 'nf4': (dict(load_in_4bit=True, use_bnb_nested_quant=False), 'Linear4bit'),
    'fp4, double': (dict(load_in_4bit=True, bnb_4bit_quant_type='fp4'), 'Linear4bit'), 'fp4': (dict(load_in_4bit=True, bnb_4bit_quant_type='fp4', use_bnb_nested_quant=False), 'Linear4bit'),
    '8 bit': (dict(load_in_8bit=True, peft='lora'), 'Linear8bitLt')}

@pytest.mark.parametrize('kind', kinds)
def test_a_quantised_base_is_what_the_recipe_says_and_learns_only_beside_itself(wide, tmp_path, kind):
    kw, cls = kinds[kind]
    run = Made(wide, tmp_path)(lora_r=4, max_steps=6, learning_rate=1e-2, warmup_steps=0, lr_scheduler_type='constant', **{**dict(peft='qlora'), **kw})
    t = make_trainer(run)
    layers = [m.base_layer for m in t.model.modules() if hasattr(m, 'base_layer')]
    assert len(layers)==14 and {type(l).__name__ for l in layers}=={cls}
    if cls=='Linear4bit':
        states = [l.weight.quant_state for l in layers]
        assert {s.quant_type for s in states}=={kind[:3]} and {s.nested for s in states}=={'double' in kind}
        assert all(l.weight.data.dtype==torch.uint8 and 2*l.weight.numel()==l.in_features*l.out_features for l in layers)
    assert count_parameters(t.model)[0]-count_parameters(t.model)[1]==Arch.read(wide).params
    batch = next(iter(t.get_train_dataloader()))
    def loss(): return t.compute_loss(t.model.train(), dict(batch), num_items_in_batch=(batch['labels'][:, 1:]!=-100).sum()).item()
    before, first = fingerprint(t.model), loss()
    train(run, t)
    assert fingerprint(t.model)==before and loss()<first-.1
    assert all(p.abs().max()>0 for n,p in t.model.named_parameters() if 'lora_B' in n)

def test_a_changed_byte_of_the_base_would_be_seen(wide):
    m = load_model(make_recipe(dict(model_name_or_path=wide, load_in_4bit=True, use_cpu=True, dtype='float32')))
    before = fingerprint(m)
    m.model.layers[1].mlp.down_proj.weight.quant_state.state2.absmax[0] += 1e-3
    assert fingerprint(m)!=before

# checkpoints that are quantised already

@pytest.fixture(scope='module')
def packed(wide, tmp_path_factory):
    "Folders of the same model in several packings"
    def save(name, **kw):
        d = tmp_path_factory.mktemp('packed')/name
        AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32, device_map='cpu', quantization_config=BitsAndBytesConfig(**kw)).save_pretrained(d)
        return d
    res = dict(nf4=save('nf4', load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32), int8=save('int8', load_in_8bit=True))
    d = res['fp8'] = tmp_path_factory.mktemp('packed')/'fp8'
    d.mkdir()
    config, w, out = json.loads((p := Path(wide)).joinpath('config.json').read_text()), load_file(p/'model.safetensors'), {}
    for k,v in w.items():
        s = v.abs().max()/448
        out |= {k: (v/s).to(torch.float8_e4m3fn), k+'_scale_inv': s.reshape(1, 1)} if k.endswith('proj.weight') else {k: v}
    save_file(out, d/'model.safetensors', metadata=dict(format='pt'))
    (d/'config.json').write_text(json.dumps({**config, 'quantization_config': dict(quant_method='fp8', activation_scheme='dynamic', weight_block_size=[128, 128])}))
    for d in res.values():
        for f in p.glob('*token*'): (d/f.name).write_bytes(f.read_bytes())
        for f in p.glob('chat_template*'): (d/f.name).write_bytes(f.read_bytes())
    return res

def of(folder, **kw): return make_recipe(dict(dict(model_name_or_path=str(folder), use_cpu=True, dtype='float32', peft='lora'), **kw))
ids = torch.arange(10, 40)[None]

def test_a_checkpoint_is_loaded_as_it_is_packed(wide, packed):
    with torch.no_grad():
        want = load_model(of(wide))(ids).logits
        for name,cls in (('nf4', 'Linear4bit'), ('int8', 'Linear8bitLt'), ('fp8', 'Linear')):
            m = load_model(of(packed[name])).train()
            assert sum(type(o).__name__==cls for o in m.modules())>=14, name
            assert 0<(m(ids).logits-want).abs().max()<.2*want.abs().max(), name # as good as its bits, and never weights that were made up

@pytest.mark.parametrize('name', ['nf4', *(pytest.param(n, marks=pytest.mark.soak) for n in ('int8', 'fp8'))])
def test_an_adapter_on_a_packed_checkpoint_is_merged_into_whole_weights(packed, tmp_path, name):
    run = Made(str(packed[name]), tmp_path)(peft='lora', lora_r=4, max_steps=3, warmup_steps=0, learning_rate=1e-2)
    train(run)
    rep = export(run)
    assert [o['verdict'] for o in rep['formats']]==['ok', 'ok'] and rep['effect']>1e-6
    merged = json.loads(run.path('merged', 'config.json').read_text())
    assert not merged.get('quantization_config')

def sentence(config, found=True, whole=False, **kw): return quantised_fault(dict(model_type='llama', quantization_config=config), of('me/model', **kw), whole, lambda m: found)
methods = dict(gptq=dict(bits=4), awq=dict(bits=4), torchao=dict(quant_type={'default': {'_type': 'Int8WeightOnlyConfig'}}), hqq={}, fp8={}, mxfp4={}, **{'compressed-tensors': {}})

@pytest.mark.parametrize('m', methods)
def test_what_can_not_be_had_of_a_packed_checkpoint_is_one_sentence(m):
    q, p = dict(methods[m], quant_method=m), packings[m]
    if p.how=='refused': assert 'does not load' in sentence(q)
    else:
        assert sentence(q)==''
        if p.needs: assert f'pip install {p.install}' in sentence(q, found=False) and 'unquantised' in sentence(q, found=False)
        assert 'load_in_4bit: true, but' in sentence(q, peft='qlora') and 'load_in_8bit: true, but' in sentence(q, load_in_8bit=True)
        assert ('peft: full' in sentence(q, peft='full'))==(p.how=='kept')
        assert ('export_formats: [adapter]' in sentence(q, whole=True))==(p.how=='kept' and not p.whole)
    for s in (sentence(q), sentence(q, found=False), sentence(q, peft='qlora')): assert '\n' not in s and s.count('. ')<=1

def test_bitsandbytes_checkpoints_are_taken_in_their_own_bits_only():
    q = dict(quant_method='bitsandbytes', load_in_4bit=True, bnb_4bit_quant_type='nf4')
    assert sentence(q)==sentence(q, peft='qlora')==''
    assert 'quantised in 4 bits already' in sentence(q, load_in_8bit=True)
    assert 'set bnb_4bit_quant_type: nf4' in sentence(q, peft='qlora', bnb_4bit_quant_type='fp4')
    assert 'peft: full' in sentence(q, peft='full') and all(f'peft: {n}' in sentence(q, peft=n) for n,m in table.items() if 4 not in m.bits)
    assert "Did you mean 'gptq'" in sentence(dict(quant_method='gptqq'))

def test_it_is_said_before_a_weight_is_read(wide, tmp_path, monkeypatch):
    (tmp_path/'config.json').write_text(json.dumps({**json.loads(open(f'{wide}/config.json').read()), 'quantization_config': dict(quant_method='gptq', bits=4)}))
    monkeypatch.setattr(AutoModelForCausalLM, 'from_pretrained', lambda *a, **k: pytest.fail('weights were read'))
    monkeypatch.setattr('ftnb.quantised.find_spec', lambda m: None)
    with pytest.raises(UserError, match='GPTQ already'): load_model(of(tmp_path, peft='qlora'))
    with pytest.raises(UserError, match='peft: full can not'): load_model(of(tmp_path, peft='full'))

def test_the_plan_counts_a_packed_checkpoint_in_its_bits_and_says_so(wide, packed):
    def frozen(d, **kw):
        r = plan(of(d, **kw), '24GB', rows=10, search=False).report
        return r['bytes']['frozen weights'], ' '.join(r['notes'])
    whole, small = frozen(wide), frozen(packed['nf4'])
    assert small[0]==frozen(wide, peft='qlora')[0]<whole[0] and 'bitsandbytes, 4 bits' in small[1]
    assert frozen(packed['fp8'])[0]==whole[0] and 'unpacked to 16 bits' in frozen(packed['fp8'])[1]
    assert base_bits(dict(quantization_config=dict(quant_method='gptq', bits=8)))==8
