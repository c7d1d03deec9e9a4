"A GGUF file of a run holds the weights the reference converter makes, and the run's template, end tokens, name and licence"
import json, os, shutil, subprocess, sys
from collections import namedtuple
from pathlib import Path
import numpy as np, pytest
from gguf import GGUFWriter

from conftest import Made, make_tiny, write_rows
from ftnb.base import UserError
from ftnb.converter import converter
from ftnb.ggml import Engine
from ftnb.gguf_files import ends_of, gguf_card, piece_scores, set_keys, staged, wanted_keys, write_base_gguf, write_gguf_card, write_lora_gguf
from ftnb.gguf_size import check_disk, disk_need, gguf_bytes, gguf_path
from ftnb.models import model_path
from ftnb.quantise import Head, quantise
from ftnb.recipe import make_recipe
from ftnb.runs import Run
from ftnb.tokenizer import run_tokenizer

def reference(folder, to, dtype='f16'):
    "What the converter makes of a folder, started by hand"
    c = converter()
    subprocess.run([sys.executable, str(c.folder/'convert_hf_to_gguf.py'), str(folder), '--outfile', str(to), '--outtype', dtype], check=True, capture_output=True, env={**os.environ, 'PYTHONPATH': ''})
    return to

def tensors(path):
    "Type, shape and bytes of each tensor of a GGUF file"
    data = np.memmap(path, np.uint8, 'r')
    with Head(path) as h: return {n: (t['type'], t['shape'], data[t['at']:t['at']+t['bytes']].tobytes()) for n,t in h.tensors.items()}

def keys(path, *names):
    with Head(path) as h: return [h.get(n) for n in names]

@pytest.fixture(scope='module')
def made(tiny, tmp_path_factory):
    "A run whose LoRA was scaled by the root of its rank, and a base with a card; adapter and base as GGUF"
    from ftnb.train import train
    d = tmp_path_factory.mktemp('gguf')
    base = Path(shutil.copytree(tiny, d/'base {x}')) # braces are a template for the converter
    (base/'README.md').write_text('---\nlicense: mit\nlanguage: [en, de]\n---\n# A base\n')
    run = Made(str(base), d)(peft='lora', use_rslora=True, lora_r=16, max_steps=3, learning_rate=3e-2, lora_target_modules=['q_proj', 'down_proj'])
    train(run)
    return run, base, write_lora_gguf(run)

def test_our_f16_file_is_the_reference_converters_tensor_for_tensor(made, tmp_path):
    _, base, files = made
    ours, ref = tensors(files['base'].path), tensors(reference(base, tmp_path/'ref.gguf'))
    assert len(ours)==len(ref)==2*9+2 and ours==ref

def test_the_file_says_of_itself_what_the_run_is(made):
    run, _, files = made
    tok, path = run_tokenizer(run), files['base'].path
    t = 'tokenizer.ggml.'
    assert keys(path, 'tokenizer.chat_template', t+'eos_token_id', t+'pre', t+'add_bos_token')==[tok.chat_template, tok.eos_token_id, 'smollm', False]
    assert keys(path, 'general.license', 'general.base_model.0.name', 'general.quantized_by')==['mit', 'Base {X}', None] and path.name==f'{run.name}-base.gguf'
    assert keys(files['lora'].path, 'general.name', 'general.license', 'adapter.type')==[run.name, 'mit', 'lora']
    assert files['base'].bytes==path.stat().st_size and 'transformers' in repr(files['base'])

def test_an_adapter_in_gguf_answers_as_the_trained_one_even_where_it_was_scaled_otherwise(made):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    run, base, files = made
    ids = run_tokenizer(run)('What is 12345 times 3, and why?')['input_ids']
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    say = lambda m: m(torch.tensor([ids])).logits[0].detach().numpy()
    before, after = say(plain), say(PeftModel.from_pretrained(plain, str(run.path('adapter'))))
    with Engine(files['base'].path, lora=files['lora'].path) as e: got = e.logits(ids)
    assert np.abs(after-before).max()>20*np.abs(got-after).max()

def test_an_end_of_turn_that_llama_cpp_does_not_know_is_named_in_the_file(made, tmp_path):
    run, _, files = made
    f, tok = Path(shutil.copy(files['base'].path, tmp_path/'a.gguf')), run_tokenizer(run)
    end = tok.convert_tokens_to_ids('<jupyter_start>')
    before = tensors(f)
    assert ends_of(f, [end, tok.eos_token_id])=={tok.eos_token_id} and not wanted_keys(f, tok, [tok.eos_token_id])
    tok.chat_template = tok.chat_template.replace('<|im_end|>', '<jupyter_start>')
    new = wanted_keys(f, tok, [end, tok.eos_token_id])
    assert new=={'tokenizer.chat_template': tok.chat_template, 'tokenizer.ggml.eot_token_id': end}
    set_keys(f, new)
    assert ends_of(f, [end, tok.eos_token_id])=={end, tok.eos_token_id} and tensors(f)==before and not wanted_keys(f, tok, [end, tok.eos_token_id])
    with Engine(f) as e: assert e.template==tok.chat_template and end in e.eog
    assert [o.name for o in tmp_path.iterdir()]==['a.gguf']

