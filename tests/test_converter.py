"The converter is the pinned one or the user's, it is fetched whole or not at all, and what it can't convert is said in one sentence"
import hashlib, io, json, os, shutil, sys, tarfile
from pathlib import Path
import pytest

from conftest import make_tiny
from ftnb.base import UserError
from ftnb.converter import _unpack, convert, converter, fetch_converter
from ftnb.gguf_ready import converter_knows, gguf_ready, llama_cpp, llama_cpp_folder, pre_tokenizer, read_converter
from ftnb.models import model_path
from ftnb.plan import plan, plan_run
from ftnb.recipe import make_recipe
from ftnb.runs import Run

ROOT = Path(__file__).parents[1]

def checkout(folder, script='import sys\nopen(sys.argv[sys.argv.index("--outfile")+1], "w").write("made by the checkout")\n'):
    "A folder that looks like a checkout of llama.cpp, whose converter is `script`"
    for f,text in {'convert_hf_to_gguf.py': script, 'convert_lora_to_gguf.py': script, 'gguf-py/gguf/__init__.py': ''}.items():
        (folder/f).parent.mkdir(parents=True, exist_ok=True)
        (folder/f).write_text(text)
    return folder

def archive(folder, **more):
    "A source archive as pip finds it, with the names of the real one; its path and SHA-256"
    root = f'llama_cpp_python-{llama_cpp["version"]}'
    files = {'pyproject.toml': '[build-system]\nrequires = ["scikit-build-core"]\nbuild-backend = "scikit_build_core.build"\n[project]\nname = "llama_cpp_python"\ndynamic = ["version"]\n',
        'PKG-INFO': f'Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {llama_cpp["version"]}\n', 'CMakeLists.txt': 'fail', 'vendor/llama.cpp/src/llama.cpp': 'int main;', 'vendor/llama.cpp/conversion/base.py': '1'}
    files.update({f'vendor/llama.cpp/{k}': 'pass' for k in ('convert_hf_to_gguf.py', 'convert_lora_to_gguf.py', 'gguf-py/gguf/__init__.py', 'LICENSE')}, **more)
    folder.mkdir()
    f = folder/f'{root}.tar.gz'
    with tarfile.open(f, 'w:gz') as t:
        for k,v in files.items():
            m = tarfile.TarInfo(f'{root}/{k}')
            m.size = len(v)
            t.addfile(m, io.BytesIO(v.encode()))
    return f, hashlib.sha256(f.read_bytes()).hexdigest()

@pytest.fixture
def shop(tmp_path, monkeypatch):
    "pip finds only what lies in a folder, and ftnb's home is empty"
    def stock(**more):
        f, sha = archive(tmp_path/'shop', **more)
        for k,v in dict(PIP_NO_INDEX='1', PIP_FIND_LINKS=str(f.parent), PIP_EXTRA_INDEX_URL='', PIP_CONFIG_FILE=os.devnull, FTNB_HOME=str(tmp_path/'home')).items(): monkeypatch.setenv(k, v)
        return dict(llama_cpp, sha256=sha)
    monkeypatch.delenv('LLAMA_CPP', raising=False)
    return stock

def test_the_converter_is_fetched_without_a_build_and_nothing_else_is_unpacked(shop, tmp_path):
    source = shop()
    f = fetch_converter(source)
    assert {str(o.relative_to(f)) for o in f.rglob('*') if o.is_file()}=={'convert_hf_to_gguf.py', 'convert_lora_to_gguf.py', 'conversion/base.py', 'gguf-py/gguf/__init__.py', 'LICENSE', 'source.json'}
    assert [o.name for o in (tmp_path/'home').iterdir()]==[f.name]
    shutil.rmtree(tmp_path/'shop')
    assert fetch_converter(source)==f # once

def test_an_archive_with_another_hash_is_refused_and_leaves_nothing(shop, tmp_path):
    source = dict(shop(), sha256='0'*64)
    with pytest.raises(UserError, match='SHA-256') as e: fetch_converter(source)
    assert '\n' not in str(e.value) and not [*(tmp_path/'home').iterdir()]

def test_an_archive_that_reaches_outside_its_folder_is_refused(tmp_path):
    f, _ = archive(tmp_path/'shop', **{'vendor/llama.cpp/conversion/../../../evil.py': 'bad'})
    with pytest.raises(tarfile.OutsideDestinationError): _unpack(f, tmp_path/'deep/out')
    assert not [*tmp_path.rglob('evil.py')]

def test_without_the_archive_the_way_out_is_named(shop, tmp_path):
    source = shop()
    shutil.rmtree(tmp_path/'shop')
    (tmp_path/'shop').mkdir()
    with pytest.raises(UserError, match='llama_cpp_path') as e: fetch_converter(source)
    assert '\n' not in str(e.value)

def test_a_users_checkout_wins_over_the_pinned_one(tmp_path, monkeypatch):
    own, other = checkout(tmp_path/'own'), checkout(tmp_path/'other', 'raise SystemExit("not this one")')
    monkeypatch.setenv('LLAMA_CPP', str(other))
    made = convert(tmp_path, tmp_path/'a.gguf', path=str(own))
    assert made.path.read_text()=='made by the checkout' and 'checkout' in made.converter and made.transformers
    monkeypatch.setenv('LLAMA_CPP', str(own))
    assert converter().folder==own and converter().own

