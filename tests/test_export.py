"Exported folders: what they hold, that plain peft and transformers load them, and that planted faults are found"
import json, os, shutil, subprocess, sys
import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
import torch
from safetensors.torch import load_file, save_file
from ftnb.base import UserError
from ftnb.export import export
from ftnb.prepare import prepare
from ftnb.recipe import make_recipe
from ftnb.runs import Run
from ftnb.train import train
from ftnb.trained import load_trained
from ftnb.verify import compare_folders

SMALL = dict(dataset='demo', max_train_samples=8, max_steps=2, lora_r=4, eval_strategy='no', use_cpu=True, max_certify_samples=2, max_new_tokens=8)

def trained(folder, **kw):
    run = Run(folder, make_recipe({**SMALL, **kw})).save()
    prepare(run)
    train(run)
    return run

@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "An exported run, its report and the trained model's logits"
    run = trained(tmp_path_factory.mktemp('runs')/'demo')
    rep = export(run)
    ref = load_trained(run)
    ref.model = None
    return run, rep, ref

@pytest.fixture
def copy(done, tmp_path):
    "The adapter and merged folders, to be spoilt"
    for k in ('adapter', 'merged'): shutil.copytree(done[0].path(k), tmp_path/k)
    return tmp_path

def spoil(path, name, change):
    tensors = load_file(path)
    key = next(k for k in tensors if name in k)
    save_file({**tensors, key: change(tensors[key])}, path, metadata={'format': 'pt'})

def check(done, folder, kind): return compare_folders(done[0], {kind: folder/kind}, done[2])[0]

def test_both_formats_answer_as_the_trained_model(done):
    run, rep, _ = done
    assert rep['ok'] and [o['verdict'] for o in rep['formats']]==['ok', 'ok'] and rep==run.report('export')
    adapter, merged = rep['formats']
    assert adapter['logits']<=1e-5 and merged['logits']<=1e-5 and merged['kl']<.01 and merged['top1']>.97
    assert rep['effect']>1e-6 and rep['held_against']=='checkpoint-2' and '\n' not in rep['line']

def test_the_folders_are_whole_and_hold_no_pickle(done):
    run, *_ = done
    for k,weights in dict(adapter='adapter_model.safetensors', merged='model.safetensors').items():
        have = {o.name for o in run.path(k).iterdir()}
        assert {weights, 'tokenizer.json', 'chat_template.jinja', 'README.md', 'manifest.json'}<=have
        assert not [n for n in have if n.endswith(('.bin', '.pt', '.pth', '.pkl'))]
    assert {t.dtype for t in load_file(run.path('merged', 'model.safetensors')).values()}=={torch.bfloat16}
    assert not [o for o in run.folder.iterdir() if o.name.startswith('.')]

def test_nothing_in_them_names_this_machine(done):
    run, *_ = done
    for k in ('adapter', 'merged'):
        for o in run.path(k).iterdir():
            if o.suffix in ('.json', '.md', '.jinja') and o.name!='tokenizer.json':
                text = o.read_text()
                assert str(run.folder.parent) not in text and os.path.expanduser('~') not in text and '/.cache' not in text, o
    assert json.loads(run.path('adapter', 'adapter_config.json').read_text())['base_model_name_or_path']=='HuggingFaceTB/SmolLM2-135M-Instruct'

def test_plain_libraries_load_and_answer(done, tmp_path):
    run, *_ = done
    from ftnb.models import model_path
    code = '''
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM as M, AutoTokenizer
adapter, merged, base = sys.argv[1:]
for f, m in ((adapter, PeftModel.from_pretrained(M.from_pretrained(base, dtype='auto'), adapter)), (merged, M.from_pretrained(merged, dtype='auto'))):
    tok = AutoTokenizer.from_pretrained(f)
    ids = tok.apply_chat_template([dict(role='user', content='Hi')], add_generation_prompt=True, return_tensors='pt', return_dict=True)
    assert m.generate(**ids, max_new_tokens=3).shape[1]>ids['input_ids'].shape[1]
assert 'ftnb' not in sys.modules
'''
    p = subprocess.run([sys.executable, '-c', code, str(run.path('adapter')), str(run.path('merged')), model_path('smollm2-135m')], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode==0, p.stderr

def test_our_own_loading_still_works(done):
    from ftnb.generate import Pair
    assert isinstance(Pair(done[0]).chat('Hi', max_new_tokens=2), str)

@pytest.mark.parametrize('change', [torch.zeros_like, lambda t: t*1.05], ids=['zeroed', 'perturbed'])
def test_a_changed_adapter_is_found(done, copy, change):
    spoil(copy/'adapter/adapter_model.safetensors', 'layers.3.mlp.down_proj.lora_B', change)
    row = check(done, copy, 'adapter')
    assert row['verdict']=='fails' and 'logits differ' in row['faults'][0]

def test_a_changed_merged_model_is_found(done, copy):
    spoil(copy/'merged/model.safetensors', 'layers.3.mlp.down_proj', lambda t: t+torch.randn_like(t)*t.std()/2)
    row = check(done, copy, 'merged')
    assert row['verdict']=='fails' and 'KL(trained || shipped)' in ' '.join(row['faults'])

def test_adapter_keys_that_match_nothing_are_found(done, copy):
    path = copy/'adapter/adapter_model.safetensors'
    save_file({k.replace('layers.3', 'layers.99'):v for k,v in load_file(path).items()}, path, metadata={'format': 'pt'})
    faults = ' '.join(check(done, copy, 'adapter')['faults'])
    assert 'missing keys' in faults and 'unexpected keys' in faults

def test_leftovers_and_a_lost_template_are_found(done, copy):
    (copy/'adapter/training_args.bin').touch()
    (copy/'adapter/chat_template.jinja').unlink()
    faults = ' '.join(check(done, copy, 'adapter')['faults'])
    assert 'training_args.bin must not ship' in faults and 'no chat template' in faults

def test_an_adapter_changed_after_training_stops_the_export(done, tmp_path):
    run = Run(shutil.copytree(done[0].folder, tmp_path/'demo'))
    spoil(run.path('adapter', 'adapter_model.safetensors'), 'lora_B', torch.zeros_like)
    with pytest.raises(UserError, match='adapter: logits differ by .* likely cause: '): export(run)
    assert run.report('export')['ok'] is False

def test_full_fine_tuning_exports_the_model_in_the_type_of_the_base(tmp_path):
    run = trained(tmp_path/'full', peft='full', max_steps=1, per_device_train_batch_size=1)
    rep = export(run)
    assert [o['format'] for o in rep['formats']]==['merged'] and rep['ok']
    assert {t.dtype for t in load_file(run.path('merged', 'model.safetensors')).values()}=={torch.bfloat16}
    assert json.loads(run.path('merged', 'config.json').read_text())['use_cache'] is True
    assert not run.path('merged', 'training_args.bin').exists()

def test_qlora_says_how_far_the_4_bit_base_is(tmp_path):
    pytest.importorskip('bitsandbytes')
    run = trained(tmp_path/'qlora', peft='qlora', max_steps=1, warmup_steps=0, per_device_train_batch_size=1)
    rep = export(run)
    assert rep['ok'] and rep['quantised_kl']>0 and '4-bit base' in rep['line']

def test_export_without_training_names_the_stage(tmp_path):
    with pytest.raises(UserError, match='--to train'): export(Run(tmp_path/'new', make_recipe(SMALL)).save())