def test_a_begin_token_that_the_template_does_not_write_is_not_put_before_a_prompt(made, tmp_path):
    run, _, files = made
    f, tok = Path(shutil.copy(files['base'].path, tmp_path/'a.gguf')), run_tokenizer(run)
    set_keys(f, {'tokenizer.ggml.add_bos_token': True})
    assert not wanted_keys(f, tok, []) # this template begins with it
    tok.chat_template = 'Q: '+tok.chat_template
    assert wanted_keys(f, tok, [])['tokenizer.ggml.add_bos_token'] is False

def test_a_file_whose_tokens_and_embeddings_differ_is_refused(made, tmp_path):
    run, base, _ = made
    other = Path(shutil.copytree(base, tmp_path/'other'))
    with pytest.raises(UserError, match='is quantised from a file in f16'): write_base_gguf(run, other, 'q4_k_m')
    w = GGUFWriter(tmp_path/'a.gguf', 'llama')
    w.add_token_list(['a', 'b', 'c'])
    w.add_tensor('token_embd.weight', np.zeros((4, 32), np.float16))
    for o in ('header', 'kv_data', 'tensors'): getattr(w, f'write_{o}_to_file')()
    w.close()
    with pytest.raises(UserError, match='names 3 tokens and has embeddings for 4'): wanted_keys(tmp_path/'a.gguf', run_tokenizer(run), [])
    (other/'config.json').write_text(json.dumps({**json.loads((other/'config.json').read_text()), 'architectures': ['MambaNineForCausalLM']}))
    with pytest.raises(UserError, match='MambaNineForCausalLM'): write_base_gguf(run, other)

def test_a_model_whose_converter_reads_the_old_tokenizer_gets_the_one_of_the_base(made, tmp_path):
    run, base, _ = made
    d = Path(make_tiny(tmp_path/'gemma2', 'gemma2'))
    r = Run(tmp_path/'g', make_recipe(dict(model_name_or_path=str(d), dataset='demo')))
    tok = run_tokenizer(r)
    with pytest.raises(UserError, match='reads the tokenizer.model of'):
        with staged(r, d, tok): pass
    (d/'tokenizer.model').write_bytes(b'sp')
    with staged(r, d, tok) as f:
        assert (f/'tokenizer.model').read_bytes()==b'sp' and json.loads((f/'tokenizer_config.json').read_text())['added_tokens_decoder'][str(tok.eos_token_id)]==dict(content=tok.eos_token, special=True)
        assert (f/'model.safetensors').stat().st_size==(d/'model.safetensors').stat().st_size and json.loads((f/'config.json').read_text())['model_type']=='gemma2'

def pieces(folder, rows=0):
    "A tokenizer of Llama 2's kind, trained on a text, and a tiny model with `rows` more embeddings than it has tokens"
    import torch
    from tokenizers import Tokenizer, decoders as D, models, normalizers as N, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    t, special, single = Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True)), ['<unk>', '<s>', '</s>'], [f'<0x{i:02X}>' for i in range(256)]
    t.normalizer = N.Sequence([N.Prepend('\u2581'), N.Replace(' ', '\u2581')])
    t.train_from_iterator(Path(__file__).read_text().splitlines(), trainers.BpeTrainer(vocab_size=900, special_tokens=special+single, max_token_length=12, show_progress=False))
    o = json.loads(t.to_str())
    v, o['added_tokens'] = o['model']['vocab'], [a for a in o['added_tokens'] if a['content'] in special]
    o['model']['merges'] = [[w[:i], w[i:]] for w,_ in sorted(v.items(), key=lambda x: x[1]) if w not in special+single for i in range(1, len(w)) if w[:i] in v and w[i:] in v] # every way to a piece, as of a sentencepiece model
    t = Tokenizer.from_str(json.dumps(o))
    t.decoder = D.Sequence([D.Replace('\u2581', ' '), D.ByteFallback(), D.Fuse(), D.Strip(' ', 1, 0)])
    t.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    tok = PreTrainedTokenizerFast(tokenizer_object=t, unk_token='<unk>', bos_token='<s>', eos_token='</s>', pad_token='<unk>')
    tok.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role=='assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=len(tok)+rows)).save_pretrained(folder)
    tok.save_pretrained(folder)
    return tok

