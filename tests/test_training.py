"Training: right in its numbers, repeatable, resumable, and clear about what stopped it"
import copy, math, signal, subprocess, sys, time
from dataclasses import replace
import pytest

torch = pytest.importorskip('torch')
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTTrainer

from conftest import make_tiny, short_rows
from ftnb.base import UserError
from ftnb.load import fit_vocabulary, load_model, quantisation
from ftnb.loss import Trainer, selected_loss
from ftnb.recipe import make_recipe
from ftnb.runs import Run
from ftnb.tokenizer import set_pad
from ftnb.train import Stopped, make_trainer, token_data, train

STEADY = dict(optim='sgd', lr_scheduler_type='constant', warmup_steps=0, max_grad_norm=0, train_sampling_strategy='sequential', learning_rate=.1)
LORA = dict(peft='lora', lora_r=4)

class Grads(TrainerCallback):
    "Keeps the gradients of the first step"
    def __init__(self): self.first = None
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.first is None: self.first = {n: p.grad.clone() for n,p in model.named_parameters() if p.grad is not None}

class StopAt(TrainerCallback):
    "Asks to stop after a step, as a panel does"
    def __init__(self, run, step): self.run, self.step = run, step
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step==self.step-1: self.run.path('STOP').write_text('')

def trained(run, *calls):
    "(report, weights) of a run"
    trainer = make_trainer(run)
    for c in calls: trainer.add_callback(c)
    return train(run, trainer), weights(run)

def weights(run):
    p = run.path('adapter', 'adapter_model.safetensors')
    return load_file(p if p.exists() else run.path('model', 'model.safetensors'))

def furthest(a, b):
    "Largest difference of two sets of tensors"
    assert a.keys()==b.keys()
    return max((a[k]-b[k]).abs().max().item() for k in a)

def norm(ts): return math.sqrt(sum(t.double().pow(2).sum().item() for t in ts))

# gradient accumulation

def accumulated(made, batch, steps, **kw):
    grads = Grads()
    rep, w = trained(made(per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=5, **STEADY, **kw), grads)
    return rep, w, grads.first

@pytest.mark.parametrize('kw', [{}, LORA], ids=['full', 'lora'])
def test_accumulating_four_single_rows_is_the_same_as_a_batch_of_four(made, kw):
    (a, wa, ga), (b, wb, gb) = accumulated(made, 4, 1, **kw), accumulated(made, 1, 4, **kw)
    for x,y in zip(a['logs'], b['logs']):
        if 'loss' in x: assert abs(x['loss']-y['loss'])<1e-5
    assert ga.keys()==gb.keys() and norm([ga[k]-gb[k] for k in ga])<=1e-5*norm(ga.values())
    assert furthest(wa, wb)<1e-6

def test_the_mean_of_means_would_be_seen(made, monkeypatch):
    _, wa, ga = accumulated(made, 4, 1)
    whole = Trainer._short_loss
    monkeypatch.setattr(Trainer, '_short_loss', lambda self, model, inputs, n: whole(self, model, inputs, None)/4)
    _, wb, gb = accumulated(made, 1, 4)
    assert norm([ga[k]-gb[k] for k in ga])>1e-3*norm(ga.values()) and furthest(wa, wb)>1e-5

# repeatable and resumable

def test_the_same_seed_gives_the_same_weights_bit_for_bit(made):
    kw = dict(LORA, lora_dropout=.1, max_steps=3, train_sampling_strategy='random')
    (_, a), (_, b), (_, c) = trained(made(**kw)), trained(made(**kw)), trained(made(seed=7, **kw))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert furthest(a, c)>0

def test_who_stops_does_not_wait_for_a_validation(made):
    run = made(max_steps=4, eval_strategy='epoch')
    with pytest.raises(Stopped, match='step 2 of 4; checkpoint-2 is kept'): trained(run, StopAt(run, 2))
    assert run.events('train_begin')[-1]['eval_rows'] and not run.events('eval')

