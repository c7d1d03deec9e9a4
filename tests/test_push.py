"Pushing to the hub, against a stand-in of its API on this machine: what arrives, what is kept back, what nobody gets to see"
import os, subprocess, sys
import pytest

from ftnb.push import card_faults
from ftnb.recipe import make_recipe
from ftnb.runs import Run
from hub_standin import hub_standin

CARD = '---\nbase_model: "someone/base"\nlibrary_name: "peft"\ntags: ["ftnb"]\n---\n\n# demo\n'
TOKEN = 'hf_'+'right'*7

@pytest.fixture
def run(tmp_path):
    "A run as it lies there after an export, small"
    run = Run(tmp_path/'demo', make_recipe(dict(hub_model_id='me/kettle'))).save()
    for kind,files in dict(adapter={'adapter_model.safetensors': os.urandom(70_000), 'adapter_config.json': b'{}'}, merged={'model.safetensors': os.urandom(90_000), 'config.json': b'{"a": 1}'},
            gguf={'demo-q8_0.gguf': b'GGUF'+os.urandom(50_000)}).items():
        run.path(kind).mkdir()
        for n,b in {**files, 'README.md': CARD.encode()}.items(): run.path(kind, n).write_bytes(b)
    run.save_report('export', dict(ok=True, line='fine'))
    run.save_report('certificate', dict(ok=True))
    return run

def push(run, hub, code='push(run)', token=TOKEN, **env):
    "Push in a fresh process; its result"
    code = f'from ftnb.runs import Run\nfrom ftnb.push import push\nfrom ftnb.base import UserError\nrun = Run({str(run.folder)!r})\ntry: print({code})\nexcept UserError as e: print("UserError:", e)'
    env = {**{k: v for k,v in os.environ.items() if not k.startswith(('HF_', 'HUGGING'))}, 'HF_ENDPOINT': hub.url, 'HF_HOME': str(run.folder.parent/'hf'), 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1', **({'HF_TOKEN': token} if token else {}), **env}
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env=env, timeout=120)
    return p.stdout+p.stderr

def test_every_file_arrives_byte_for_byte_in_a_private_repository_and_the_token_is_nowhere(run):
    with hub_standin() as hub: said = push(run, hub)
    assert set(hub.repos)=={'me/kettle', 'me/kettle-merged', 'me/kettle-GGUF'}, said
    for kind,name in dict(adapter='me/kettle', merged='me/kettle-merged', gguf='me/kettle-GGUF').items():
        assert hub.repos[name]['files']=={f.name: f.read_bytes() for f in run.path(kind).iterdir()} and hub.repos[name]['private'] is True
    assert hub.repos['me/kettle']['lfs']=={'adapter_model.safetensors'}
    assert TOKEN not in said and not [f for f in run.folder.parent.rglob('*') if f.is_file() and TOKEN.encode() in f.read_bytes()]
    assert [e['repository'] for e in run.events('push')]==['me/kettle', 'me/kettle-merged', 'me/kettle-GGUF']

def test_a_refused_token_is_one_sentence_without_the_token(run):
    with hub_standin() as hub: said = push(run, hub, token='hf_'+'wrong'*7)
    assert said.startswith('UserError: me/kettle could not be pushed: the token was not accepted') and said.count('\n')==1 and 'wrongwrong' not in said and not hub.repos

def test_without_a_token_it_says_where_one_comes_from(run):
    with hub_standin() as hub: said = push(run, hub, token=None)
    assert 'HF_TOKEN' in said and 'hf auth login' in said and not hub.asked

@pytest.mark.parametrize('report', ['certificate', 'export'])
def test_nothing_is_pushed_when_the_certificate_failed_unless_forced(run, report):
    run.save_report(report, dict(ok=False, line='q4_0 fails: KL 0.5'))
    with hub_standin() as hub:
        said = push(run, hub)
        assert 'q4_0 fails: KL 0.5' in said and not hub.asked
        assert 'me/kettle' in push(run, hub, 'push(run, ["adapter"], force=True)') and set(hub.repos)=={'me/kettle'}

def test_a_file_that_arrives_damaged_is_named(run):
    with hub_standin() as hub:
        hub.damage = True
        assert 'adapter_model.safetensors did not arrive' in push(run, hub, 'push(run, ["adapter"])')

def test_a_repository_that_is_open_already_gets_nothing_private(run):
    with hub_standin() as hub:
        hub.repos['me/kettle'] = dict(private=False, files={}, lfs=set(), commits=[])
        said = push(run, hub)
        assert 'open to everyone' in said and not hub.repos['me/kettle']['files']
        assert 'UserError' not in push(run, hub, 'push(run, ["adapter"], private=False)') and len(hub.repos['me/kettle']['files'])==3

def test_a_card_with_a_key_in_it_stays_here(run):
    run.path('adapter', 'README.md').write_text(CARD+'\nuse hf_'+'a1b2'*9)
    with hub_standin() as hub: assert 'README.md holds a Hugging Face token' in push(run, hub) and not hub.asked
    run.path('merged', 'pytorch_model.bin').touch()
    assert card_faults(run.path('merged'))==['pytorch_model.bin is a pickle, which can run code when it is loaded']

def test_offline_is_said_in_a_sentence(run):
    with hub_standin() as hub: assert 'HF_HUB_OFFLINE=1' in push(run, hub, HF_HUB_OFFLINE='1') and not hub.asked
