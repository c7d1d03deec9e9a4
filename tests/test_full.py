"Full fine-tuning: chosen weights only, frozen ones bit for bit, shared embeddings once, in float32 and bfloat16"
import pytest, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from ftnb.adapters import trained_by
from ftnb.arch import Arch
from ftnb.base import UserError
from ftnb.forecast import forecast
from ftnb.full import make_full, picked
from ftnb.load import load_model
from ftnb.models import read_config
from ftnb.recipe import make_recipe
from ftnb.step import step_of
from ftnb.trace import trace
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

@pytest.mark.parametrize('names', [None, ['lm_head', 'layers.1.mlp'], 'norm', r'.*\.(q|v)_proj\..*', ['embed_tokens']])
def test_the_plan_counts_the_chosen_weights_and_a_shared_embedding_once(tiny, names):
    r = make_recipe(dict(model_name_or_path=tiny, peft='full', use_cpu=True, dtype='float32', trainable_modules=names))
    n = count_parameters(make_full(load_model(r), r))[1]
    assert sum(t.params for t in trained_by(Arch.read(tiny), r))==n==forecast(step_of(r, read_config(tiny))).params_trained

@pytest.mark.parametrize('names', [['mlp'], ['layers.4', 'layers.5'], ['lm_head'], ['norm']])
def test_the_memory_of_chosen_weights_is_that_of_the_traced_step(names):
    config = dict(model_type='llama', hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, vocab_size=1000, max_position_embeddings=512, tie_word_embeddings=True, rms_norm_eps=1e-5, hidden_act='silu')
    s = step_of(make_recipe(dict(peft='full', trainable_modules=names, max_length=64, per_device_train_batch_size=2, activation_checkpointing=False)), config)
    assert abs(forecast(s).peak/trace(s).peak-1)<.002

def test_chosen_modules_are_for_full_fine_tuning_and_must_hold_the_embeddings_of_new_tokens(made):
    with pytest.raises(UserError, match='set peft: full'): make_recipe(dict(peft='lora', trainable_modules=['mlp']))
    with pytest.raises(UserError, match='leaves embed_tokens frozen'): make_trainer(made(trainable_modules=['mlp'], new_tokens=['<a>']))
