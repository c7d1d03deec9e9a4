"llama.cpp out of its wheel says of a GGUF file what transformers says of the model, and a damaged file never ends the process"
import subprocess, sys
import pytest, torch
from ftnb import libllama
from ftnb.base import UserError
from ftnb.converter import convert
from ftnb.ggml import Engine

TEXTS = ['<|im_start|>user\nWhat is 12 times  7?<|im_end|>\n<|im_start|>assistant\nIt is 84.<|im_end|>', 'Ünïcode, 東京 and 🙂\n\n\tdef f(x): return x**2  # 1024', "  can't  WON'T 3.14 "]

@pytest.fixture(scope='module')
def files(tiny, tmp_path_factory):
    "The tiny Llama as GGUF, in f32"
    return convert(tiny, tmp_path_factory.mktemp('gguf')/'tiny.gguf', 'f32').path

@pytest.fixture(scope='module')
def tiny_model(tiny):
    "The same in transformers, float32"
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()

@pytest.fixture(scope='module')
def engine(files):
    with Engine(files, n_ctx=256) as e: yield e

def kl(model, engine, ids):
    "Mean divergence of the engine from the model on a row"
    with torch.inference_mode(): a = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    b = torch.tensor(engine.logits(ids)).double().log_softmax(-1)
    return (a.exp()*(a-b)).sum(-1).mean().item()

def test_llama_cpp_gives_the_logits_of_transformers_row_after_row(engine, tiny_model, tokenizer):
    for t in TEXTS+TEXTS[:1]: assert 0<=kl(tiny_model, engine, tokenizer(t, add_special_tokens=False)['input_ids'])<1e-5

def test_a_wrong_weight_shows_in_the_divergence(engine, tiny_model, tokenizer):
    import copy
    other = copy.deepcopy(tiny_model)
    with torch.no_grad(): other.model.layers[1].mlp.up_proj.weight.mul_(-1)
    assert kl(other, engine, tokenizer(TEXTS[0])['input_ids'])>1e-5

def test_a_row_that_goes_through_in_pieces_gives_the_same(engine, tokenizer, monkeypatch):
    ids = tokenizer(TEXTS[0])['input_ids']
    whole = engine.logits(ids)
    monkeypatch.setattr(engine, 'n_batch', 7)
    assert len(ids)>14 and abs(engine.logits(ids)-whole).max()<1e-4*abs(whole).max()

def test_llama_cpp_sees_the_tokens_that_were_trained_on(engine, tokenizer):
    for t in TEXTS:
        assert engine.tokenize(t)==tokenizer(t, add_special_tokens=False)['input_ids']
        assert engine.text(engine.tokenize(t))==t
    assert len(engine.tokenize('<|im_end|>'))==1<len(engine.tokenize('<|im_end|>', parse_special=False))

def test_the_file_s_template_and_end_tokens_are_read(engine, tokenizer):
    assert engine.template==tokenizer.chat_template and tokenizer.eos_token_id in engine.eog and not engine.add_bos
    assert (engine.n_vocab, engine.n_ctx_train, engine.meta('general.architecture'), engine.meta('no.such.key'))==(len(tokenizer), 512, 'llama', None)

def test_the_greedy_answer_is_that_of_transformers_and_ends_at_an_end_token(engine, tiny_model, tokenizer):
    for t in TEXTS:
        ids = tokenizer(t)['input_ids']
        want = tiny_model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(ids):].tolist()
        end = next((i for i,w in enumerate(want) if w in engine.eog), None)
        assert engine.greedy(ids, 8)==want[:len(want) if end is None else end+1]
    assert engine.greedy(engine.tokenize(TEXTS[0]), 8)[-1] in engine.eog # this one ends by itself