@pytest.mark.parametrize('lack', ['convert_hf_to_gguf.py', 'gguf-py/gguf/__init__.py'])
def test_a_checkout_that_is_none_is_refused_with_what_it_lacks(tmp_path, lack):
    (checkout(tmp_path/'own')/lack).unlink()
    with pytest.raises(UserError, match=f'llama_cpp_path: .* it has no {lack}'): convert(tmp_path, tmp_path/'a.gguf', path=str(tmp_path/'own'))
    with pytest.raises(UserError, match='is no folder'): llama_cpp_folder(tmp_path/'nowhere')

@pytest.mark.parametrize('script, say', {'import os, signal\nos.kill(os.getpid(), signal.SIGKILL)': 'SIGKILL.*memory', 'raise OSError("4718592 requested and 0 written")': 'The disk is full', 'raise OSError(28, "No space left on device")': 'The disk is full',
    'import sentencepieces': 'pip install sentencepieces', 'raise ValueError("Can not map tensor \'model.x.weight\'")': 'model.x.weight has no place', 'raise SystemExit("a reason")': 'a reason .exit status 1'}.items(), ids=['killed', 'tofile', 'enospc', 'package', 'tensor', 'other'])
def test_a_conversion_that_fails_is_one_sentence_and_leaves_nothing(tmp_path, script, say):
    (tmp_path/'out').mkdir()
    (tmp_path/'out/a.gguf').write_text('old')
    own = checkout(tmp_path/'own', 'import sys\nf = open(sys.argv[sys.argv.index("--outfile")+1], "w")\nf.write("half")\nf.flush()\n'+script)
    with pytest.raises(UserError, match=say) as e: convert(tmp_path, tmp_path/'out/a.gguf', path=own)
    assert '\n' not in str(e.value) and [(o.name, o.read_text()) for o in (tmp_path/'out').iterdir()]==[('a.gguf', 'old')]

def test_an_unknown_architecture_is_named_by_the_converter_and_by_the_plan(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path/'banana'))
    config = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(json.dumps({**config, 'architectures': ['LlamaForCausalLMs']}))
    with pytest.raises(UserError, match='does not know the architecture LlamaForCausalLMs') as e: convert(folder, tmp_path/'a.gguf')
    assert '\n' not in str(e.value) and not (tmp_path/'a.gguf').exists()
    r = dict(model_name_or_path=str(folder), dataset='demo', use_cpu=True, max_steps=1)
    run = Run(tmp_path/'run', make_recipe(dict(r, export_formats=['merged', 'q8_0', 'q4_k_m']))).save()
    with pytest.raises(UserError, match="q8_0, q4_k_m can not be made .*does not know the architecture LlamaForCausalLMs. Leave them out"): plan_run(run)
    assert run.report('plan')['gguf']['ok'] is False
    assert plan_run(Run(tmp_path/'other', make_recipe(r)).save()).report['gguf']=={} # who asks for none is not bothered

def test_a_tokenizer_that_the_converter_does_not_know_is_refused_in_the_plan(tiny, tmp_path):
    "As where digits are no longer split: the file would answer differently"
    assert pre_tokenizer(Path(model_path('smollm2-135m'))/'tokenizer.json')=='smollm'
    folder = Path(shutil.copytree(tiny, tmp_path/'digits'))
    tok = json.loads((folder/'tokenizer.json').read_text())
    tok['pre_tokenizer']['pretokenizers'] = [o for o in tok['pre_tokenizer']['pretokenizers'] if o['type']!='Digits']+[dict(type='Digits', individual_digits=False)]
    (folder/'tokenizer.json').write_text(json.dumps(tok))
    assert pre_tokenizer(folder/'tokenizer.json')==''
    r = make_recipe(dict(model_name_or_path=str(folder), dataset='demo', use_cpu=True, max_steps=1, export_formats=['merged', 'f16']))
    assert any('pre-tokenizer' in n for n in plan(r).report['notes'])
    with pytest.raises(UserError, match='f16 can not be made .*pre-tokenizer'): plan_run(Run(tmp_path/'run', r).save())

def test_the_shipped_lists_are_the_converters_own():
    own, known = read_converter(fetch_converter()), converter_knows()
    assert known['version']==llama_cpp['version'] and own['pre']==known['pre'] and own['text']==known['text']
    assert set(known['architectures'])<=set(own['architectures']) and len(set(own['architectures'])-set(known['architectures']))<5 # those that are no text models in the end

def test_a_newer_checkout_may_know_more(tmp_path):
    own = checkout(tmp_path/'own')
    (own/'conversion').mkdir()
    (own/'conversion/__init__.py').write_text('TEXT_MODEL_MAP: dict[str, str] = {\n    "BananaForCausalLM": "banana",\n}\n')
    (own/'conversion/base.py').write_text('chktxt = \'a 1\'\nif chkhsh == "'+'a'*64+'":\n    # ref\n    res = "banana"\n')
    config = dict(model_type='banana', architectures=['BananaForCausalLM'])
    assert not gguf_ready(config) and gguf_ready(config, path=own) and 'not compared' in gguf_ready(config, path=own).notes[0]

@pytest.mark.soak
def test_a_pre_tokenizer_that_is_unknown_stops_the_converter_too(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path/'digits'))
    tok = json.loads((folder/'tokenizer.json').read_text())
    tok['pre_tokenizer']['pretokenizers'] = [*tok['pre_tokenizer']['pretokenizers'][1:], dict(type='Digits', individual_digits=False)]
    (folder/'tokenizer.json').write_text(json.dumps(tok))
    with pytest.raises(UserError, match='pre-tokenizer'): convert(folder, tmp_path/'a.gguf')
