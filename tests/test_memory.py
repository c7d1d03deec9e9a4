"Bytes against real objects: what transformers, bitsandbytes and PEFT load, what TRL's trainer trains, what the optimizer keeps"
import os
import warnings

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
torch = pytest.importorskip('torch')
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, TrainerCallback

from ftnb.adapters import trained
from ftnb.arch import Arch
from ftnb.base import UserError
from ftnb.falcon import PlainFalcon
from ftnb.memory import at_least, int8_bytes, nf4_bytes, optimizer_bytes, optims, quantised

tiny = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=160, intermediate_size=104, pad_token_id=0, bos_token_id=1, eos_token_id=2)
gqa = dict(num_key_value_heads=2)
configs = dict(llama=dict(model_type='llama', **gqa), tied=dict(model_type='llama', tie_word_embeddings=True, attention_bias=True), qwen3=dict(model_type='qwen3', **gqa, head_dim=24),
    gemma2=dict(model_type='gemma2', **gqa, head_dim=24), phi=dict(model_type='phi'), phi3=dict(model_type='phi3', **gqa), falcon=dict(model_type='falcon'),
    mixtral=dict(model_type='mixtral', **gqa, num_local_experts=4, num_experts_per_tok=2),
    qwen2_moe=dict(model_type='qwen2_moe', **gqa, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=48, mlp_only_layers=[1]))

def cfg(name): return {**tiny, **configs[name]}
def nbytes(*ts): return sum({t.data_ptr(): t.numel()*t.element_size() for t in ts if t is not None}.values())

def quant_states(model):
    "The tensors beside a quantised weight"
    for m in model.modules():
        w = getattr(m, 'weight', None)
        if (s := getattr(w, 'quant_state', None)) is not None:
            yield from (s.absmax, s.code, s.offset)
            if s.nested: yield from (s.state2.absmax, s.state2.code)
        yield getattr(w, 'SCB', None)
        yield getattr(getattr(m, 'state', None), 'SCB', None)  # the scales move there at the first forward pass

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Saved tiny models, made when asked for"
    def make(name):
        d = tmp_path_factory.getbasetemp()/name
        if not d.exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**cfg(name))).save_pretrained(d)
        return d
    return make

def load(d, bits=16, double=True, dtype='bfloat16'):
    q = {16: None, 8: BitsAndBytesConfig(load_in_8bit=True), 4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4',
        bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.bfloat16)}[bits]
    cls = PlainFalcon if q and d.name=='falcon' else AutoModelForCausalLM
    return cls.from_pretrained(d, quantization_config=q, dtype=getattr(torch, dtype), device_map='cpu')

# ---- formulas against single layers

@pytest.mark.parametrize('double', [False, True])
@pytest.mark.parametrize('rows,cols', [(64, 64), (33, 7), (1, 1), (576, 1536), (129, 128)])
def test_a_4bit_layer(rows, cols, double):
    from bitsandbytes.nn import Linear4bit
    l = Linear4bit(cols, rows, bias=False, compress_statistics=double, quant_type='nf4').to('cpu')
    assert nf4_bytes(rows*cols, double)==nbytes(l.weight.data, *quant_states(l))

@pytest.mark.parametrize('rows,cols', [(64, 64), (33, 7)])
def test_an_8bit_layer(rows, cols):
    from bitsandbytes.nn import Linear8bitLt
    l = Linear8bitLt(cols, rows, bias=False, has_fp16_weights=False).to('cpu')
    assert int8_bytes(rows, cols)==nbytes(l.weight.data, *quant_states(l))

# ---- whole models as they are loaded

@pytest.mark.parametrize('bits,double', [(16, True), (8, True), (4, True), (4, False)])
@pytest.mark.parametrize('name', configs)
def test_loaded_weights(folder, name, bits, double):
    arch, model = Arch.read(folder(name)), load(folder(name), bits, double)
    small = [n for n,m in model.named_modules() if 'bit' in type(m).__name__]
    if bits<16: assert sorted(small)==sorted(m.path for m in quantised(arch))
    e = at_least(arch, lora_r=1, lora_target_modules=['query_key_value', 'qkv_proj', 'q_proj'], load_in_4bit=bits==4, load_in_8bit=bits==8, bnb_4bit_use_double_quant=double)
    assert e.frozen_weights==nbytes(*model.parameters(), *quant_states(model))

def test_experts_are_said_to_stay(folder):
    for name in ('mixtral', 'qwen2_moe'):
        assert 'not quantised' in at_least(Arch.read(folder(name)), 'qlora').notes[0]
        assert not at_least(Arch.read(folder(name))).notes

