"A model merged shard by shard is, bit for bit, the model merged whole in float32 and cast once; what can't be merged so says why"
import json
from pathlib import Path
import pytest

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from conftest import Made, make_tiny
from ftnb.base import UserError
from ftnb.export import export, merge_way, save_merged
from ftnb.gguf_size import disk_need, gguf_bytes
from ftnb.load import fit_vocabulary, load_model
from ftnb.merged import merge, merged_source, untie
from ftnb.models import read_config
from ftnb.recipe import make_recipe
from ftnb.runs import Run
from ftnb.shards import Parts, Whole, write_shards
from ftnb.stage_memory import stage_memory
from ftnb.step import step_of
from ftnb.tokenizer import load_tokenizer
from ftnb.train import train
from ftnb.trained import load_trained, place
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

LATER = ('rslora', 'norms', 'rows', 'head', 'ia3', 'biases', 'shared_head') # `make soak`

@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.soak) if n in LATER else n for n in CASES])
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

@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "A trained run, exported with too little memory for float32, and what it said"
    tmp = tmp_path_factory.mktemp('exported')
    base = make_tiny(tmp/'base', hidden_size=64, intermediate_size=128)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    run = Made(base, tmp)(peft='lora', lora_r=8, max_steps=2, learning_rate=1e-2, max_certify_samples=1, max_new_tokens=2, export_formats=['adapter', 'merged', 'f16'], max_shard_size='3MB')
    train(run)
    return run, export(run, dict(cpu=3*run.report('train')['params_total']))

def test_an_export_without_room_for_float32_is_held_in_16_bits_and_says_so(exported):
    run, rep = exported
    page = run.path('reports', 'certificate.html').read_text()
    assert rep['ok'] and rep['held']=='bfloat16' and rep['merge']==dict(way='shard by shard', why='float32 does not fit')
    assert 'held in bfloat16, as float32 does not fit' in rep['line'] and 'held in bfloat16, as float32 does not fit' in page and 'for the trained model, which is held in bfloat16' in page
    assert next(o for o in rep['formats'] if o['format']=='adapter')['logits']<=1e-5
    assert merge_way(run, True)==dict(way='whole', why='')

def test_files_are_the_same_whichever_way_the_memory_allows(exported):
    run = exported[0]
    weights = lambda d: {f.name: f.read_bytes() for f in sorted(Path(d).glob('*.safetensors'))}
    files = lambda d: {**weights(d), **{n: (Path(d)/n).read_bytes() for n in ('config.json', 'generation_config.json')}}
    shipped = files(run.path('merged'))
    ref = load_trained(run)
    assert ref.held=='float32' and merge(ref)<1e-5
    with merged_source(run, ref) as a, merged_source(run, ref, shards=True) as b: assert len(weights(a))==2 and weights(a)==weights(b)
    assert len(shipped)==4 and shipped==files(save_merged(run, ref, torch.bfloat16))

def test_the_plan_says_of_the_merge_what_the_export_does(exported):
    run = exported[0]
    s = step_of(run.recipe, read_config(run.recipe.model_name_or_path), 'cpu', True, 64, .2)
    n = run.report('train')['params_total']
    for width in (3, 5):
        row, (d, dtype) = stage_memory(run.recipe, s, ram=width*n)['merge'], place(run, dict(cpu=width*n))
        assert ('shard by shard' in row['what'])==(dtype!=torch.float32)==(width==3)
    assert stage_memory(run.recipe, s, ram=3*n)['merge']['ram']<stage_memory(run.recipe, s, ram=5*n)['merge']['ram']

def test_what_has_to_be_merged_whole_and_does_not_fit_is_refused_with_the_reason(exported, monkeypatch):
    run = exported[0]
    def no(*a): raise Whole('the checkpoint is quantised')
    monkeypatch.setattr('ftnb.export.parts_of', no)
    n = run.report('train')['params_total']
    with pytest.raises(UserError, match='merges and checks in float32, which takes .*It can not be merged shard by shard: the checkpoint is quantised'): merge_way(run, False, dict(cpu=3*n))
    assert merge_way(run, True, dict(cpu=5*n))==dict(way='whole', why='the checkpoint is quantised')
    with pytest.raises(UserError, match='holds the trained model in 16 bits at least'): merge_way(run, True, dict(cpu=n))

def test_the_disk_is_counted_with_the_files_that_are_there_for_a_while(exported):
    run = exported[0]
    assert merge_way(run, True, dict(cpu=5*run.report('train')['params_total']))==dict(way='shard by shard', why='there is no room for a copy in 16 bits')
    size = lambda d: sum(f.stat().st_size for f in run.path(d).glob('*.safetensors'))
    gguf = dict(f16=run.path('gguf', f'{run.name}-f16.gguf').stat().st_size, q8_0=gguf_bytes(read_config(run.recipe.model_name_or_path), 'q8_0'))
    for formats, parts in ((['q8_0'], [size('merged'), *gguf.values()]), (['merged'], [size('merged')]), (['merged', 'f16'], [2*size('merged'), gguf['f16']]), (['merged_4bit'], [size('merged')])):
        need = disk_need(run, formats)
        assert sum(parts)*.98<need<sum(parts)*(1.25 if 'merged_4bit' not in formats else 1.5), (formats, need, parts)
