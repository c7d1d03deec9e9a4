"Tokens that a recipe adds are learned, saved with the adapter and still there in what is exported; the old ones stay as they were"
import dataclasses
import pytest, torch
from safetensors.torch import load_file
from ftnb.adapter_config import config_of
from ftnb.adapters import trained_by
from ftnb.arch import Arch
from ftnb.base import UserError
from ftnb.export import export
from ftnb.evaluate import evaluate
from ftnb.generate import load
from ftnb.load import fit_vocabulary, load_model
from ftnb.methods import methods
from ftnb.recipe import make_recipe
from ftnb.tokenizer import load_tokenizer, new_token_ids
from ftnb.train import make_trainer, train
from ftnb.tune import make_trainable
from conftest import make_tiny

NEW = ['<sum>', '<end-of-sum>']
ROWS = [dict(prompt=f'<sum>{i} and {i+3}', completion=f'<sum>{2*i+3}<end-of-sum>') for i in range(26)]
BASE = dict(new_tokens=NEW, max_steps=3, learning_rate=1e-2, save_strategy='no', test_size=2, max_new_tokens=4)

@pytest.fixture(scope='module')
def folders(tiny, tmp_path_factory):
    "Tiny models: embeddings shared, apart, and wide enough for blocks of 4 bits"
    d = tmp_path_factory.mktemp('tiny')
    return dict(shared=tiny, apart=make_tiny(d/'apart', tie_word_embeddings=False), wide=make_tiny(d/'wide', hidden_size=64))

def old(folder, name='model.embed_tokens.weight'): return load_file(f'{folder}/model.safetensors')[name]

soak = pytest.mark.soak
@pytest.mark.parametrize('kind, peft', [('shared', 'lora'), pytest.param('apart', 'lora', marks=soak), pytest.param('wide', 'qlora', marks=soak), pytest.param('shared', 'bottleneck', marks=soak),
    pytest.param('shared', 'full', marks=soak), pytest.param('apart', 'full', marks=soak)])
def test_two_new_tokens_go_through_training_evaluation_and_export(made, folders, kind, peft):
    folder, ends = folders[kind], 1+(kind=='apart')
    run = made(ROWS, model_name_or_path=folder, peft=peft, **BASE, **(dict(bottleneck_size=8) if peft=='bottleneck' else {}))
    tok, was = load_tokenizer(run.recipe), old(folder)
    ids, n = new_token_ids(tok, NEW), len(was)
    assert ids==[n, n+1] and tok.convert_ids_to_tokens(tok('1<sum>2')['input_ids'])==['1', '<sum>', '2']
    start = fit_vocabulary(load_model(run.recipe, dtype=torch.float32, quantised=False), tok)
    train(run)
    assert evaluate(run)['n']==2
    rep = export(run)
    assert rep['ok'], rep
    if peft!='full':
        kept = load_file(run.path('adapter', 'adapter_model.safetensors'))
        rows = {k: v for k,v in kept.items() if 'trainable_tokens_delta' in k}
        assert len(rows)==ends and all(len(v)==2 for v in rows.values())
        assert not any(n in v.shape or n+2 in v.shape for v in kept.values())
        assert not torch.equal(next(v for k,v in rows.items() if 'embed' in k), start.get_input_embeddings().weight[n:])
    if peft=='bottleneck': return
    merged = run.path('merged')
    for name in ('model.embed_tokens.weight', 'lm_head.weight')[:ends]:
        now, before = old(merged, name), old(folder, name)
        assert len(now)==n+2 and not torch.equal(now[n:], start.state_dict()[name][n:])
        if peft!='full': assert torch.equal(now[:n], before)
    pair = load(run)
    assert '<sum>' in pair.tok.decode(ids, skip_special_tokens=True) and pair.tuned.get_input_embeddings().weight.shape[0]==n+2

