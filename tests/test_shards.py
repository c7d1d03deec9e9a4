"A model merged shard by shard is, bit for bit, the model merged whole in float32 and cast once; what can't be merged so says why"
import json
import pytest

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from conftest import make_tiny
from ftnb.load import fit_vocabulary, load_model
from ftnb.merged import untie
from ftnb.recipe import make_recipe
from ftnb.shards import Parts, Stored, Whole, write_shards
from ftnb.tokenizer import load_tokenizer
from ftnb.tune import make_trainable, with_adapter

SIZE = '300KB' # many files

@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    "Folders of tiny models: in several files: embeddings shared or apart, biases, experts"
    d, kinds = tmp_path_factory.mktemp('bases'), dict(shared={}, apart=dict(tie_word_embeddings=False), biased=dict(kind='qwen2'), gpt2=dict(kind='gpt2'),
        qwen3_moe=dict(kind='qwen3_moe', num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, mlp_only_layers=[]))
    def get(kind):
        if not (d/kind).exists():
            f = make_tiny(d/kind, **kinds[kind])
            AutoModelForCausalLM.from_pretrained(f, dtype=torch.bfloat16).save_pretrained(f, max_shard_size=SIZE)
            (d/kind/'model.safetensors').unlink()
        return str(d/kind)
    return get

def trained(bases, kind, folder, **values):
    "(recipe, tokenizer, folder of an adapter whose weights are random)"
    args = values.pop('args', {})
    r = make_recipe(dict(dict(model_name_or_path=bases(kind), dtype='float32', use_cpu=True, **values), **({'peft_args': args} if args else {})))
    tok = load_tokenizer(r)
    torch.manual_seed(1)
    m = make_trainable(fit_vocabulary(load_model(r), tok), r)
    with torch.no_grad():
        for p in m.parameters():
            if p.requires_grad: p.add_(.02*torch.randn_like(p))
    m.save_pretrained(folder)
    return r, tok, folder

def whole(r, tok, adapter, dtype, to):
    "What an export writes that merges the model whole"
    m = with_adapter(fit_vocabulary(load_model(r, dtype=torch.float32, quantised=False), tok), adapter).merge_and_unload(safe_merge=True)
    untie(m).to(dtype).save_pretrained(to, max_shard_size=SIZE)
    return to

def by_shards(r, tok, adapter, dtype, to):
    parts = Parts(r, r.model_name_or_path, tok, adapter)
    write_shards(parts, parts.hull(dtype), to, SIZE)
    return to

def tensors(folder): return {k: v for f in sorted(folder.glob('*.safetensors')) for k,v in load_file(f).items()}

def same(a, b):
    "Whether two folders hold the same model"
    x, y = tensors(a), tensors(b)
    config = lambda d, n: {k: v for k,v in json.loads((d/n).read_text()).items() if not k.startswith('_')} if (d/n).exists() else None
    return {*x}=={*y} and all(x[k].dtype==y[k].dtype and torch.equal(x[k], y[k]) for k in x) and all(config(a, n)==config(b, n) for n in ('config.json', 'generation_config.json', 'model.safetensors.index.json'))

CASES = dict(lora=('shared', dict(peft='lora')), dora=('apart', dict(peft='dora')), rslora=('shared', dict(peft='rslora', lora_target_modules=['q_proj', 'down_proj'])),
    ia3=('shared', dict(peft='ia3')), vera=('apart', dict(peft='vera', args=dict(r=16))), norms=('shared', dict(peft='ln_tuning')), biases=('biased', dict(peft='lora', lora_bias='all')),
    tokens=('shared', dict(peft='lora', new_tokens=['<a>', '<b>'])), tokens_apart=('apart', dict(peft='lora', new_tokens=['<a>', '<b>'])), rows=('shared', dict(peft='lora', trainable_token_indices=[5, 6])),
    embeddings=('shared', dict(peft='lora', lora_modules_to_save=['embed_tokens'])), head=('apart', dict(peft='lora', lora_modules_to_save=['lm_head'])),
    shared_head=('shared', dict(peft='lora', lora_target_modules=['lm_head', 'q_proj'])), experts_beside=('qwen3_moe', dict(peft='lora', lora_target_modules=['q_proj', 'v_proj'])))

@pytest.mark.parametrize('name', CASES)
def test_the_files_are_those_of_a_whole_merge(bases, name, tmp_path):
    kind, values = CASES[name]
    made = trained(bases, kind, tmp_path/'adapter', **values)
    dtype = {'dora': torch.float16, 'ia3': torch.float32}.get(name, torch.bfloat16)
    assert same(by_shards(*made, dtype, tmp_path/'b'), whole(*made, dtype, tmp_path/'a'))
    assert len([*(tmp_path/'b').glob('*.safetensors')])>1

def test_a_model_trained_whole_is_only_cast(bases, tmp_path):
    r = make_recipe(dict(model_name_or_path=bases('gpt2'), use_cpu=True, peft='full'))
    tok = load_tokenizer(r)
    load_model(r, dtype=torch.float32).to(torch.float16).save_pretrained(tmp_path/'a', max_shard_size=SIZE)
    assert same(by_shards(r, tok, None, torch.float16, tmp_path/'b'), tmp_path/'a')

class Skips(Parts):
    "Leaves one layer as it was"
    def tensor(self, name): return self.stored.read(name) if 'layers.1.self_attn.q_proj' in name else super().tensor(name)

def test_a_layer_left_out_and_a_merge_in_16_bits_are_seen(bases, tmp_path):
    made = r, tok, adapter = trained(bases, 'shared', tmp_path/'adapter', peft='lora')
    right = by_shards(*made, torch.bfloat16, tmp_path/'right')
    parts = Skips(r, r.model_name_or_path, tok, adapter)
    write_shards(parts, parts.hull(torch.bfloat16), tmp_path/'left_out', SIZE)
    with_adapter(load_model(r, dtype=torch.bfloat16), adapter).merge_and_unload(safe_merge=True).save_pretrained(tmp_path/'rough', max_shard_size=SIZE)
    assert not same(tmp_path/'left_out', right) and not same(tmp_path/'rough', right)

def test_what_can_not_be_merged_by_shards_says_why(bases, tmp_path):
    made = trained(bases, 'shared', tmp_path/'psoft', peft='psoft', args=dict(r=8))
    with pytest.raises(Whole, match="from the base's weights"): by_shards(*made, torch.bfloat16, tmp_path/'a')
    made = trained(bases, 'qwen3_moe', tmp_path/'experts', peft='lora')
    if any('experts' in k for k in tensors(tmp_path/'experts')):
        with pytest.raises(Whole, match='has no tensor .*experts'): by_shards(*made, torch.bfloat16, tmp_path/'b')
    r, tok, adapter = trained(bases, 'shared', tmp_path/'lora', peft='lora')
    config = tmp_path/'packed/config.json'
    config.parent.mkdir()
    config.write_text(json.dumps({**json.loads(open(bases('shared')+'/config.json').read()), 'quantization_config': dict(quant_method='bitsandbytes', load_in_4bit=True)}))
    with pytest.raises(Whole, match='quantised'): Parts(r, config.parent, tok, adapter)