# ---- a real step of TRL's trainer

def tokenizer():
    t = Tokenizer(models.WordLevel({f'w{i}': i for i in range(160)}, unk_token='w3'))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=t, unk_token='w3', pad_token='w0', bos_token='w1', eos_token='w2')

class Grads(TrainerCallback):
    "Bytes of the gradients, just before they are used"
    def on_pre_optimizer_step(self, args, state, control, model=None, **k): self.bytes = nbytes(*[p.grad for p in model.parameters() if p.grad is not None])

def state_bytes(opt, optim):
    "Bytes of the states; the step count is on the host but for the fused AdamW of torch"
    ts = [v for s in opt.state.values() for k,v in s.items() if torch.is_tensor(v) and (k!='step' or optim=='adamw_torch_fused')]
    return nbytes(*ts)

def step(tmp_path, d, optim, bits=16, dtype='bfloat16', optim_args=None, config=None, **lora):
    "One step of `SFTTrainer` on the real model: (estimate's fields, counted)"
    from bitsandbytes.optim import GlobalOptimManager
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    GlobalOptimManager._instance = None  # it remembers the tensors of other runs by id
    grads = Grads()
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to='none', save_strategy='no', max_steps=1, per_device_train_batch_size=2, max_length=16,
        optim=optim, optim_args=optim_args, gradient_checkpointing=False, disable_tqdm=True, logging_strategy='no')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        t = SFTTrainer(model=load(d, bits, dtype=dtype), args=args, processing_class=tokenizer(), callbacks=[grads],
            train_dataset=Dataset.from_list([dict(input_ids=list(range(3, 15)))]*2), peft_config=config or (LoraConfig(task_type='CAUSAL_LM', **lora) if lora else None))
        t.train()
    params = list(t.model.parameters())
    own = [p for p in params if p.requires_grad]
    return dict(frozen_weights=nbytes(*[p for p in params if not p.requires_grad], *quant_states(t.model)), trained_weights=nbytes(*own), gradients=grads.bytes,
        optimizer=state_bytes(t.optimizer.optimizer, optim), params_trained=sum(p.numel() for p in own))

def compare(tmp_path, d, optim='adamw_torch', bits=16, dtype='bfloat16', optim_args=None, **lora):
    real = step(tmp_path, d, optim, bits, dtype, optim_args, **lora)
    ours = {k: lora[v] for k,v in dict(lora_r='r', lora_target_modules='target_modules', modules_to_save='modules_to_save', bias='bias').items() if v in lora}
    e = at_least(Arch.read(d), 'lora' if lora else 'full', dtype=dtype, load_in_4bit=bits==4, load_in_8bit=bits==8, optim=optim, optim_args=optim_args, **ours)
    assert {k: getattr(e, k) for k in real}==real
    assert e.total==sum(real[k] for k in ('frozen_weights', 'trained_weights', 'gradients', 'optimizer'))

lora = dict(r=8, target_modules='all-linear')

@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('name', ['llama', 'tied', 'phi', 'mixtral'])
def test_full(tmp_path, folder, name, dtype): compare(tmp_path, folder(name), dtype=dtype)

@pytest.mark.parametrize('name', ['llama', 'tied', 'falcon', 'gemma2'])
@pytest.mark.parametrize('bits', [16, 8, 4])
def test_lora_8bit_qlora(tmp_path, folder, name, bits): compare(tmp_path, folder(name), bits=bits, **lora)

@pytest.mark.parametrize('more', [dict(modules_to_save=['lm_head']), dict(bias='all'), dict(bias='lora_only')], ids=['head', 'all', 'lora_only'])
@pytest.mark.parametrize('bits', [16, 4])
def test_copies_and_biases(tmp_path, folder, bits, more): compare(tmp_path, folder('tied'), bits=bits, **lora, **more)

def test_lora_on_float32(tmp_path, folder): compare(tmp_path, folder('llama'), dtype='float32', **lora)

@pytest.mark.parametrize('optim', optims)
def test_optimizers(tmp_path, folder, optim):
    "The 8-bit optimizers of bitsandbytes run on the CPU too; paged ones are not paged there, with the same bytes"
    compare(tmp_path, folder('llama'), optim)
    compare(tmp_path, folder('llama'), optim, r=48, target_modules='all-linear', modules_to_save=['embed_tokens'])

def test_sgd_with_momentum(tmp_path, folder): compare(tmp_path, folder('llama'), 'sgd', optim_args='momentum=0.9')

# ---- the other adapters of PEFT