@pytest.mark.parametrize('kw', [dict(LORA, lora_dropout=.1), dict(optim='sgd')], ids=['lora with dropout', 'full'])
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(made, kw):
    kw = dict(kw, max_steps=4, save_strategy='steps', save_steps=100, train_sampling_strategy='random')
    _, whole = trained(made(**kw))
    run = made(**kw)
    with pytest.raises(Stopped, match='step 2 of 4; checkpoint-2 is kept'): trained(run, StopAt(run, 2))
    assert not run.path('STOP').exists() and not run.path('adapter').exists() and not run.path('model').exists()
    rep, parts = trained(run)
    assert rep['resumed_from']=='checkpoint-2' and rep['steps']==4
    assert furthest(whole, parts)<1e-6

def test_a_checkpoint_of_other_values_is_not_resumed(made):
    run = made(max_steps=4)
    with pytest.raises(Stopped): trained(run, StopAt(run, 2))
    other = Run(run.folder, replace(run.recipe, learning_rate=5e-4))
    rep, _ = trained(other)
    assert rep['resumed_from'] is None and any('belongs to other inputs' in e['text'] for e in run.events('note'))

SLOW = '''
import sys, time
from transformers import TrainerCallback
from ftnb.runs import Run
from ftnb.train import make_trainer, train, Stopped
class Slow(TrainerCallback):
    def on_step_end(self, *a, **k): time.sleep(.1)
run = Run(sys.argv[1])
t = make_trainer(run); t.add_callback(Slow())
try: train(run, t)
except Stopped as e: print(e); sys.exit(130)
'''
def test_ctrl_c_keeps_a_checkpoint_and_the_next_call_goes_on(made):
    run = made(max_steps=80, save_strategy='steps', save_steps=1000, **LORA)
    p = subprocess.Popen([sys.executable, '-c', SLOW, str(run.folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    t = time.time()
    while len(run.events('log'))<2 and time.time()-t<120 and p.poll() is None: time.sleep(.05)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode==130, err
    ckpt = run.last_checkpoint()
    assert f'{ckpt.name} is kept' in out and (ckpt/'optimizer.pt').exists()
    rep = train(run)
    assert rep['resumed_from']==ckpt.name and rep['steps']==80

# what stops a training

def damaged(tiny, folder):
    "A copy of the tiny model with one infinite weight"
    import shutil
    from safetensors.torch import save_file
    shutil.copytree(tiny, folder)
    w = load_file(folder/'model.safetensors')
    w['model.layers.0.mlp.down_proj.weight'][0,0] = float('inf')
    save_file(w, folder/'model.safetensors', metadata={'format': 'pt'})
    return str(folder)

@pytest.mark.parametrize('kw', [dict(learning_rate=1e-4), dict(learning_rate=1e-3)], ids=['low rate', 'high rate'])
def test_an_infinite_weight_stops_the_first_step_with_its_likely_cause(made, tiny, tmp_path, kw):
    run = made(model_name_or_path=damaged(tiny, tmp_path/'damaged'), **kw)
    with pytest.raises(UserError) as e: trained(run)
    assert str(e.value).startswith('The loss of step 1 is nan') and 'weights of the model may be damaged' in str(e.value) and '\n' not in str(e.value)

def test_a_learning_rate_that_blows_up_stops_in_the_first_steps(made):
    with pytest.raises(UserError, match=r'The loss of step \d+ is (nan|inf): learning_rate: 1e\+\d+ is high'):
        trained(made(optim='sgd', learning_rate=1e30, lr_scheduler_type='constant', warmup_steps=0, max_grad_norm=0, max_steps=10))

# the loss is TRL's

def both_losses(trainer, batch):
    "(loss, gradients) of our path and of TRL's for one batch"
    model, out = trainer.model.train(), []
    for cls in (Trainer, SFTTrainer):
        model.zero_grad()
        n = (batch['labels'][:, 1:]!=-100).sum()
        loss = cls.compute_loss(trainer, model, {k:v.clone() if hasattr(v, 'clone') else v for k,v in batch.items()}, num_items_in_batch=n)
        loss.backward()
        out.append((loss.item(), {k: p.grad.clone() for k,p in model.named_parameters() if p.grad is not None}))
    return out

@pytest.mark.parametrize('packing', [False, True], ids=['padded', 'packed'])
@pytest.mark.parametrize('kind', ['llama', 'qwen2', 'gemma2'])
def test_the_loss_and_its_gradients_are_those_of_trl(made, tiny, tmp_path, kind, packing):
    path = tiny if kind=='llama' else make_tiny(tmp_path/kind, kind, initializer_range=.4)
    trainer = make_trainer(made(model_name_or_path=path, packing=packing, max_length=64, attn_implementation='eager' if kind=='gemma2' else 'sdpa'))
    batch = next(iter(trainer.get_train_dataloader()))
    (a, ga), (b, gb) = both_losses(trainer, batch)
    assert trainer.selects(trainer.model)==(kind!='gemma2'), 'softcapped logits are not the output layer alone'
    assert abs(a-b)<1e-5*max(1, abs(b))
    assert norm([ga[k]-gb[k] for k in gb])<=1e-4*norm(gb.values())

def test_a_soft_cap_is_seen_even_when_the_first_logits_are_small(made, tmp_path):
    trainer = make_trainer(made(model_name_or_path=make_tiny(tmp_path/'gemma2', 'gemma2'), attn_implementation='eager'))
    assert not trainer.selects(trainer.model)

def test_packed_rows_do_not_see_each_other(made):
    one, packed = make_trainer(made(per_device_train_batch_size=1)), make_trainer(made(packing=True, max_length=128, per_device_train_batch_size=1))
    def total(trainer):
        trainer.model.eval()
        loss = n = 0
        for b in trainer.get_train_dataloader():
            with torch.no_grad(): loss += trainer.compute_loss(trainer.model, b, num_items_in_batch=torch.tensor(1)).item()
            n += int((b['labels']!=-100).sum())
        return loss, n
    (a, n), (b, m) = total(one), total(packed)
    assert n==m and abs(a-b)<1e-4*a

def test_blocks_of_the_loss_add_up(monkeypatch):
    torch.manual_seed(0)
    head, h, y = torch.nn.Linear(8, 50, bias=False), torch.randn(2, 30, 8), torch.randint(0, 50, (2, 30))
    y[0,:9] = -100
    whole, n = selected_loss(head, h, y)
    monkeypatch.setattr('ftnb.loss.block_logits', 50*7)
    parts, m = selected_loss(head, h, y)
    assert n==m==int((y[:, 1:]!=-100).sum()) and torch.allclose(whole, parts, rtol=1e-6)
    want = torch.nn.functional.cross_entropy(head(h)[:, :-1].reshape(-1, 50), y[:, 1:].reshape(-1), ignore_index=-100, reduction='sum')
    assert torch.allclose(whole, want, rtol=1e-6)

# 4 and 8 bits

@pytest.mark.parametrize('kw, kind', [(dict(peft='qlora'), 'Linear4bit'), (dict(peft='lora', load_in_8bit=True), 'Linear8bitLt')], ids=['4 bit', '8 bit'])
@pytest.mark.filterwarnings('ignore:bitsandbytes')
def test_a_quantised_base_stays_as_it_is_while_its_adapter_learns(made, tmp_path, kw, kind):
    pytest.importorskip('bitsandbytes')
    path = make_tiny(tmp_path/'wide', hidden_size=64, intermediate_size=128)
    run = made(model_name_or_path=path, lora_r=4, max_steps=2, learning_rate=1e-2, **kw)
    trainer = make_trainer(run)
    layers = [m.base_layer for n,m in trainer.model.named_modules() if hasattr(m, 'base_layer')]
    assert layers and all(type(l).__name__==kind for l in layers)
    before = [l.weight.data.clone() for l in layers]
    rep = train(run, trainer)
    assert math.isfinite(rep['train_loss']) and all(torch.equal(b, l.weight.data) for b,l in zip(before, layers))
    assert max(v.abs().max() for k,v in weights(run).items() if 'lora_B' in k)>0

def packs_on_cpu():
    "Whether bitsandbytes repacks 4-bit weights on this processor when a model is only evaluated"
    try: from bitsandbytes.nn.modules import has_avx512bf16
    except ImportError: return False
    return has_avx512bf16()

@pytest.mark.filterwarnings('ignore:bitsandbytes')
def test_an_evaluation_in_between_changes_no_gradient_of_qlora(made, tmp_path):
    pytest.importorskip('bitsandbytes')
    t = make_trainer(made(model_name_or_path=make_tiny(tmp_path/'wide', hidden_size=64, intermediate_size=128), peft='qlora', lora_r=4))
    torch.manual_seed(1)
    for n,p in t.model.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.1)
    batch = next(iter(t.get_train_dataloader()))
    def grads():
        t.model.train().zero_grad()
        SFTTrainer.compute_loss(t, t.model, dict(batch), num_items_in_batch=(batch['labels'][:, 1:]!=-100).sum()).backward()
        return {n: p.grad.clone() for n,p in t.model.named_parameters() if p.grad is not None}
    before = grads()
    t.selects(t.model)
    t.evaluate(t.train_dataset.select(range(2)))
    after = grads()
    assert norm([before[k]-after[k] for k in before])<=1e-3*norm(before.values())

def test_four_bits_are_nf4_with_nested_scales_unless_said_otherwise(made, tmp_path):
    pytest.importorskip('bitsandbytes')
    r = make_recipe(dict(model_name_or_path=make_tiny(tmp_path/'wide', hidden_size=64, intermediate_size=128), load_in_4bit=True, use_cpu=True))
    q = quantisation(r)
    assert r.peft=='qlora' and q.bnb_4bit_quant_type=='nf4' and q.bnb_4bit_use_double_quant
    w = load_model(r).model.layers[0].mlp.down_proj.weight
    assert w.quant_state.quant_type=='nf4' and w.quant_state.nested and w.data.element_size()*w.data.numel()==64*128//2
    assert quantisation(replace(r, bnb_4bit_quant_type='fp4')).bnb_4bit_quant_type=='fp4'

def test_one_four_bit_layer_computes_nearly_what_the_whole_one_does():
    bnb = pytest.importorskip('bitsandbytes')
    torch.manual_seed(0)
    whole, x = torch.nn.Linear(64, 64, bias=False), torch.randn(16, 64, requires_grad=True)
    q = bnb.nn.Linear4bit(64, 64, bias=False, quant_type='nf4', compute_dtype=torch.float32)
    q.load_state_dict(whole.state_dict())
    q = q.to('cpu')
    got = q(x)
    assert ((got-whole(x)).norm()/whole(x).norm()).item()<.15
    got.sum().backward()
    assert x.grad.norm()>0

# early stopping

def test_early_stopping_ends_with_the_best_checkpoint_though_one_is_kept(made):
    run = made(rows=short_rows(60), valid_size=12, eval_strategy='steps', eval_steps=1, early_stopping_patience=2, save_total_limit=1, max_steps=30, learning_rate=3., optim='sgd',
        lr_scheduler_type='constant', warmup_steps=0, max_grad_norm=0, logging_steps=1)
    rep, w = trained(run)
    evals = {h['step']: h['eval_loss'] for h in rep['logs'] if 'eval_loss' in h}
    best = min(evals, key=evals.get)
    assert rep['steps']==best+2<30, evals
    assert rep['best_checkpoint']==f'checkpoint-{best}' and rep['best_eval_loss']==evals[best]
    assert run.path('checkpoints', f'checkpoint-{best}').is_dir()
    assert furthest(w, load_file(run.path('checkpoints', f'checkpoint-{best}', 'model.safetensors')))==0

def test_training_works_without_validation_rows(made): assert trained(made(valid_size=0))[0]['eval_loss'] is None

def test_early_stopping_without_validation_rows_says_what_to_set(made):
    run = made(valid_size=0, dataset=[dict(path=made(max_steps=1).recipe.dataset)], eval_strategy='steps', eval_steps=1, early_stopping_patience=2)
    with pytest.raises(UserError, match='early_stopping_patience needs validation rows .* set valid_size above 0'): make_trainer(run)

# padding

def test_training_pads_on_the_right_and_never_trains_on_it(made):
    trainer = make_trainer(made())
    b, pad = next(iter(trainer.get_train_dataloader())), trainer.processing_class.pad_token_id
    assert trainer.processing_class.padding_side=='right' and bool((b['attention_mask']==0).any())
    for ids,mask,labels in zip(b['input_ids'], b['attention_mask'], b['labels']):
        n = int(mask.sum())
        assert mask[:n].all() and (ids[n:]==pad).all() and (labels[n:]==-100).all()

def test_padding_changes_no_answer(made):
    from ftnb.generate import answers
    trainer = make_trainer(made())
    tok, model = trainer.processing_class, trainer.model
    prompts = [tok(t)['input_ids'] for t in ('One', 'A rather longer prompt than the first one is', 'Two words')]
    assert answers(model, tok, prompts, max_new_tokens=5, batch_size=3)==[answers(model, tok, [p], max_new_tokens=5)[0] for p in prompts]

@pytest.mark.parametrize('pad', ['auto', 'eos', 'new', '<file_sep>'])
def test_the_end_of_turn_is_trained_whatever_the_pad_token(made, pad):
    trainer = make_trainer(made(pad_token=pad))
    tok = trainer.processing_class
    for b in trainer.get_train_dataloader():
        assert all(tok.eos_token_id in labels for labels in b['labels'])

def plain(tokenizer, *tokens, pad=None):
    "A tokenizer with more tokens and another pad token"
    tok = copy.deepcopy(tokenizer)
    if tokens: tok.add_special_tokens(dict(additional_special_tokens=list(tokens)))
    tok.pad_token = pad
    return tok

def test_the_automatic_pad_token_is_the_reserved_one_and_not_the_end(tokenizer):
    assert set_pad(plain(tokenizer, '<|finetune_right_pad_id|>')).pad_token=='<|finetune_right_pad_id|>'
    for given in (None, tokenizer.eos_token):
        tok = set_pad(plain(tokenizer, pad=given))
        assert tok.pad_token=='<|endoftext|>' and tok.pad_token_id!=tok.eos_token_id
    assert set_pad(plain(tokenizer, '<keep>', pad='<keep>')).pad_token=='<keep>'

def test_the_automatic_pad_token_is_none_that_the_template_writes(tokenizer):
    tok = plain(tokenizer)
    tok.chat_template += '<|endoftext|>'
    assert set_pad(tok).pad_token!='<|endoftext|>'

def test_a_pad_token_can_be_named_be_the_end_or_be_new(tokenizer, tiny):
    assert set_pad(plain(tokenizer), 'eos').pad_token==tokenizer.eos_token
    assert set_pad(plain(tokenizer), '<file_sep>').pad_token=='<file_sep>'
    tok = set_pad(plain(tokenizer), 'new')
    assert tok.pad_token=='<|pad|>' and tok.pad_token_id==len(tokenizer)
    model = fit_vocabulary(load_model(make_recipe(dict(model_name_or_path=tiny, use_cpu=True, dtype='float32'))), tok)
    assert model.get_input_embeddings().num_embeddings>=len(tok) and model.config.pad_token_id==tok.pad_token_id

def test_an_unknown_pad_token_is_refused_with_the_nearest(tokenizer):
    with pytest.raises(UserError, match=r"pad_token: '<\|endoftex\|>' is not in the vocabulary .* Did you mean '<\|endoftext\|>'"): set_pad(plain(tokenizer), '<|endoftex|>')

def test_the_speed_figures_count_real_tokens(made):
    run = made(max_steps=6, per_device_train_batch_size=4)
    rep, _ = trained(run)
    rows = token_data(run, 'train')
    assert rep['tokens']==sum(map(len, rows['input_ids'])) and rep['trained_tokens']==sum(l!=-100 for ls in rows['labels'] for l in ls[1:])
    assert 0<rep['padding']<1 and len(run.events('log'))==6