@pytest.mark.parametrize('kind, values', [('shared', {}), ('apart', {}), ('apart', dict(lora_modules_to_save=['lm_head'])), ('shared', dict(trainable_token_indices=[7, 9])), ('apart', dict(pad_token='new'))])
def test_the_plan_counts_the_rows_of_new_tokens(folders, kind, values):
    r = make_recipe(dict(model_name_or_path=folders[kind], new_tokens=NEW, lora_r=4, use_cpu=True, dtype='float32', **values))
    bare, model = make_recipe({**{k: v for k,v in values.items() if k=='lora_modules_to_save'}, 'lora_r': 4}), make_trainable(fit_vocabulary(load_model(r), load_tokenizer(r)), r)
    arch = Arch.read(folders[kind])
    rows = sum(p.numel() for n,p in model.named_parameters() if p.requires_grad and 'trainable_tokens' in n)
    assert sum(t.params for t in trained_by(arch, r))-sum(t.params for t in trained_by(arch, bare))==rows>=2*arch.hidden_size

def test_a_method_is_refused_in_words_unless_peft_trains_single_tokens_beside_it():
    can = {n for n in methods if n=='full' or 'trainable_token_indices' in {f.name for f in dataclasses.fields(config_of(n))}}
    for n in methods:
        if n in can: assert make_recipe(dict(peft=n, new_tokens=NEW)).new_tokens==NEW
        else:
            with pytest.raises(UserError, match='new_tokens: .* can not train the embeddings of new tokens; set peft: lora'): make_recipe(dict(peft=n, new_tokens=NEW))
    assert {'full', 'lora', 'qlora', 'dora', 'rslora', 'adalora', 'bottleneck'}==can

def test_a_token_that_is_there_already_is_refused_and_a_new_pad_is_learned_with_the_others(tiny):
    recipe = lambda **kw: make_recipe(dict(dict(model_name_or_path=tiny, dtype='float32', use_cpu=True), **kw))
    with pytest.raises(UserError, match=r"new_tokens: '<\|im_end\|>' is in the vocabulary"): load_tokenizer(recipe(new_tokens=['<|im_end|>']))
    for more,n in ((dict(pad_token='new'), 1), (dict(new_tokens=NEW), 2), (dict(pad_token='new', new_tokens=NEW), 3)):
        r = recipe(**more)
        tok, was = load_tokenizer(r), len(old(tiny))
        model = make_trainable(fit_vocabulary(load_model(r), tok), r)
        assert len(tok)==was+n and model.get_base_model().config.vocab_size==was+n
        rows = model.peft_config['default'].trainable_token_indices
        assert (rows and sorted(rows['embed_tokens']))==(list(range(was, was+n)) if 'new_tokens' in more else None)

def test_every_load_makes_the_same_new_rows_and_leaves_the_random_state(tiny):
    r = make_recipe(dict(model_name_or_path=tiny, dtype='float32', use_cpu=True, new_tokens=NEW))
    state = torch.random.get_rng_state()
    a, b = (fit_vocabulary(load_model(r), load_tokenizer(r)).get_input_embeddings().weight for _ in range(2))
    assert torch.equal(a, b) and torch.equal(state, torch.random.get_rng_state())
    torch.testing.assert_close(a[-2:].detach(), old(tiny).mean(0).expand(2, -1), rtol=0, atol=1e-5)

@pytest.mark.parametrize('kind, values', [('shared', dict(new_tokens=NEW)), pytest.param('apart', dict(new_tokens=NEW), marks=soak), pytest.param('shared', dict(trainable_token_indices=[33, 34]), marks=soak)])
def test_the_rows_get_the_gradient_of_trls_own_loss(made, folders, kind, values, monkeypatch):
    grads = []
    for short in (True, False):
        run = made(ROWS, model_name_or_path=folders[kind], peft='lora', seed=1, **values)
        trainer = make_trainer(run)
        monkeypatch.setattr(type(trainer), 'selects', lambda self, model: short)
        model = trainer.model.train()
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.compute_loss(model, batch).backward()
        grads.append({n: p.grad for n,p in model.named_parameters() if 'trainable_tokens_delta' in n})
    assert len(grads[0])==1+(kind=='apart') and all(g.abs().sum()>0 for g in grads[0].values())
    for n,g in grads[0].items(): torch.testing.assert_close(g, grads[1][n], rtol=1e-4, atol=1e-6)