others = dict(ia3=IA3Config, prompt=PromptTuningConfig, prefix=PrefixTuningConfig)

cases = [(p, n, b) for p in others for n in ('llama', 'gemma2', 'phi', 'falcon') for b in (16, 4) if (p, n)!=('prefix', 'falcon') and (p, n, b)!=('ia3', 'phi', 4)] # there a step casts the biases

@pytest.mark.parametrize('peft,name,bits', cases)
def test_ia3_prompt_and_prefix(tmp_path, folder, peft, name, bits):
    n = {} if peft=='ia3' else dict(num_virtual_tokens=70) # an embedding over 4096 numbers
    dtype = 'float32' if peft=='ia3' and bits==4 else 'bfloat16' # without autocast PEFT hands on float32 there, which attention does not mix
    real = step(tmp_path, folder(name), 'adamw_8bit', bits, dtype, config=others[peft](task_type='CAUSAL_LM', **n))
    e = at_least(Arch.read(folder(name)), peft, dtype=dtype, load_in_4bit=bits==4, optim='adamw_8bit', **n)
    assert {k: getattr(e, k) for k in real}==real

def test_ia3_with_names(tmp_path, folder):
    names = dict(target_modules=['q_proj', 'o_proj', 'down_proj'], feedforward_modules=['down_proj'])
    real = step(tmp_path, folder('qwen3'), 'adamw_torch_fused', config=IA3Config(task_type='CAUSAL_LM', **names))
    e = at_least(Arch.read(folder('qwen3')), 'ia3', lora_target_modules=names['target_modules'])
    assert {k: getattr(e, k) for k in real}==real

def test_a_bottleneck_is_two_linear_layers_behind_attention_and_mlp(folder):
    a = Arch.read(folder('phi'))
    block = torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.Linear(24, 64))
    assert [sum(t.params for t in trained(a, 'bottleneck', lora_target_modules=n, bottleneck_size=24)) for n in ('all-linear', ['fc2'])]==[k*2*sum(p.numel() for p in block.parameters()) for k in (2, 1)]
    e = at_least(a, 'bottleneck', bottleneck_size=24)
    assert (e.params_trained, e.trained_weights)==(4*sum(p.numel() for p in block.parameters()), 4*e.params_trained)

def test_prefix_tuning_of_falcon_is_refused_as_peft_can_not_run_it(folder):
    with pytest.raises(UserError, match='falcon'): at_least(Arch.read(folder('falcon')), 'prefix')

def test_a_rank_over_the_width_is_refused_with_the_layer(folder):
    with pytest.raises(UserError, match=r'lora_r: 65 is over the width of model.layers.0.self_attn.q_proj, 64'): at_least(Arch.read(folder('llama')), lora_r=65)
    assert at_least(Arch.read(folder('llama')), lora_r=64).params_trained
    with pytest.raises(UserError, match='bottleneck_size: 65 is over the width'): at_least(Arch.read(folder('llama')), 'bottleneck', bottleneck_size=65)

# ---- the value, and mistakes

def test_it_shows_itself(folder):
    e = at_least(Arch.read(folder('mixtral')), 'qlora')
    for text in (repr(e), e._repr_html_(), e._repr_markdown_()):
        for owner in ('frozen weights', 'trained weights', 'gradients', 'optimizer', 'total', 'At least', 'without activations', 'not quantised'): assert owner in text

def test_qlora_is_lora_in_4_bits(folder):
    a = Arch.read(folder('llama'))
    assert at_least(a, 'qlora')==at_least(a, 'lora', load_in_4bit=True)!=at_least(a, 'lora')

def test_mistakes_are_sentences(folder):
    a = Arch.read(folder('llama'))
    for bad,text in [(dict(peft='full', load_in_8bit=True), '8 bits'), (dict(load_in_4bit=True, load_in_8bit=True), 'exclude'), (dict(dtype='bf16'), 'bfloat16'),
            (dict(optim='adamw'), "Did you mean 'adamw_"), (dict(peft='lorra'), "Did you mean 'lora'"), (dict(bias='some'), 'lora_only')]:
        with pytest.raises(UserError, match=text): at_least(a, **bad)

def test_a_planted_fault_is_seen(folder):
    "Each tensor counts in the optimizer's bytes"
    ts = [(t, 4) for t in trained(Arch.read(folder('llama')), 'lora', 8)]
    for optim in optims:
        if optim!='sgd': assert all(optimizer_bytes(ts[:i]+ts[i+1:], optim)<optimizer_bytes(ts, optim) for i in range(len(ts)))
