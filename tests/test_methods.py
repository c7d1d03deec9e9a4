"Every method of the table: counted, trained, saved, loaded in a fresh process, merged, on quantised bases, or refused"
import copy, json, subprocess, sys
import pytest, torch
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from conftest import make_tiny
from ftnb.adapter_config import config_of
from ftnb.adapters import trained_by
from ftnb.arch import Arch
from ftnb.base import UserError
from ftnb.load import load_model
from ftnb.methods import methods, not_offered, peft_types
from ftnb.packing import logit_difference
from ftnb.recipe import make_recipe
from ftnb.tune import make_trainable

SIZES = dict(vera=dict(r=16), pvera=dict(r=16), hra=dict(r=4), miss=dict(r=8), randlora=dict(r=8), fourierft=dict(n_frequency=20), waveft=dict(n_frequency=20), vblora=dict(num_vectors=8), shira=dict(r=4), gralora=dict(r=8),
    hira=dict(r=8), psoft=dict(r=8), peanut=dict(r=4), supertuning=dict(sparsity=.9), llama_adapter=dict(adapter_layers=2), adalora=dict(total_step=10))
NAMES = [n for n in methods if n not in ('full', 'qlora')]
IDS = torch.randint(5, 500, (2, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
LABELS = torch.where(torch.arange(12)<5, -100, IDS)

def some(names, now):
    "All names, those that `make test` can't afford for `make soak`"
    return [n if n in now else pytest.param(n, marks=pytest.mark.soak) for n in names]

def recipe(folder, name, **kw):
    own = dict(lora_r=4, lora_alpha=8) if methods[name].kind=='lora' else dict(trainable_token_indices=[3, 4, 5]) if name=='trainable_tokens' else dict(num_virtual_tokens=5) if methods[name].kind=='prompt' else dict(bottleneck_size=8) if name=='bottleneck' else {}
    args = dict(peft_args=SIZES[name]) if name in SIZES else {}
    return make_recipe({**dict(model_name_or_path=str(folder), dtype='float32', use_cpu=True, peft=name), **own, **args, **kw})

def logits(model):
    "Those of the text itself, without virtual tokens"
    with torch.no_grad(): return model.eval()(input_ids=IDS, attention_mask=MASK).logits[:, -IDS.shape[1]:]

def effect(model):
    "What the adapter changes"
    on = logits(model)
    with model.disable_adapter(): return on-logits(model)

def steps(model, n=3, lr=5e-3):
    "Losses of a few steps of AdamW"
    opt, out = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr), []
    model.train()
    for i in range(n):
        loss = model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
        loss.backward()
        opt.step()
        if hasattr(model.base_model, 'update_and_allocate'): model.base_model.update_and_allocate(i)
        opt.zero_grad()
        out.append(loss.item())
    return out

class Walk:
    "Trains each method once and keeps what the tests ask for"
    def __init__(self, folder):
        self.folder, self.done = folder, {}
        self.tiny = make_tiny(folder/'tiny', hidden_size=64, intermediate_size=128)
        self.base = load_model(recipe(self.tiny, 'lora'))
        self.plain = logits(self.base)
    def new(self, name, base=None, **kw):
        torch.manual_seed(0)
        r = recipe(self.tiny, name, **kw)
        return make_trainable(copy.deepcopy(self.base) if base is None else base, r), r
    def __call__(self, name):
        if name in self.done: return self.done[name]
        model, r = self.new(name)
        w = dict(model=model, recipe=r, computed=sorted(p.numel() for p in model.parameters() if p.requires_grad), before={n: p.detach().clone() for n,p in model.named_parameters()})
        out = model.train()(input_ids=IDS, attention_mask=MASK, labels=LABELS)
        out.logits.retain_grad()
        out.loss.backward()
        w['loss'], w['at'] = out.loss.item(), out.logits.grad[:, -IDS.shape[1]:].abs().sum(-1)
        w['gradients'] = {n for n,p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        w['losses'] = steps(model)
        w['logits'] = logits(model)
        w['folder'] = self.folder/name
        model.save_pretrained(w['folder'])
        return self.done.setdefault(name, w)

@pytest.fixture(scope='module')
def walk(tmp_path_factory): return Walk(tmp_path_factory.mktemp('methods'))

@pytest.mark.parametrize('name', NAMES)
def test_what_is_counted_is_what_is_trained(walk, name):
    w = walk(name)
    assert sorted(t.params for t in trained_by(Arch.read(walk.tiny), w['recipe']))==w['computed']

@pytest.mark.parametrize('name', NAMES)
def test_it_learns_and_the_base_stays_bit_for_bit(walk, name):
    w = walk(name)
    assert torch.isfinite(torch.tensor([w['loss'], *w['losses']])).all() and w['losses'][-1]<w['losses'][0]
    now = dict(w['model'].named_parameters())
    same = {n for n,p in w['before'].items() if torch.equal(p, now[n])}
    assert same=={n for n,p in now.items() if not p.requires_grad}

@pytest.mark.parametrize('name', NAMES)
def test_frozen_weights_and_masked_tokens_get_no_gradient(walk, name):
    w = walk(name)
    assert w['gradients']=={n for n,p in w['model'].named_parameters() if p.requires_grad}
    learns = torch.cat([LABELS[:, 1:]!=-100, torch.zeros(2, 1, dtype=torch.bool)], 1)
    assert torch.equal(w['at']!=0, learns)

@pytest.mark.parametrize('name', NAMES)
def test_turned_off_it_leaves_the_base(walk, name):
    w = walk(name)
    with w['model'].disable_adapter(): assert torch.equal(logits(w['model']), walk.plain)
    assert (w['logits']-walk.plain).abs().max()>1e-4

FRESH = '''
import copy, json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
import ftnb.bottleneck
job = json.load(open(sys.argv[1]))
base, ids = AutoModelForCausalLM.from_pretrained(job['base'], dtype=torch.float32), torch.tensor(job['ids'])
torch.manual_seed(7)
out = {}
for name, folder in job['folders'].items():
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    with torch.no_grad(): out[name] = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1]:].clone()
torch.save(out, job['out'])
'''
@pytest.fixture(scope='module')
def again(walk):
    "The logits of every saved adapter, loaded in another process"
    job = walk.folder/'job.json'
    job.write_text(json.dumps(dict(base=walk.tiny, ids=IDS.tolist(), folders={n: str(walk(n)['folder']) for n in NAMES}, out=str(walk.folder/'out.pt'))))
    p = subprocess.run([sys.executable, '-c', FRESH, str(job)], capture_output=True, text=True)
    assert p.returncode==0, p.stderr[-2000:]
    return torch.load(walk.folder/'out.pt')

@pytest.mark.parametrize('name', NAMES)
def test_loaded_in_a_fresh_process_it_says_the_same(walk, again, name): assert torch.allclose(again[name], walk(name)['logits'], atol=1e-5)

@pytest.mark.parametrize('name', NAMES)
def test_no_token_sees_a_later_one(walk, name):
    w = walk(name)
    later = IDS.clone()
    later[:, 8:] = 7
    with torch.no_grad(): got = w['model'].eval()(input_ids=later, attention_mask=MASK).logits[:, -12:]
    assert torch.allclose(got[:, :8], w['logits'][:, :8], atol=1e-5)

@pytest.mark.parametrize('name', NAMES)
def test_packing_is_offered_where_rows_do_not_leak(walk, name):
    try: packs = logit_difference(walk(name)['model'])<1e-4
    except (RuntimeError, ValueError): packs = False
    assert packs==methods[name].packs
    if not packs:
        with pytest.raises(UserError, match='packing: true does not go'): recipe(walk.tiny, name, packing=True)

def checkpointed(walk, name):
    "(gradients, gradients with activations recomputed)"
    model, _ = walk.new(name)
    out = []
    for on in (False, True):
        model.zero_grad()
        if on: model.enable_input_require_grads(); model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        torch.manual_seed(1)
        model.train()(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss.backward()
        out.append({n: p.grad.clone() for n,p in model.named_parameters() if p.requires_grad})
    return out

@pytest.mark.parametrize('name', NAMES)
def test_recomputed_activations_give_the_same_gradients_or_are_refused(walk, name):
    try: a, b = checkpointed(walk, name)
    except RuntimeError: assert not methods[name].checkpoints
    else: assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)==methods[name].checkpoints
    if not methods[name].checkpoints:
        with pytest.raises(UserError, match='activation_checkpointing: true does not go'): recipe(walk.tiny, name, activation_checkpointing=True)

# merged

@pytest.mark.parametrize('name', [n for n in NAMES if methods[n].merges])
def test_merged_it_says_the_same(walk, name):
    w = walk(name)
    got = logits(PeftModel.from_pretrained(copy.deepcopy(walk.base), w['folder']).merge_and_unload(safe_merge=True))
    assert (got-w['logits']).abs().max()<1e-4*w['logits'].abs().max()

@pytest.mark.parametrize('name', [n for n in NAMES if not methods[n].merges])
def test_what_can_not_merge_is_refused(walk, name):
    with pytest.raises(UserError, match='can not become part of the weights'): recipe(walk.tiny, name, export_formats=['merged'])
    assert recipe(walk.tiny, name).export_formats==['adapter']
    with pytest.raises((UserError, AttributeError, NotImplementedError, ValueError)): PeftModel.from_pretrained(copy.deepcopy(walk.base), walk(name)['folder']).merge_and_unload(safe_merge=True)

# quantised bases

def whole_loss(model):
    with torch.no_grad(): return model.eval()(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss.item()

def strong(walk, name):
    "(folder, effect) of an adapter that was trained on, so that its effect stands out of the rounding"
    w = walk(name)
    if 'strong' not in w:
        model = copy.deepcopy(w['model'])
        steps(model, 8, lr=.03)
        model.save_pretrained(w['folder']/'strong')
        w['strong'] = w['folder']/'strong', effect(model)
    return w['strong']

def stands(walk, name, bits):
    "Whether an adapter trained on whole weights means the same on quantised ones, and trains there with the base untouched"
    folder, want = strong(walk, name)
    new = lambda: load_model(recipe(walk.tiny, 'lora', use_dora=bits==4, **{f'load_in_{bits}bit': True}))
    moved, idle = whole_loss(new())-whole_loss(walk.base), abs(walk(name)['loss']-whole_loss(walk.base))<1e-4 # it starts as no change at all
    try:
        got = effect(PeftModel.from_pretrained(new(), folder))
        model, _ = walk.new(name, new())
        before = {n: p.detach().clone() for n,p in model.named_parameters() if not p.requires_grad}
        losses = steps(model)
    except (RuntimeError, TypeError, ValueError, AttributeError): return False
    same = all(torch.equal(before[n], p) for n,p in model.named_parameters() if n in before)
    return bool(torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), 0)>.95) and same and (not idle or abs(losses[0]-walk(name)['losses'][0]-moved)<3e-3)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('name', some(NAMES, ('lora', 'dora', 'ia3', 'bottleneck', 'prefix', 'prompt', 'ptuning', 'llama_adapter', 'hira', 'hra', 'unilora')))
def test_a_quantised_base_is_offered_where_it_works(walk, name, bits):
    pytest.importorskip('bitsandbytes')
    assert stands(walk, name, bits)==(bits in methods[name].bits)
    if bits not in methods[name].bits:
        with pytest.raises(UserError, match=f'load_in_{bits}bit: .* can not stand on a base in {bits} bits'): recipe(walk.tiny, name, **{f'load_in_{bits}bit': True})

# the table

def test_the_table_and_what_is_not_offered_cover_all_of_peft():
    offered = {t.value for m in methods.values() if m.config for t,c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if c is config_of(m.name)}
    assert {t: n for t,n in peft_types.items() if PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(t)] is config_of(n)}==peft_types and set(peft_types)==offered
    assert len(set(NAMES))>=20 and {'lora', 'prefix', 'prompt', 'ptuning', 'ia3', 'bottleneck', 'llama_adapter'}<=set(NAMES) and 'qlora' in methods
    assert not offered & set(not_offered)
    assert offered | set(not_offered)=={t.value for t in PeftType}

SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=320, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
FAMILIES = dict(mistral={}, qwen2={}, qwen3=dict(head_dim=32), gemma=dict(head_dim=32), gemma2=dict(head_dim=32), gemma3_text=dict(head_dim=32), phi={}, phi3={}, granite={}, falcon=dict(new_decoder_architecture=True, num_kv_heads=2),
    falcon_7b=dict(bias=True), mixtral=dict(num_local_experts=4, num_experts_per_tok=2))

@pytest.mark.parametrize('family', some(FAMILIES, ('qwen2', 'phi', 'falcon_7b', 'mixtral')))
def test_every_family_is_counted_as_peft_makes_it(family, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM
    kind = family.split('_7b')[0]
    config = AutoConfig.for_model(kind, **{**{k:v for k,v in SMALL.items() if kind!='falcon' or k not in ('num_key_value_heads', 'intermediate_size')}, **FAMILIES[family]})
    base, arch = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation='eager'), Arch.read(config.to_dict())
    for name in NAMES:
        r, wrong = recipe(tmp_path, name), None
        try: counted = sorted(t.params for t in trained_by(arch, r))
        except UserError as e: counted, wrong = None, e
        try: model = make_trainable(copy.deepcopy(base), r)
        except UserError as e: assert wrong, f'{name}: {e}'
        else:
            real = sorted(p.numel() for p in model.parameters() if p.requires_grad)
            if wrong: # counting refuses what PEFT builds and can't run
                with pytest.raises(RuntimeError): model(input_ids=IDS%300, labels=IDS%300)
            else: assert counted==real, f'{name}: {sum(counted)} counted, {sum(real)} real'

