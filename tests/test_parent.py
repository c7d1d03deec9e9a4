"Going on from a run: the right start, the right reference, and one sentence where it can't be"
import json, shutil
import pytest

torch = pytest.importorskip('torch')
from safetensors.torch import load_file
from transformers import TrainerCallback

from conftest import Made, make_tiny
from ftnb.base import UserError
from ftnb.evaluate import evaluate
from ftnb.parent import check_parent, find_parent
from ftnb.recipe import make_recipe
from ftnb.runs import inputs_of
from ftnb.train import make_trainer, train
from test_prefer import prepared

LORA = dict(peft='lora', lora_r=4, lora_alpha=8)
def adapter_of(run): return load_file(run.path('adapter/adapter_model.safetensors'))
def own(model): return {n.replace('.default.', '.'): p.detach().clone() for n,p in model.named_parameters() if '.default.' in n}

@pytest.fixture(scope='module')
def taught(tiny, tmp_path_factory):
    "A run that was trained on answers (SFT)"
    run = Made(tiny, tmp_path_factory.mktemp('taught'))(**LORA, learning_rate=1e-2)
    train(run)
    return run

@pytest.mark.parametrize('method', ['dpo', 'kto'])
def test_preferences_go_on_from_taught_answers_and_are_compared_with_them(prepared, taught, method):
    run = prepared(method, lora_alpha=8, adapter_name_or_path=str(taught.folder), logging_steps=1, max_steps=2, lr_scheduler_type='constant', warmup_steps=0)
    t = make_trainer(run)
    start = own(t.model)
    assert all(torch.equal(start[k], v) for k,v in adapter_of(taught).items() if k in start) and start.keys()==adapter_of(taught).keys()
    frozen = {n: p.detach().clone() for n,p in t.model.named_parameters() if '.ref.' in n}
    assert frozen and all(torch.equal(frozen[n], start[n.replace('.ref.', '.')]) for n in frozen)
    names = {n for n,p in t.model.named_parameters() if p.requires_grad}
    assert names and all('.default.' in n for n in names)
    kept = t.model
    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ref = {n: p for n,p in kept.named_parameters() if '.ref.' in n}
            assert all(torch.equal(ref[n], v) for n,v in frozen.items())
    t.add_callback(Look())
    train(run, t)
    first = run.events('log')[0]
    assert first['rewards/chosen']==0 and first.get('rewards/rejected', 0)==0
    after = adapter_of(run)
    assert after.keys()==start.keys() and any(not torch.equal(after[k], start[k]) for k in start)
    parent = run.manifest['parent']
    assert parent['name']==taught.name and parent['recipe']==taught.manifest['recipe'] and parent['adapter']
    ms = {m['metric']: m for m in evaluate(run)['metrics']}
    assert ms['reward_accuracy' if method=='dpo' else 'reward_separation']['base']==.5

def test_base_in_the_evaluation_is_what_training_went_on_from(prepared, taught):
    from ftnb.generate import Pair
    run = prepared('orpo', lora_alpha=8, adapter_name_or_path=str(taught.folder), max_steps=2, learning_rate=1e-2)
    train(run)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        with Pair(taught).using('tuned') as m: want = m(ids).logits
        pair = Pair(run)
        with pair.using('base') as m: got = m(ids).logits
        with pair.using('tuned') as m: new = m(ids).logits
    assert torch.equal(want, got) and not torch.equal(got, new)

def test_the_name_of_a_run_stands_for_its_model_or_its_base_and_adapter(made, taught, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'settings.ini').write_text(f'[ftnb]\nruns = {taught.folder.parent}\n')
    p = find_parent(make_recipe(dict(model_name_or_path=taught.name, **LORA)))
    assert p.adapter and p.folder==taught.path('adapter')
    run = made(model_name_or_path=taught.name, **LORA)
    assert all(torch.equal(v, adapter_of(taught)[k]) for k,v in own(make_trainer(run).model).items())
    whole = made(peft='full')
    train(whole)
    more = made(model_name_or_path=whole.name, peft='full')
    t = make_trainer(more)
    want = load_file(whole.path('model/model.safetensors'))
    assert all(torch.equal(v, want[k]) for k,v in t.model.state_dict().items() if k in want)
    assert more.manifest['parent']['name']==whole.name and more.manifest['parent']['model']
    with pytest.raises(UserError, match='peft: full trains a whole model; export it'): check_parent(make_recipe(dict(model_name_or_path=taught.name, peft='full')))

def test_what_was_trained_again_is_gone_on_from_again(prepared, taught):
    r, state = prepared('dpo', lora_alpha=8, adapter_name_or_path=str(taught.folder)).recipe, taught.folder/'state.json'
    before, was = inputs_of('train', r), state.read_text() if state.exists() else '{}'
    state.write_text(json.dumps(dict(train=dict(status='done', inputs='other', ended=1))))
    assert inputs_of('train', r)!=before
    state.write_text(was)

@pytest.mark.parametrize('what, said', [('name', 'there is no run and no folder'), ('empty', 'holds no adapter .no adapter_config.json'), ('bin', 'can run code on loading'), ('rank', 'so set lora_r: 4'), ('base', 'set model_name_or_path'),
    ('method', 'set peft: lora'), ('untrained', 'has no trained adapter; run stage 3 first')])
def test_a_start_that_does_not_fit_is_one_sentence_before_anything_is_loaded(prepared, taught, made, tmp_path, monkeypatch, what, said):
    import ftnb.train
    monkeypatch.setattr(ftnb.train, 'load_model', lambda *a, **k: pytest.fail('a model was loaded'))
    folder, values = tmp_path/'start', dict(lora_alpha=8)
    shutil.copytree(taught.path('adapter'), folder)
    if what=='name': folder = tmp_path/'nowhere'
    if what=='empty': (folder/'adapter_config.json').unlink()
    if what=='bin': (folder/'adapter_model.safetensors').rename(folder/'adapter_model.bin')
    if what=='rank': values['lora_r'] = 8
    if what=='base': values['model_name_or_path'] = make_tiny(tmp_path/'another')
    if what=='method': values['peft'] = 'adalora'
    if what=='untrained': folder = made(**LORA).folder
    run = prepared('dpo', **{**values, 'adapter_name_or_path': str(folder)})
    with pytest.raises(UserError, match=said): make_trainer(run)

def test_show_and_a_stage_say_what_a_run_goes_on_from(prepared, taught, capsys, monkeypatch):
    from ftnb.cli import main
    from ftnb.stages import start_stage
    run = prepared('dpo', lora_alpha=8, adapter_name_or_path=str(taught.folder))
    make_trainer(run)
    main(['show', str(run.folder)])
    assert f'goes on from {taught.name} (' in capsys.readouterr().out
    with pytest.raises(UserError, match='there is no run and no folder'): start_stage('train', dict(output_dir=str(run.folder), adapter_name_or_path='nowhere'))
