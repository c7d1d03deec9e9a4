"Quantised GGUF files are those of llama.cpp's own program, byte for byte, and a broken source is a sentence"
import json, os, platform, shutil, sys, time
from pathlib import Path
import numpy as np, pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import quantise_oracle as made
from ftnb.base import UserError
from ftnb.quantise import choose_types, quantise, quantised_size

oracle = json.loads((ROOT/'tests/data/quantise_oracle.json').read_text())['models']
cases = [(m, k) for m,o in oracle.items() for k in o if k!='source']

@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    "The source of each model of the oracle"
    d = tmp_path_factory.mktemp('gguf')
    return {name: made.write_model(d/f'{name}.gguf', **m) for name,m in made.models.items()}

def test_the_oracle_saw_the_weights_that_are_tested(sources):
    assert {m: made.sha(f.read_bytes()) for m,f in sources.items()}=={m: o['source'] for m,o in oracle.items()}

@pytest.mark.skipif(platform.machine().lower() not in ('x86_64', 'amd64'), reason='the oracle was compiled for x86-64; other processors may round the last bit of a scale differently')
@pytest.mark.parametrize('model,kind', cases)
def test_a_quantised_file_is_llama_cpp_s_byte_for_byte(sources, tmp_path, model, kind):
    want, q = oracle[model][kind], quantise(sources[model], tmp_path/'q.gguf', kind, n_threads=2)
    if 'tensors' in want: assert made.tensor_hashes(q.path)==want['tensors']
    assert made.sha(q.path.read_bytes())==want['file']
    assert q.bytes==q.path.stat().st_size==quantised_size(sources[model], kind)

def test_a_width_that_a_format_can_not_take_is_named(sources, tmp_path):
    q = quantise(sources['narrow'], tmp_path/'q.gguf', 'q4_k_m')
    assert ('blk.1.ffn_down.weight', 'Q4_K', 'Q5_0') in q.fallbacks and 'of them not as q4_k_m has it' in repr(q)
    assert not quantise(sources['wide'], tmp_path/'w.gguf', 'q4_k_m').fallbacks

def test_one_layer_more_changes_which_layers_get_more_bits():
    def q6(n): return [i for i in range(n) if choose_types({f'blk.{j}.attn_v.weight': (256, 256) for j in range(n)}, 'q4_k_m', layers=n)[0][f'blk.{i}.attn_v.weight']=='Q6_K']
    assert q6(30)==[0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    assert q6(24)!=[i for i in q6(30) if i<24]

def spoilt(f, value, tensor='blk.2.ffn_up.weight'):
    "The file with one wrong number"
    from gguf import GGUFReader
    r = GGUFReader(f, 'r+')
    t = next(t for t in r.tensors if t.name==tensor)
    t.data.reshape(-1)[5] = value
    r.data.flush()
    return f

@pytest.mark.parametrize('kind', ['q8_0', 'q4_k_m', 'bf16'])
def test_a_weight_that_is_not_a_number_stops_it_and_leaves_nothing(sources, tmp_path, kind):
    f = spoilt(shutil.copy(sources['wide'], tmp_path/'f16.gguf'), np.nan)
    with pytest.raises(UserError, match='blk.2.ffn_up.weight holds values that are not finite'): quantise(f, tmp_path/'q.gguf', kind)
    assert [p.name for p in tmp_path.iterdir()]==['f16.gguf']

def test_a_norm_that_is_not_a_number_stops_it_too(sources, tmp_path):
    f = spoilt(shutil.copy(sources['wide'], tmp_path/'f16.gguf'), np.inf, 'blk.1.attn_norm.weight')
    with pytest.raises(UserError, match='blk.1.attn_norm.weight holds values that are not finite'): quantise(f, tmp_path/'q.gguf', 'q8_0')

def test_a_weight_too_large_for_f16_is_told_apart_from_a_broken_one(sources, tmp_path):
    f = spoilt(shutil.copy(sources['grouped'], tmp_path/'f32.gguf'), 1e6)
    with pytest.raises(UserError, match='do not fit in F16 .largest 1e.06.; take bf16'): quantise(f, tmp_path/'q.gguf', 'f16')
    assert quantise(f, tmp_path/'b.gguf', 'bf16').types['BF16']==562

def test_a_file_that_ends_early_is_refused_before_anything_is_written(sources, tmp_path):
    f = tmp_path/'short.gguf'
    f.write_bytes(sources['wide'].read_bytes()[:-100])
    with pytest.raises(UserError, match='is cut off'): quantise(f, tmp_path/'q.gguf', 'q8_0')
    assert not (tmp_path/'q.gguf').exists()

def test_a_full_disk_is_said_with_the_bytes_before_anything_is_written(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match='takes 1.6 MB and 1.0 kB are free'): quantise(sources['wide'], tmp_path/'q.gguf', 'q4_k_m')

def test_the_old_file_stays_when_the_new_one_fails(sources, tmp_path):
    (tmp_path/'q.gguf').write_bytes(b'old')
    f = spoilt(shutil.copy(sources['wide'], tmp_path/'f16.gguf'), np.nan)
    with pytest.raises(UserError): quantise(f, tmp_path/'q.gguf', 'q8_0')
    assert (tmp_path/'q.gguf').read_bytes()==b'old'

@pytest.mark.soak
@pytest.mark.parametrize('kind', [k for k in made.kinds if k!='f16'])
def test_smollm2_quantised_is_the_compiled_program_s_file(kind, tmp_path_factory):
    python = os.environ.get('FTNB_LLAMA_CPP_PYTHON')
    if not python: pytest.skip('FTNB_LLAMA_CPP_PYTHON names no Python with llama-cpp-python')
    from ftnb.converter import convert
    from ftnb.models import model_path
    d = tmp_path_factory.getbasetemp()
    src = d/'smollm2-f16.gguf'
    if not src.exists(): convert(model_path('smollm2-135m'), src, 'f16')
    t0 = time.perf_counter()
    ours = quantise(src, d/f'ours-{kind}.gguf', kind, n_threads=1)
    t1 = time.perf_counter()
    theirs = made.oracle(python, src, d/f'theirs-{kind}.gguf', kind)
    t2 = time.perf_counter()
    assert made.tensor_hashes(ours.path)==made.tensor_hashes(theirs)
    assert made.sha(ours.path.read_bytes())==made.sha(theirs.read_bytes())
    print(f'{kind}: {ours.bytes:,} bytes, ours {t1-t0:.1f} s, llama_model_quantize {t2-t1:.1f} s with its start; {ours!r}')
    ours.path.unlink(), theirs.unlink()