# through the stages

@pytest.mark.parametrize('peft', some(('ia3', 'prefix', 'vera', 'prompt', 'llama_adapter', 'adalora', 'bottleneck'), ('prefix',)))
def test_a_method_is_trained_evaluated_and_exported(made, peft):
    from ftnb.export import export
    from ftnb.generate import answers, load, row_losses
    from ftnb.train import train
    run = made(peft=peft, max_steps=3, learning_rate=.05, test_size=2, **(dict(peft_args=dict(r=16)) if peft=='vera' else {}))
    rep = train(run)
    assert rep['steps']==3 and rep['params_trained']==sum(t.params for t in trained_by(Arch.read(run.recipe.model_name_or_path), run.recipe))
    pair = load(run)
    rows = [(IDS[0].tolist(), LABELS[0].tolist()), (IDS[1, :9].tolist(), LABELS[1, :9].tolist())]
    with pair.using('tuned') as model: tuned, said = row_losses(model, rows, 0), answers(model, pair.tok, [o for o,_ in rows], max_new_tokens=4)
    with pair.using('base') as model: base = row_losses(model, rows, 0)
    assert [n for _,n in tuned]==[n for _,n in base]==[7, 4] and tuned!=base and len(said)==2
    alone = row_losses(pair.tuned, rows[1:], 0)[0][0]
    assert abs(alone-tuned[1][0])<1e-3*abs(alone), 'a row beside a longer one'
    out = export(run)
    assert out['ok'] and [o['format'] for o in out['formats']]==(['adapter', 'merged'] if methods[peft].merges else ['adapter'])

