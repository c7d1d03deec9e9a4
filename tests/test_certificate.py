"The certificate: a clean export passes, and each of the usual faults is caught by its name, planted in real files"
import json, os, shutil
from dataclasses import replace
import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
import torch
from safetensors.torch import load_file, save_file
from conftest import Made, make_tiny
from ftnb.base import UserError
from ftnb.certificate import certificate_table, certify
from ftnb.export import export
from ftnb.gguf_files import set_keys, write_base_gguf
from ftnb.load import load_model
from ftnb.runs import Run
from ftnb.sameness import ask_trained
from ftnb.served import certify_server
from ftnb.train import train
from ftnb.trained import load_trained
from ftnb.tune import with_adapter

FORMATS = ['adapter', 'merged', 'f16', 'q8_0']

def join_digits(folder):
    "Let the vocabulary hold `12` as one token, which the tokenizer never makes: it splits numbers into digits first"
    path = folder/'tokenizer.json'
    t = json.loads(path.read_text())
    vocab, merges = t['model']['vocab'], [m if isinstance(m, list) else m.split(' ') for m in t['model']['merges']]
    used = {x for m in merges for x in m}
    k = next(i for i in range(len(merges)-1, -1, -1) if ''.join(merges[i]) not in used) # made by one merge, part of none
    vocab['12'] = vocab.pop(''.join(merges[k]))
    merges[k] = ['1', '2']
    t['model']['merges'] = merges
    path.write_text(json.dumps(t, ensure_ascii=False))

@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "An exported run of a small model that has learned a task, its report, and the trained model's answers"
    tmp = tmp_path_factory.mktemp('certified')
    base = make_tiny(tmp/'base', hidden_size=64, intermediate_size=128, initializer_range=.2, max_position_embeddings=256)
    join_digits(tmp/'base')
    rows = [dict(prompt=f'What is {i} and {i+10}?', completion=f'It is {2*i+10}.') for i in range(12)]
    run = Made(base, tmp)(rows, peft='lora', lora_r=16, max_steps=40, warmup_steps=0, learning_rate=2e-2, per_device_train_batch_size=12, valid_size=4, max_certify_samples=4, export_formats=FORMATS)
    train(run)
    rep = export(run)
    ref = ask_trained(run, load_trained(run))
    ref.model = None
    return run, rep, ref

def f16(done, to, **keys):
    "A copy of the run's f16 file with other metadata"
    f = shutil.copy(done[0].path('gguf', 'run1-f16.gguf'), to/'f16.gguf')
    set_keys(f, {'tokenizer.'+k.replace('__', '.'): v for k,v in keys.items()})
    return f

def caught(done, name, path):
    "(likely cause, why) of one file"
    rep = certify(done[0], {name: path}, done[2])
    assert not rep['ok'] and rep['line']==f'certificate: {name} fails ({rep["formats"][0]["cause"]})'
    return rep['formats'][0]['cause'], rep['formats'][0]['because']

def test_a_clean_export_is_certified(done):
    run, rep, ref = done
    assert rep['ok'] and [o['format'] for o in rep['formats']]==FORMATS and rep['line'].endswith('certificate: same answers')
    assert all(o['same_prompts']==4 and o['stops']==1 for o in rep['formats']) and rep['trained']['stops']==1
    by = {o['format']: o for o in rep['formats']}
    assert by['f16']['kl']<1e-3 and by['f16']['equal']==4 and by['q8_0']['kl']<.02 and by['q8_0']['top1']>.95
    assert all(o['kl_base']>100*o['kl_first'] for o in rep['formats'])
    page = run.path('reports', 'certificate.html').read_text()
    assert 'certificate: same answers' in page and 'What is' in page
    assert [r['format'] for r in certificate_table(rep)]==['trained', *FORMATS]

def test_another_template_is_caught(done, tmp_path):
    plain = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}{{ '<|im_start|>assistant\\n' }}"
    cause, why = caught(done, 'f16', f16(done, tmp_path, chat_template=plain))
    assert cause=='template' and 'question 1' in why and 'You are a helpful' in why

@pytest.mark.parametrize('keys', [dict(chat_template='{{ bos_token }}'), dict(ggml__add_bos_token=True)], ids=['by the template', 'by the tokenizer'])
def test_bos_twice_is_caught(done, tmp_path, keys):
    if 'chat_template' in keys: keys = dict(chat_template=keys['chat_template']+done[2].tok.chat_template)
    cause, why = caught(done, 'f16', f16(done, tmp_path, **keys))
    assert cause=='BOS twice' and '<|im_start|> twice' in why