def test_an_adapter_beside_its_base_says_what_peft_says_and_can_be_switched_off(files, tiny, tiny_model, tokenizer, tmp_path):
    from gguf import GGUFWriter
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    torch.manual_seed(1)
    m = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), LoraConfig(r=4, lora_alpha=64, target_modules=['v_proj', 'down_proj'], init_lora_weights=False)).eval()
    w = GGUFWriter(tmp_path/'lora.gguf', 'llama')
    w.add_type('adapter'), w.add_string('adapter.type', 'lora'), w.add_float32('adapter.lora.alpha', 64)
    for k,v in m.named_parameters():
        if 'lora_' not in k: continue
        layer, part = k.split('.layers.')[1].split('.')[0], 'attn_v' if 'v_proj' in k else 'ffn_down'
        w.add_tensor(f'blk.{layer}.{part}.weight.{"lora_a" if "lora_A" in k else "lora_b"}', v.detach().numpy())
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    ids = tokenizer(TEXTS[0])['input_ids']
    with Engine(files, n_ctx=128, lora=tmp_path/'lora.gguf') as e:
        assert kl(m, e, ids)<1e-5<kl(tiny_model, e, ids)
        assert kl(tiny_model, e.adapt(0), ids)<1e-5
        assert kl(m, e.adapt(1), ids)<1e-5

def test_llama_cpp_writes_nothing_on_the_screen(files, capfd):
    with Engine(files, rehearsed=True) as e: e.logits([1, 2])
    assert ''.join(capfd.readouterr())==''

def test_a_file_that_is_cut_or_spoilt_is_one_sentence_and_the_process_lives(files, tmp_path):
    code = '''
import sys
from pathlib import Path
from ftnb.base import UserError
from ftnb.ggml import Engine
raw, f = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
twice = raw.replace('Ġthe'.encode(), 'Ġand'.encode(), 1) # a token that is there twice ends llama.cpp by an assertion
spoilt = [raw[:n] for n in (0, 3, 4, 20, 200, 5000, len(raw)//3, len(raw)-33, len(raw)-1)]+[raw[:4]+b'\\xff'+raw[5:], raw.replace(b'llama.block_count', b'llama.blork_count'), raw.replace(b'gpt2', b'gpt9', 1), twice]
for i,b in enumerate(spoilt):
    f.write_bytes(b)
    try: Engine(f, n_ctx=32).logits([1, 2, 3])
    except UserError as e: assert str(f) in str(e) and chr(10) not in str(e), e
    else: raise SystemExit(f'{i} went through')
print('alive')
'''
    p = subprocess.run([sys.executable, '-c', code, str(files), str(tmp_path/'bad.gguf')], capture_output=True, text=True)
    assert (p.returncode, p.stdout)==(0, 'alive\n'), p.stdout+p.stderr[-500:]

def test_a_file_that_is_not_there_or_is_none_is_named(tmp_path):
    with pytest.raises(UserError, match='There is no file .*no.gguf'): Engine(tmp_path/'no.gguf')
    (tmp_path/'x.gguf').write_bytes(b'PK\x03\x04 a zip file')
    with pytest.raises(UserError, match='x.gguf is not a GGUF file'): Engine(tmp_path/'x.gguf')

@pytest.fixture
def fresh():
    "The library as if it had not been loaded"
    libllama.library.cache_clear()
    yield
    libllama.library.cache_clear()

def test_another_build_of_llama_cpp_is_told_by_its_defaults_before_anything_is_called(fresh, monkeypatch):
    monkeypatch.setitem(libllama.context_defaults, 'n_ubatch', 640)
    with pytest.raises(UserError, match=r'xllamacpp \S+ is not the llama.cpp that is known here .2026.10.11549.*n_ubatch is 512, not 640'): libllama.library()

def test_a_build_without_a_function_is_told_by_its_name(fresh, monkeypatch):
    monkeypatch.setitem(libllama.functions, 'llama_no_such_call', (None,))
    with pytest.raises(UserError, match='llama_no_such_call.*pip install xllamacpp=='): libllama.library()

def test_a_missing_wheel_is_one_line_with_the_command(fresh, monkeypatch):
    monkeypatch.setattr(libllama, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='not installed here: pip install xllamacpp=='): libllama.library()
