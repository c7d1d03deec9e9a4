"An ejected run is plain TRL, and its losses are the run's"
import ast, dataclasses, json, os, re, subprocess, sys
from dataclasses import replace
from pathlib import Path
import pytest

trl = pytest.importorskip('trl')
import yaml
from conftest import Made, make_tiny, short_rows
from ftnb.base import UserError
from ftnb.eject import eject
from ftnb.fields import names
from ftnb.recipe import make_recipe
from ftnb.runs import Run
from ftnb.arguments import _not_passed, same_names, sampling, training_args
from ftnb.train import train
from ftnb.trl_script import row_lengths, script, trainer_values, trl_assumes, trl_values, trl_yaml

TEN = dict(max_steps=10, logging_steps=1, learning_rate=1e-2)
CASES = dict(full=dict(peft='full', learning_rate=1e-3, optim='adamw_torch', weight_decay=.1, gradient_accumulation_steps=2, per_device_train_batch_size=2),
    lora=dict(peft='lora', lora_r=4, lora_dropout=.1, train_sampling_strategy='group_by_length', seed=7),
    packed=dict(peft='lora', lora_r=4, use_rslora=True, packing=True, max_length=64, per_device_train_batch_size=1, eval_strategy='steps', eval_steps=4),
    qlora=dict(peft='qlora', lora_r=4, learning_rate=2e-4, activation_checkpointing=True)) # rounding of 4-bit layers grows with the rate: 3e-5 at 1e-3

# One process without ftnb runs them all: starting TRL takes most of the time
RUN_ALL = '''
import os, runpy, sys
for folder, name, *more in [l.split('|') for l in sys.argv[1:]]:
    os.chdir(folder)
    sys.argv = [name, *more]
    runpy.run_path(name, run_name='__main__') if name.endswith('.py') else runpy.run_module(name, run_name='__main__')
assert not [m for m in sys.modules if m.split('.')[0]=='ftnb'], 'ftnb was imported'
'''
def losses(logs): return [h['loss'] for h in logs if 'loss' in h]
def saved(folder): return losses(json.loads((Path(folder)/'trainer_state.json').read_text())['log_history'])

@pytest.fixture(scope='module')
def both(tiny, tmp_path_factory):
    "By case: losses of the run, losses of its ejected script, the folder"
    d = tmp_path_factory.mktemp('eject')
    made, mine = Made(tiny, d), {}
    for name,kw in CASES.items():
        if name=='qlora': kw = dict(kw, model_name_or_path=make_tiny(d/'wide', hidden_size=64, intermediate_size=128))
        run = made(rows=short_rows(40), **{**TEN, **kw})
        mine[name] = losses(train(run)['logs'])
        eject(run, d/name)
    p = subprocess.run([sys.executable, '-c', RUN_ALL, *[f'{d/n}|train.py' for n in CASES], f'{d/"full"}|trl.scripts.sft|--config|trl.yaml|--output_dir|by_yaml|--save_strategy|steps|--save_steps|10'],
        env={**os.environ, 'PYTHONPATH': '', 'HF_HOME': str(d/'hf')}, capture_output=True, text=True, cwd=d)
    assert p.returncode==0, p.stderr[-3000:]
    return {n: (mine[n], saved(d/n/'output'), d/n) for n in CASES}

def furthest(a, b):
    assert len(a)==len(b)>=10
    return max(abs(x-y) for x,y in zip(a, b))

@pytest.mark.parametrize('case', CASES)
@pytest.mark.filterwarnings('ignore:bitsandbytes')
def test_the_first_ten_losses_of_the_script_are_those_of_the_run(both, case):
    mine, its, folder = both[case]
    print(case, 'largest difference of a loss:', furthest(mine, its))
    assert furthest(mine, its)<1e-5 and len(set(mine))>5
    assert (folder/'output'/('model.safetensors' if case=='full' else 'adapter_model.safetensors')).exists()

def test_another_seed_would_be_seen(both):
    assert furthest(both['lora'][0], both['packed'][1])>1e-3

def test_the_yaml_trains_the_same_with_trl_sft(both):
    mine, _, folder = both['full']
    its = saved(folder/'by_yaml'/'checkpoint-10')
    print('trl sft, largest difference of a loss:', furthest(mine, its))
    assert furthest(mine, its)<1e-5

@pytest.mark.parametrize('case', CASES)
def test_trls_own_parser_takes_every_key_of_the_yaml(both, case):
    from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser
    _, args, model = TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config(['--config', str(both[case][2]/'trl.yaml')], fail_with_unknown_args=True)
    assert args.max_steps==10 and args.learning_rate==({**TEN, **CASES[case]})['learning_rate'] and args.seed==CASES[case].get('seed', 42)
    assert model.use_peft==(case!='full') and (model.lora_r==4 or case=='full') and model.load_in_4bit==(case=='qlora')
    assert model.lora_target_modules in ('all-linear', ['all-linear'], None)

def test_the_folder_needs_no_ftnb_and_holds_its_data(both):
    for case,(_, _, folder) in both.items():
        code = ast.parse((folder/'train.py').read_text())
        tops = {a.name.split('.')[0] for n in ast.walk(code) if isinstance(n, ast.Import) for a in n.names} | {n.module.split('.')[0] for n in ast.walk(code) if isinstance(n, ast.ImportFrom)}
        assert tops <= {'sys', 'pathlib', 'torch', 'datasets', 'peft', 'transformers', 'trl'}
        assert 'ftnb' not in (folder/'requirements.txt').read_text() and 'trl==' in (folder/'requirements.txt').read_text()
        have = {str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()}
        assert {'data/train.tokens.parquet', 'rows/train.jsonl', 'tokenizer/tokenizer.json', 'tokenizer/chat_template.jinja', 'train.py', 'trl.yaml'} <= have
        assert ('data/valid.tokens.parquet' in have)==(case=='packed')