def test_pieces_merge_in_the_order_of_the_tokenizer(tmp_path, tokenizer):
    tok = pieces(tmp_path)
    scores, v = piece_scores(tok, len(tok)+2), tok.get_vocab()
    first = json.loads(tok.backend_tokenizer.to_str())['model']['merges']
    assert scores[v[''.join(first[0])]]==0>scores[v[''.join(first[-1])]] and len(scores)==len(tok)+2 and not scores[:259].any()
    assert piece_scores(tokenizer, 9) is None

@pytest.mark.soak
def test_a_tokenizer_with_bytes_to_fall_back_to_splits_text_in_llama_cpp_as_in_training(tmp_path):
    "The converter gives all its tokens one score, and none to rows that have no token"
    tok = pieces(tmp_path/'base', rows=8)
    run = Run(tmp_path/'run', make_recipe(dict(model_name_or_path=str(tmp_path/'base'), dataset='demo')))
    f = write_base_gguf(run, tmp_path/'base').path
    with Engine(f) as e:
        for text in ('Hello there 123', 'gr\u00f6\u00dfer \u6771\u4eac', '  two  spaces', tok.apply_chat_template([dict(role='user', content='Who is it?')], tokenize=False)):
            assert e.tokenize(text)==tok(text, add_special_tokens=False)['input_ids']
        assert e.add_bos and e.eog=={tok.eos_token_id} and len(e.logits([1, 2, 3]))==3
    assert reference(tmp_path/'base', tmp_path/'ref.gguf') and keys(tmp_path/'ref.gguf', 'tokenizer.ggml.scores')==[-1000] # else `piece_scores` is no longer needed

def test_added_tokens_are_no_matter_for_an_adapter(made, tmp_path):
    run, *_ = made
    other = Run(shutil.copytree(run.folder, tmp_path/'run'))
    other = Run(other.folder, make_recipe({**json.loads(json.dumps(dict(model_name_or_path=run.recipe.model_name_or_path, dataset='demo', new_tokens=['<step>'])))}))
    with pytest.raises(UserError, match='adds tokens .* merged'): write_lora_gguf(other)

def test_sizes_are_known_before_and_a_nearly_full_disk_is_refused_before_anything_is_written(made, tmp_path, monkeypatch):
    run, base, files = made
    config = json.loads((base/'config.json').read_text())
    weights = lambda f: sum(len(t[2]) for t in tensors(f).values())
    for k in ('f16', 'q8_0', 'q4_k_m'):
        f = files['base'].path if k=='f16' else quantise(files['base'].path, tmp_path/f'{k}.gguf', k, 1).path
        said = gguf_bytes(config, k)-64*config['vocab_size']-2**16
        assert said==weights(f) and f.stat().st_size<=gguf_bytes(config, k)
    formats = ['adapter', 'q8_0', 'q4_k_m', 'gguf-lora']
    need = disk_need(run, formats)
    assert need>sum(gguf_bytes(config, k) for k in ('f16', 'f16', 'q8_0', 'q4_k_m')) and disk_need(run, ['adapter'])==0
    disk = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: disk(0, 0, need-1))
    with pytest.raises(UserError, match=r'take about .* and .* are free in .*nothing was written') as e: check_disk(run, formats)
    assert '\n' not in str(e.value)
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: disk(0, 0, need))
    assert check_disk(run, formats)==need

def test_the_card_lists_the_files_and_how_to_start_them(made):
    run, *_ = made
    text = write_gguf_card(run).read_text()
    assert text.startswith('---\nbase_model: "base {x}"') and 'license: "mit"' in text and f'--lora {run.name}-lora.gguf' in text and str(run.folder.parent) not in text
    assert f'llama-server -m {run.name}-q8_0.gguf' in gguf_card(run, dict(f16=1, q8_0=2, q4_k_m=3))

@pytest.mark.soak
@pytest.mark.parametrize('kind', ['f16', 'bf16', 'f32'])
def test_the_embedded_models_file_is_the_references(tmp_path, kind):
    run = Run(tmp_path/'run', make_recipe(dict(dataset='demo'))).save()
    made = write_base_gguf(run, model_path('smollm2-135m'), kind)
    assert tensors(made.path)==tensors(reference(model_path('smollm2-135m'), tmp_path/'ref.gguf', kind))
    assert keys(made.path, 'general.name', 'general.license', 'general.base_model.0.repo_url', 'tokenizer.ggml.pre')==['run', 'apache-2.0', 'https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct', 'smollm']