def test_numbers_cut_into_other_pieces_are_caught(done, tmp_path):
    cause, why = caught(done, 'f16', f16(done, tmp_path, ggml__pre='gpt-2'))
    assert cause=='pre-tokenizer' and "'12 | 3 | 4 | 5' in the file, '1 | 2 | 3 | 4' in training" in why

def test_a_wrong_end_token_is_caught(done, tmp_path):
    dot = done[2].tok('.')['input_ids'][0]
    cause, why = caught(done, 'f16', f16(done, tmp_path, ggml__eos_token_id=dot))
    assert cause=='EOS' and '<|im_end|>' in why

def test_a_file_that_is_cut_off_is_caught(done, tmp_path):
    f = f16(done, tmp_path)
    os.truncate(f, os.path.getsize(f)-1000)
    cause, why = caught(done, 'f16', f)
    assert cause=='file cut off or damaged' and 'cut off' in why

@pytest.mark.soak
def test_a_file_of_the_base_alone_is_caught(done, tmp_path):
    write_base_gguf(done[0], done[0].recipe.model_name_or_path, 'f16', tmp_path/'f16.gguf')
    assert caught(done, 'f16', tmp_path/'f16.gguf')[0]=='adapter of zeros'

def test_an_adapter_of_zeros_and_a_merge_on_the_4_bit_base_are_caught(done, tmp_path):
    pytest.importorskip('bitsandbytes')
    run, _, ref = done
    for k in ('adapter', 'merged'): shutil.copytree(run.path(k), tmp_path/k)
    f = tmp_path/'adapter/adapter_model.safetensors'
    save_file({k: v*('lora_B' not in k) for k,v in load_file(f).items()}, f, metadata={'format': 'pt'})
    rough = load_model(replace(run.recipe, load_in_4bit=True)).dequantize(torch.float32)
    with_adapter(rough.to(torch.float32), run.path('adapter')).merge_and_unload().save_pretrained(tmp_path/'merged')
    rep = certify(run, {k: tmp_path/k for k in ('adapter', 'merged')}, ref)
    zero, merged = rep['formats']
    assert zero['cause']=='adapter of zeros' and 'logits differ' in zero['faults'][0]
    assert merged['cause']=='precision' and '4-bit base' in merged['because'] and merged['kl']>.01

@pytest.mark.soak
def test_a_merged_model_that_talks_on_is_caught(done, tmp_path):
    m = shutil.copytree(done[0].path('merged'), tmp_path/'merged')
    for name,change in dict(generation_config=dict(eos_token_id=0), tokenizer_config=dict(eos_token='<|endoftext|>')).items():
        f = m/f'{name}.json'
        f.write_text(json.dumps({**json.loads(f.read_text()), **change}))
    assert caught(done, 'merged', m)[0]=='EOS'

def test_a_merged_model_that_is_cut_off_is_caught(done, tmp_path):
    w = shutil.copytree(done[0].path('merged'), tmp_path/'merged')/'model.safetensors'
    os.truncate(w, os.path.getsize(w)-1000)
    assert caught(done, 'merged', tmp_path/'merged')[0]=='file cut off or damaged'

def test_a_server_gets_its_line(done, tmp_path):
    import xllamacpp
    run = Run(shutil.copytree(done[0].folder, tmp_path/'run1'))
    run.save_report('certificate', dict(done[1], answers=[dict(q8_0='It is 12.')]*4))
    def ask(template=''):
        p = xllamacpp.CommonParams()
        p.model.path, p.hostnames, p.port, p.n_ctx, p.n_parallel, p.warmup, p.verbosity, p.chat_template = str(run.path('gguf', 'run1-q8_0.gguf')), ['127.0.0.1'], 0, 256, 1, False, -1, template
        server = xllamacpp.Server(p)
        try: return certify_server(run, server.listening_address+'/v1', 'run1', 'q8_0')
        finally: del server
    row = ask()
    assert row['verdict']=='ok' and row['same_prompts']==4 and row['stops']==1 and row['as_file']>=2
    assert [o['format'] for o in run.report('certificate')['formats']]==[*FORMATS, 'server']
    with pytest.raises(UserError, match='likely cause: template'): ask("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert run.report('certificate')['line']=='certificate: server fails (template)'
    page = run.path('reports', 'certificate.html').read_text()
    assert 'q8_0 behind /v1/chat/completions' in page and '0 of 4' in page