# where LoRA starts

@pytest.mark.parametrize('start', ['gaussian', 'orthogonal', 'pissa', 'pissa_niter_4', 'olora', 'eva'])
def test_wherever_lora_starts_the_saved_adapter_fits_the_untouched_base(walk, start, tmp_path):
    r = recipe(walk.tiny, 'lora', init_lora_weights=start)
    torch.manual_seed(0)
    model = make_trainable(copy.deepcopy(walk.base), r, batches=[dict(input_ids=IDS, attention_mask=MASK)]*2)
    assert torch.allclose(logits(model), walk.plain, atol=1e-4)
    losses = steps(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(walk.base), tmp_path)
    assert losses[-1]<losses[0] and torch.allclose(logits(again), logits(model), atol=1e-4)
    with again.disable_adapter(): assert torch.equal(logits(again), walk.plain)
    model.load_adapter(tmp_path, 'default', is_trainable=True) # as a resumed training does
    assert torch.allclose(logits(again), logits(model), atol=1e-4)

@pytest.mark.filterwarnings('ignore')
def test_loftq_starts_nearer_to_the_whole_weights_than_4_bits_are(walk):
    pytest.importorskip('bitsandbytes')
    new = lambda **kw: make_trainable(load_model(recipe(walk.tiny, 'qlora')), recipe(walk.tiny, 'qlora', lora_r=32, **kw))
    far = lambda model: (logits(model)-walk.plain).norm().item()
    assert far(new(init_lora_weights='loftq'))<.7*far(new())

