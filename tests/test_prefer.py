"Preference training: TRL's losses on our rows, the right reference, one run folder for all four methods"
import json
from dataclasses import replace
import pytest

torch = pytest.importorskip('torch')
from datasets import Dataset
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from conftest import write_rows
from ftnb.arguments import same_names
from ftnb.base import UserError
from ftnb.load import load_model
from ftnb.loss import Counted
from ftnb.prefer import build_trainer, config_class, find_orpo, in_order, needs_order
from ftnb.recipe import make_recipe
from ftnb.runs import Run
from ftnb.export import export
from ftnb.train import Stopped, make_trainer, train

def said(role, text): return [dict(role=role, content=text)]
PAIRS = [dict(prompt=said('user', f'What is {i} plus {i}?'), chosen=said('assistant', f'It is {2*i}'+', for sure'*(i%3)+'.'), rejected=said('assistant', 'No'+' idea'*(i%2+1))) for i in range(10)]
SINGLES = [dict(prompt=p['prompt'], completion=p[side], label=side=='chosen') for p in PAIRS for side in ('chosen', 'rejected')]

def ids_of(tok, row):
    "A row of text as stage 1 saves it"
    text = lambda ms, **kw: tok.apply_chat_template(ms, tokenize=False, **kw)
    ids = lambda s: tok(s, add_special_tokens=False)['input_ids']
    p = ids(text(row['prompt'], add_generation_prompt=True))
    sides = {f'{k}_ids': ids(text(row['prompt']+row[k]))[len(p):] for k in ('chosen', 'rejected', 'completion') if k in row}
    return dict(prompt_ids=p, **sides, **({'label': row['label']} if 'label' in row else {}))

def text_rows(method): return SINGLES if method=='kto' else PAIRS
def plain_rows(tok):
    "Pairs as text that ends in the end-of-sequence token: there ORPO's trainer, which looks for it at the very end, adds nothing"
    text = lambda ms, **kw: tok.apply_chat_template(ms, tokenize=False, **kw)
    ps = [(text(o['prompt'], add_generation_prompt=True), *(o[s][0]['content']+tok.eos_token for s in ('chosen', 'rejected'))) for o in PAIRS]
    return [dict(zip(('prompt', 'chosen', 'rejected'), p)) for p in ps], [dict(zip(('prompt_ids', 'chosen_ids', 'rejected_ids'), (tok(t, add_special_tokens=False)['input_ids'] for t in p))) for p in ps]

@pytest.fixture
def prepared(tiny, tokenizer, tmp_path):
    "Makes runs whose data is as stage 1 leaves it"
    def make(method, n_valid=0, **values):
        r = make_recipe({**dict(model_name_or_path=tiny, method=method, dtype='float32', use_cpu=True, peft='lora', lora_r=4, eval_strategy='no', save_strategy='no', max_steps=3,
            per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-3, report_to='none'), **values})
        run = Run(tmp_path/f'{method}{len(list(tmp_path.iterdir()))}', r).save()
        run.path('data').mkdir()
        rows = text_rows(method)
        for split,part in dict(train=rows[n_valid:], valid=rows[:n_valid], test=rows[:6]).items():
            write_rows(run.path('data', f'{split}.jsonl'), part)
            cols = [ids_of(tokenizer, o) for o in part]
            Dataset.from_list(cols or [ids_of(tokenizer, rows[0])]).select(range(len(cols))).to_parquet(run.path('data', f'{split}.tokens.parquet'))
        return run
    return make

# the same numbers as TRL

def first(trainer):
    "Batch, loss and gradients of a trainer's first step"
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return batch, loss.item(), {n: p.grad.clone() for n,p in trainer.model.named_parameters() if p.grad is not None}

PARENTS = dict(dpo=DPOTrainer, kto=KTOTrainer)
VARIANTS = [('dpo', 'lora', dict(loss_type=['ipo', 'sft'], loss_weights=[.5, 2.])), ('dpo', 'full', {}), ('dpo', 'full', dict(precompute_ref_log_probs=True)), ('kto', 'lora', {}), ('kto', 'full', dict(loss_type='apo_zero_unpaired')),
    ('kto', 'lora', dict(precompute_ref_log_probs=True)), ('orpo', 'lora', dict(beta=.3))]