def test_lines_are_short_and_choices_have_a_comment(both):
    text = (both['qlora'][2]/'train.py').read_text()
    assert max(map(len, text.splitlines()))<=160 and text.count('# ')>=6

def test_what_trl_assumes_is_what_the_installed_trl_assumes():
    fields = {f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory() for f in dataclasses.fields(trl.SFTConfig)}
    assert {k: fields[k] for k in trl_assumes}==trl_assumes
    assert set(trl_assumes)==same_names()-_not_passed

@pytest.mark.parametrize('kw', [{}, dict(peft='full', eval_strategy='epoch', load_best_model_at_end=True), dict(peft='lora', lora_r=4, train_sampling_strategy='auto', warmup_steps=.1, save_strategy='steps', save_steps=3, data_seed=3),
    dict(early_stopping_patience=2, eval_strategy='steps', eval_steps=1, lr_scheduler_type='cosine_with_min_lr', lr_scheduler_kwargs=dict(min_lr_rate=.1), neftune_noise_alpha=5., adam_beta2=.95)])
def test_the_arguments_are_those_that_ftnb_trains_with(made, kw):
    run = made(rows=short_rows(40), **kw)
    valid = run.recipe.eval_strategy!='no'
    want = training_args(run.recipe, run, row_lengths(run), valid)
    code = ast.parse(script(run, valid))
    call = next(n for n in ast.walk(code) if isinstance(n, ast.Call) and getattr(n.func, 'id', '')=='SFTConfig')
    got = {k.arg: eval(ast.unparse(k.value), dict(device='cpu', output_dir=want.output_dir, compute=__import__('torch').float32, torch=__import__('torch'))) for k in call.keywords}
    mine = trl.SFTConfig(**got)
    other = {k: (v, getattr(want, k)) for k,v in vars(mine).items() if v!=getattr(want, k) and k not in ('run_name', 'disable_tqdm', 'logging_dir', 'distributed_state') and not k.startswith('_')}
    if want.save_strategy.value=='no': other = {k:v for k,v in other.items() if not k.startswith('save_')}
    if want.eval_strategy.value=='no': other.pop('eval_steps', None); other.pop('per_device_eval_batch_size', None)
    if not want.push_to_hub: other = {k:v for k,v in other.items() if not k.startswith('hub_')}
    if want.max_steps>0: other.pop('num_train_epochs', None)
    assert not other

def test_rows_of_like_length_are_chosen_as_stage_3_chooses_them(made):
    rows = [dict(prompt=f'What is {i}?', completion='word '*(1+9*(i%9))) for i in range(60)]
    run = made(rows=rows, train_sampling_strategy='auto', per_device_train_batch_size=8)
    want = sampling(run.recipe, row_lengths(run))[0]
    assert want==trainer_values(run, False)['train_sampling_strategy']=='group_by_length'

def test_a_type_that_only_the_device_knows_is_asked_there(made):
    run = made()
    auto = Run(run.folder, replace(run.recipe, dtype='auto', use_cpu=False))
    text = script(auto, False)
    assert 'get_device_capability' in text and 'weights = torch.float32' in text and 'torch.float32' in script(run, False)
    ast.parse(text)

def test_what_the_yaml_can_not_say_stands_in_it(made):
    run = made(peft='lora', lora_r=4, lora_bias='all', init_lora_weights='pissa')
    text = trl_yaml(run, False)
    assert 'no key for bias: all, init_lora_weights: pissa' in text and 'before the seed is set' in text
    assert "bias='all'" in script(run, False) and "init_lora_weights='pissa'" in script(run, False)

def test_a_recipe_is_prepared_first(tiny, tmp_path):
    made = Made(tiny, tmp_path)
    r = made().recipe
    files = eject(r, tmp_path/'plain')
    assert tmp_path/'plain'/'train.py' in files and (tmp_path/'plain'/'rows'/'train.jsonl').read_text().count('\n')>=20

def test_a_folder_in_use_and_a_run_without_data_are_refused(made, tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'a').write_text('x')
    with pytest.raises(UserError, match='is there already; give the name of a new folder'): eject(made(), tmp_path/'mine')
    assert (tmp_path/'mine'/'a').read_text()=='x'
    with pytest.raises(UserError, match='run stage 1 first'): eject(Run(tmp_path/'empty', make_recipe({})), tmp_path/'b')
    assert not (tmp_path/'b').exists()

@pytest.mark.parametrize('values, said', [(dict(peft='lora', new_tokens=['<a>']), 'new_tokens can not be ejected'), (dict(peft='full', trainable_modules=['mlp']), 'trainable_modules can not be ejected'), (dict(peft='ia3'), 'peft: ia3 can not be ejected')])
def test_what_the_script_would_leave_out_is_refused(tmp_path, values, said):
    with pytest.raises(UserError, match=said): eject(Run(tmp_path/'r', make_recipe(values)), tmp_path/'c')
    assert not (tmp_path/'c').exists()
