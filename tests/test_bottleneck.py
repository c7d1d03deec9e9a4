"Bottleneck adapters are a PEFT method like any other"
import json, subprocess, sys
import pytest, torch
from peft import PeftModel, get_peft_model
from ftnb.adapters import trained
from ftnb.arch import Arch
from ftnb.base import UserError
from ftnb.bottleneck import BottleneckConfig, BottleneckLayer
from conftest import make_tiny

IDS = torch.arange(24).view(2, -1)+5

def base(folder, **kw):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, **{**dict(dtype=torch.float32), **kw}).eval()

def config(**kw): return BottleneckConfig(**{**dict(bottleneck_size=8, task_type='CAUSAL_LM'), **kw})

def logits(model):
    with torch.no_grad(): return model.eval()(IDS).logits

def fit(model, steps=8, seed=0):
    "The losses of a few steps on one batch"
    torch.manual_seed(seed)
    ids = torch.randint(5, 500, (4, 12))
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    out = []
    model.train()
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        out.append(loss.item())
    return out

@pytest.fixture(scope='module')
def saved(tiny, tmp_path_factory):
    "A trained adapter's folder and its logits"
    model, folder = get_peft_model(base(tiny), config()), tmp_path_factory.mktemp('saved')/'a'
    fit(model)
    model.save_pretrained(folder)
    return folder, logits(model)

@pytest.mark.parametrize('kind, out, down', [('llama', 'o_proj', 'down_proj'), ('phi', 'dense', 'fc2'), ('falcon', 'dense', 'dense_4h_to_h')])
def test_it_starts_as_the_identity_and_trains_as_many_numbers_as_the_plan_counts(tmp_path, kind, out, down):
    folder = make_tiny(tmp_path/kind, kind)
    arch, plain = Arch.read(folder), logits(base(folder))
    for word,targets in (('houlsby', 'all-linear'), ('pfeiffer', [down])):
        model = get_peft_model(base(folder), config(target_modules=word))
        assert logits(model).equal(plain)
        assert model.get_nb_trainable_parameters()[0]==sum(t.params for t in trained(arch, 'bottleneck', lora_target_modules=targets, bottleneck_size=8))
        assert {n.split('.')[-1] for n,m in model.named_modules() if isinstance(m, BottleneckLayer)}==({out, down} if word=='houlsby' else {down})

def test_it_learns_and_the_base_has_no_gradient_and_stays_bit_for_bit(tiny):
    model = get_peft_model(base(tiny), config())
    before = {n: p.clone() for n,p in model.named_parameters()}
    losses = fit(model)
    assert losses[-1]<losses[0]-.1
    model.train()(IDS, labels=IDS).loss.backward()
    for n,p in model.named_parameters():
        if 'bottleneck_' in n: assert p.grad.abs().sum()>0 and not p.equal(before[n]), n
        else: assert p.grad is None and p.equal(before[n]), n

def test_a_saved_adapter_answers_the_same_in_a_fresh_process(tiny, saved, tmp_path):
    code = f'''import sys, torch, ftnb.bottleneck
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({tiny!r}, dtype=torch.float32), {str(saved[0])!r}).eval()
with torch.no_grad(): torch.save(model(torch.arange(24).view(2, -1)+5).logits, {str(tmp_path/"l.pt")!r})'''
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert p.returncode==0, p.stderr
    torch.testing.assert_close(torch.load(tmp_path/'l.pt'), saved[1], rtol=0, atol=1e-6)
    said = json.loads((saved[0]/'adapter_config.json').read_text())
    assert said['peft_type']=='BOTTLENECK' and sorted(said['target_modules'])==['down_proj', 'o_proj']

def test_two_adapters_are_switched_turned_off_and_deleted(tiny, saved):
    folder, first = saved
    plain = logits(base(tiny))
    model = PeftModel.from_pretrained(base(tiny), folder, adapter_name='first')
    model.add_adapter('second', config(bottleneck_size=4, target_modules='pfeiffer'))
    assert logits(model).equal(first)
    model.set_adapter('second')
    assert logits(model).equal(plain)
    fit(model)
    second = logits(model)
    assert not second.equal(plain) and not second.equal(first)
    model.set_adapter('first')
    assert logits(model).equal(first)
    with model.disable_adapter(): assert logits(model).equal(plain)
    model.delete_adapter('first')
    assert list(model.peft_config)==['second'] and not any('.first.' in n for n,_ in model.named_parameters())
    model.set_adapter('second')
    assert logits(model).equal(second)
    with pytest.raises(ValueError): model.delete_adapter('first')
    assert logits(model.unload()).equal(plain)

@pytest.mark.parametrize('bits', [4, 8])
def test_it_stands_on_a_quantised_base_and_keeps_its_own_weights_in_float32(tmp_path, bits):
    from transformers import BitsAndBytesConfig
    q = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=torch.bfloat16) if bits==4 else BitsAndBytesConfig(load_in_8bit=True)
    folder = make_tiny(tmp_path/'wide', hidden_size=128, intermediate_size=128) # a row is a whole number of 4-bit blocks
    def quantised():
        model = base(folder, quantization_config=q, dtype=torch.bfloat16, device_map={'': 'cpu'})
        for m in model.modules():
            if type(m).__name__=='Linear4bit': m.support_avx512bf16_for_cpu = False # its packed form passes no gradient
        return model
    model = get_peft_model(quantised(), config())
    assert bits==8 or any(type(m.base_layer).__name__=='Linear4bit' for m in model.modules() if isinstance(m, BottleneckLayer))
    plain, before = logits(quantised()), {n: p.clone() for n,p in model.named_parameters() if 'bottleneck_' not in n}
    assert logits(model).equal(plain)
    assert {p.dtype for p in model.parameters() if p.requires_grad}=={torch.float32}
    losses = fit(model)
    assert losses[-1]<losses[0] and not logits(model).equal(plain)
    assert all(p.equal(before[n]) for n,p in model.named_parameters() if n in before)
    model.save_pretrained(tmp_path/'q')
    assert logits(PeftModel.from_pretrained(quantised(), tmp_path/'q')).equal(logits(model))

@pytest.mark.parametrize('values, said', [(dict(bottleneck_size=33), 'bottleneck_size: 33 is over the width of model.layers.0.self_attn.o_proj, 32; set it to 16 or less.'),
    (dict(bottleneck_size=0), 'bottleneck_size: 0 is not a whole number from 1 up.'), (dict(dropout=1.), 'dropout: 1.0 is a share'), (dict(non_linearity='rely'), "Did you mean 'relu'?"),
    (dict(target_modules=['norm']), 'model.norm is a LlamaRMSNorm')])
def test_a_size_or_a_layer_that_can_not_be_is_one_sentence(tiny, values, said):
    with pytest.raises(UserError) as e: get_peft_model(base(tiny), config(**values))
    assert said in str(e.value) and '\n' not in str(e.value)

def test_merging_is_refused_with_the_way_out(tiny, saved):
    model = PeftModel.from_pretrained(base(tiny), saved[0])
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(UserError, match=r'can not be merged.*unload\(\)'): merge()
    assert logits(model).equal(saved[1])

def test_only_the_named_blocks_get_one(tiny):
    model = get_peft_model(base(tiny), config(target_modules='pfeiffer', layers_to_transform=[1]))
    assert [n for n,m in model.named_modules() if isinstance(m, BottleneckLayer)]==['base_model.model.model.layers.1.mlp.down_proj']