@pytest.mark.parametrize('method, peft, values', VARIANTS, ids=[f'{m} {p} {"-".join(v)}' for m,p,v in VARIANTS])
def test_batch_loss_and_gradients_are_those_of_trls_trainer_on_the_text(tiny, tokenizer, tmp_path, method, peft, values):
    r = make_recipe(dict(model_name_or_path=tiny, method=method, peft=peft, lora_r=4, dtype='float32', use_cpu=True, **values))
    own = {k: getattr(r, k) for k in ('beta', *values) if k in same_names(method)}
    args = lambda: config_class(method)(output_dir=str(tmp_path), report_to='none', use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, per_device_train_batch_size=4, seed=1,
        disable_tqdm=True, train_sampling_strategy='sequential', **own)
    texts, ours = map(Dataset.from_list, plain_rows(tokenizer) if method=='orpo' else (text_rows(method), [ids_of(tokenizer, o) for o in text_rows(method)]))
    if method=='kto': texts = texts.shuffle(seed=r.seed) # as `in_order` does
    def start(model): # the same adapter, and none that is zero: its other matrix would have no gradient
        torch.manual_seed(3)
        for n,p in model.named_parameters():
            if 'lora_' in n and '.ref.' not in n: p.data.normal_(0, .1)
    mine = build_trainer(r, load_model(r), args=args(), train_dataset=in_order(r, ours), processing_class=tokenizer)
    from ftnb.adapter_config import adapter_config
    parent, model = PARENTS.get(method) or find_orpo()[1], load_model(r)
    theirs = parent(model=model, args=args(), train_dataset=texts, processing_class=tokenizer, peft_config=adapter_config(r, model) if peft=='lora' else None)
    for t in (mine, theirs): start(t.model)
    (a, la, ga), (b, lb, gb) = first(mine), first(theirs)
    tensors = {k for k,v in b.items() if isinstance(v, torch.Tensor)}
    assert tensors<=set(a) and all(torch.equal(a[k], b[k]) for k in tensors)
    assert abs(la-lb)<1e-6 and ga.keys()==gb.keys() and len(ga)>4
    assert all(torch.allclose(ga[k], gb[k], atol=1e-6) for k in ga) and any(g.abs().max()>1e-6 for g in ga.values())

def test_orpo_adds_no_second_end_of_turn(tokenizer):
    row = ids_of(tokenizer, PAIRS[0])
    from ftnb.prefer import orpo_row
    got = orpo_row(row)
    assert got['chosen_input_ids']==row['prompt_ids']+row['chosen_ids'] and got['chosen_labels'][-len(row['chosen_ids']):]==row['chosen_ids']

def test_where_trl_has_moved_orpo_one_sentence_says_where_it_was_looked_for(prepared, monkeypatch):
    import ftnb.prefer as p
    monkeypatch.setattr(p, 'import_module', lambda name: (_ for _ in ()).throw(ImportError(name)))
    p.orpo_trainer.cache_clear()
    with pytest.raises(UserError, match='has none in trl.experimental.orpo, trl, .*TRL 1.16 has it in trl.experimental.orpo'): make_trainer(prepared('orpo'))

# in a run

@pytest.mark.parametrize('method', ['dpo', 'orpo', 'kto'])
def test_each_method_trains_saves_and_reports_like_the_first(prepared, method):
    run = prepared(method, n_valid=2, eval_strategy='steps', eval_steps=3)
    rep = train(run)
    assert rep['steps']==3 and rep['trained_tokens'] and rep['eval_loss'] is not None and 0<=rep['padding']<1
    assert sorted(p.name for p in run.path('adapter').iterdir() if p.is_dir())==[] and run.path('adapter/adapter_model.safetensors').exists()
    logs = run.events('log')
    assert [e['step'] for e in logs]==[1, 2, 3] and all('rewards/chosen' in e and 'logps/chosen' in e for e in logs if 'rewards/margins' in e) and any('rewards/margins' in e for e in logs)
    if method=='kto': assert all('kl' in e for e in logs)

@pytest.mark.parametrize('method', ['dpo', 'kto'])
def test_what_was_trained_on_preferences_is_exported_like_the_rest(prepared, method):
    run = prepared(method, n_valid=2, warmup_steps=0, export_formats=['adapter', 'merged'], max_certify_samples=2, max_new_tokens=4)
    train(run)
    assert [(o['format'], o['verdict']) for o in export(run)['formats']]==[('adapter', 'ok'), ('merged', 'ok')]

@pytest.mark.parametrize('method', ['dpo', 'kto'])
def test_with_peft_full_the_reference_stays_where_training_started(prepared, method):
    run = prepared(method, peft='full')
    t = make_trainer(run)
    before = {k: v.clone() for k,v in t.ref_model.state_dict().items()}
    train(run, t)
    assert all(torch.equal(v, before[k]) for k,v in t.ref_model.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k,v in t.model.state_dict().items())
    assert run.path('model/model.safetensors').exists()