@pytest.mark.parametrize('kw, said', [(dict(init_lora_weights='pisa'), "Did you mean 'pissa'"), (dict(init_lora_weights='loftq'), 'set peft: qlora'), (dict(init_lora_weights='pissa', load_in_4bit=True), 'can not be done in 4 bits'),
    (dict(peft='vera', lora_r=8), 'peft_args: {r: 8}'), (dict(peft='prompt', lora_target_modules=['q_proj']), 'means nothing to Prompt tuning'), (dict(num_virtual_tokens=5), 'means nothing to LoRA'), (dict(use_dora=True, load_in_8bit=True), 'DoRA can not stand on a base in 8 bits')])
def test_what_does_not_go_together_is_said_before_anything_is_loaded(kw, said):
    with pytest.raises(UserError, match=said.replace('{', r'\{').replace('}', r'\}')): make_recipe(kw)

@pytest.mark.parametrize('args, said', [(dict(rank_dropuot=.1), "Did you mean 'rank_dropout'"), (dict(rank_dropout='much'), 'is not a number')])
def test_a_wrong_option_of_a_method_is_refused_before_the_model_is_loaded(made, monkeypatch, args, said):
    import ftnb.train as stage
    monkeypatch.setattr(stage, 'load_model', lambda *a, **k: pytest.fail('the model was loaded'))
    with pytest.raises(UserError, match=said): stage.make_trainer(made(peft='loha', peft_args=args))

def test_eva_without_data_says_so(walk):
    with pytest.raises(UserError, match='none is at hand'): make_trainable(copy.deepcopy(walk.base), recipe(walk.tiny, 'lora', init_lora_weights='eva'))

# prices and rates

def test_embeddings_and_head_of_llama_8b_cost_a_billion_parameters():
    from ftnb.adapters import what_it_trains
    llama = Arch.read(dict(model_type='llama', hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072))
    assert llama.params==8_030_261_248
    w = what_it_trains(llama, make_recipe(dict(lora_modules_to_save=['embed_tokens', 'lm_head'])))
    assert w.copies==1_050_673_152 and 'modules_to_save copies 1,050,673,152' in w.price and not what_it_trains(llama, make_recipe({})).price

def test_lora_plus_gives_the_second_matrix_the_higher_rate(made):
    from ftnb.train import make_trainer
    trainer = make_trainer(made(peft='lora', lora_r=4, loraplus_lr_ratio=16., learning_rate=1e-3, weight_decay=.01))
    names = {id(p): n for n,p in trainer.model.named_parameters()}
    rates = {names[id(p)].split('.')[-3]: g['lr'] for g in trainer.optimizer.param_groups for p in g['params']}
    assert rates==dict(lora_A=1e-3, lora_B=16e-3)

def test_adalora_ends_at_the_rank_that_was_asked_for(walk):
    model, r = walk.new('adalora', peft_args={}, max_steps=20)
    from ftnb.method_steps import RankCutter
    from types import SimpleNamespace as NS
    cut, opt = RankCutter(), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for i in range(20):
        model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss.backward()
        cut.on_pre_optimizer_step(None, NS(global_step=i), None, model=model)
        opt.step()
        cut.on_optimizer_step(None, NS(global_step=i), None, model=model)
        opt.zero_grad()
    kept = [int((p!=0).sum()) for n,p in model.named_parameters() if 'lora_E' in n]
    assert sum(kept)==4*len(kept) and max(kept)<=6
