"Full fine-tuning: chosen weights only, frozen ones bit for bit, shared embeddings once, in float32 and bfloat16"
import pytest, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from ftnb.base import UserError
from ftnb.full import make_full, picked
from ftnb.load import load_model
from ftnb.recipe import make_recipe
from ftnb.train import make_trainer, train
from ftnb.tune import count_parameters

def weights(folder): return load_file(f'{folder}/model.safetensors')
def logits(model):
    with torch.no_grad(): return model.eval()(torch.arange(5, 25).view(1, -1)).logits

@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_only_the_chosen_weights_change_and_a_shared_embedding_is_trained_and_saved_once(made, tiny, dtype):
    run = made(trainable_modules=['lm_head', 'layers.1.mlp'], dtype=dtype)
    was = {k: v.to(getattr(torch, dtype)) for k,v in weights(tiny).items()}
    trainer = make_trainer(run)
    rep, now = train(run, trainer), weights(run.path('model'))
    chosen = {'model.embed_tokens.weight', *(k for k in was if k.startswith('model.layers.1.mlp'))}
    assert rep['params_trained']==sum(was[k].numel() for k in chosen) and rep['params_total']==sum(v.numel() for v in was.values())
    assert set(now)==set(was) and 'lm_head.weight' not in now and len(chosen)==4
    assert {v.dtype for v in now.values()}=={getattr(torch, dtype)}
    for k,v in now.items(): assert torch.equal(v, was[k])==(k not in chosen), k
    again = AutoModelForCausalLM.from_pretrained(run.path('model'), dtype=getattr(torch, dtype))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(trainer.model))

def test_frozen_weights_get_no_gradient(tiny):
    model = make_full(load_model(make_recipe(dict(model_name_or_path=tiny, peft='full', use_cpu=True, dtype='float32'))), make_recipe(dict(peft='full', trainable_modules=r'.*_norm\.weight|.*layernorm\.weight')))
    model(torch.arange(8).view(1, -1)+5, labels=torch.arange(8).view(1, -1)+5).loss.backward()
    have = {n for n,p in model.named_parameters() if p.grad is not None}
    assert have=={n for n,_ in model.named_parameters() if 'layernorm' in n} and len(have)==4
    assert count_parameters(model)[1]==4*32

@pytest.mark.parametrize('names, hits', [(['layers.1'], 9), ('layers.1', 9), ('norm', 1), (['mlp'], 6), (['model.layers.0.self_attn.q_proj.weight'], 1), (r'.*\.(q|v)_proj\..*', 4), (['lm_head', 'embed_tokens'], 2)])
def test_a_name_picks_whole_parts_of_a_path_and_an_expression_the_whole_path(tiny, names, hits):
    assert len(picked(AutoModelForCausalLM.from_pretrained(tiny), names))==hits

@pytest.mark.parametrize('names, said', [(['mlp', 'q_prj'], "Did you mean 'q_proj'"), (['layers.2'], "'layers.2' is in no parameter"), (r'.*\.mpl\..*', 'is in no parameter'), ('(', 'is no regular expression')])
def test_a_name_that_is_in_no_parameter_stops_before_training(made, names, said):
    with pytest.raises(UserError, match='trainable_modules') as e: make_trainer(made(trainable_modules=names))
    assert said in str(e.value) and '\n' not in str(e.value)

def test_chosen_modules_are_for_full_fine_tuning_and_must_hold_the_embeddings_of_new_tokens(made):
    with pytest.raises(UserError, match='set peft: full'): make_recipe(dict(peft='lora', trainable_modules=['mlp']))
    with pytest.raises(UserError, match='leaves embed_tokens frozen'): make_trainer(made(trainable_modules=['mlp'], new_tokens=['<a>']))