class StopAt2:
    "Asks to stop after the second step, as a panel does"
    def __new__(cls, run):
        from transformers import TrainerCallback
        class Stop(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step==1: run.path('STOP').write_text('')
        return Stop()

@pytest.mark.parametrize('method', ['kto', *(pytest.param(m, marks=pytest.mark.soak) for m in ('dpo', 'orpo'))])
def test_a_resumed_preference_training_ends_where_an_uninterrupted_one_does(prepared, method):
    kw = dict(save_strategy='steps', save_steps=100, max_steps=4)
    whole = prepared(method, **kw)
    train(whole)
    run = prepared(method, **kw)
    t = make_trainer(run)
    t.add_callback(StopAt2(run))
    with pytest.raises(Stopped, match='step 2 of 4'): train(run, t)
    assert train(run)['resumed_from']=='checkpoint-2'
    a, b = (load_file(o.path('adapter/adapter_model.safetensors')) for o in (whole, run))
    assert max((a[k]-b[k]).abs().max().item() for k in a)<1e-6

@pytest.mark.parametrize('values, said', [(dict(method='dpo', loss_type='exo_pair'), 'needs a label_smoothing'), (dict(method='dpo', loss_type='nca_pair', f_divergence_type='forward_kl'), 'does not go with loss_type: nca_pair'),
    (dict(method='kto', per_device_train_batch_size=1), 'set 2 or more'), (dict(method='kto', train_sampling_strategy='random'), 'mixed once, by the seed'), (dict(method='dpo', init_lora_weights='pissa'), 'another one after this start'),
    (dict(method='dpo', lora_target_modules=['q_proj', 'lm_head']), 'leave lm_head out'), (dict(method='orpo', peft='prompt'), 'set method: dpo')])
def test_what_trls_trainers_would_refuse_late_is_refused_early(values, said):
    with pytest.raises(UserError, match=said): make_recipe(values)

# stage 4

@pytest.mark.parametrize('method', ['dpo', 'kto'])
def test_the_evaluation_says_which_answer_is_preferred(prepared, method):
    from ftnb.evaluate import evaluate
    run = prepared(method, max_steps=16, learning_rate=1e-2, max_new_tokens=4)
    train(run)
    rep = evaluate(run)
    name = dict(dpo='reward_accuracy', kto='reward_separation')[method]
    m = next(o for o in rep['metrics'] if o['metric']==name)
    assert m['base']==.5 and m['tuned']>.8 and m['n']==6 and rep['line'].startswith(dict(dpo='chosen answer preferred 50 % → ', kto='wanted above unwanted 50 % → ')[method])
    wanted = [o['chosen'] if method=='dpo' else o['completion'] for o in text_rows(method)[:6] if o.get('label', True)]
    assert [a['reference'] for a in rep['answers']]==[w[0]['content'] for w in wanted]
    assert 'preferred' in run.path('reports/evaluate.html').read_text() if method=='dpo' else True

# the real model

@pytest.mark.soak
@pytest.mark.parametrize('method, steps', [('dpo', 20), ('orpo', 30), ('kto', 30)])
def test_the_real_model_learns_which_reply_of_the_demo_is_preferred(tmp_path, method, steps):
    from ftnb.evaluate import held_out
    from ftnb.generate import Pair, row_losses
    from ftnb.prepare import prepare
    from ftnb.rewards import by_side, reward_metrics, side_rows
    r = make_recipe(dict(method=method, dataset='demo/preferences.jsonl', max_steps=steps, per_device_train_batch_size=4, valid_size=0, test_size=40, max_length=512, eval_strategy='no', save_strategy='no', use_cpu=True))
    run = Run(tmp_path/'run', r).save()
    prepare(run)
    print(train(run)['line'])
    _, _, toks = held_out(run)
    rows, at = side_rows(toks)
    pair, got = Pair(run), {}
    for which in ('base', 'tuned'):
        with pair.using(which) as model: got[which] = by_side(row_losses(model, rows, pair.tok.pad_token_id, 8), at)
    ms = {m['metric']: m for m in reward_metrics(toks, got['base'], got['tuned'], r.beta)}
    for m in ms.values(): print({k: round(v, 3) if isinstance(v, float) else v for k,v in m.items()})
    m = ms['reward_separation' if method=='kto' else 'reward_accuracy']
    assert m['base']==.5 and m['tuned']>=.8 and m['better']=='better'
