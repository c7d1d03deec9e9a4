"""Write tests/data/quantise_oracle.json: what llama.cpp's own `llama_model_quantize` makes of small files whose weights come from a seed.

    python tools/quantise_oracle.py /path/to/python     # a Python in which llama-cpp-python 0.3.36 is installed (it compiles llama.cpp)
"""
import hashlib, json, subprocess, sys, tempfile
from pathlib import Path
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

kinds = dict(q8_0=7, q6_k=18, q5_k_m=17, q4_k_m=15, q4_0=2, f16=1, bf16=32)
five = ('q8_0', 'q6_k', 'q5_k_m', 'q4_k_m', 'q4_0')
wide = dict(arch='llama', layers=4, hidden=256, inner=512, vocab=512, heads=4, kv=2, dtype='f16')
models = dict(
    wide=wide, # every width is a multiple of 256
    narrow=dict(wide, hidden=64, inner=96, tied=True), # none is: the K-quants give way, and the embeddings are the output
    experts=dict(wide, layers=8, inner=256, vocab=64, experts=8, rows=8, dtype='bf16'), # eight experts have rules of their own
    falcon=dict(wide, arch='falcon', layers=16, inner=256, vocab=64, rows=8, fused=True), # and so has falcon
    grouped=dict(wide, layers=80, inner=256, vocab=64, rows=2, dtype='f32'), # 80 layers with grouped queries are a 70B to llama.cpp
    tight=dict(wide, layers=2, hidden=272, inner=48, vocab=64), # widths of 272 and 48 are no multiple of 32 either
)
ask = '''
import sys, llama_cpp as L
src, to, ftype = sys.argv[1:]
p = L.llama_model_quantize_default_params()
p.ftype, p.nthread = int(ftype), 1
sys.exit(L.llama_model_quantize(src.encode(), to.encode(), p))
'''

def numbers(seed, shape):
    "Float32 weights, near normal, from the raw stream of PCG64, which stays as it is between versions of numpy"
    n = int(np.prod(shape))
    raw = np.random.PCG64(seed).random_raw(n).astype('<u8').view('<u2').reshape(n, 4)
    return ((raw.astype(np.int64).sum(1)-131070)/np.float32(2**21)).astype(np.float32).reshape(shape)

def write_model(
    path, # GGUF file to write
    arch, layers, hidden, inner, vocab, heads, kv, dtype, # What the model is
    experts=0, # Experts of each layer
    tied=False, # No output matrix
    fused=False, # Query, key and value in one
    rows=None, # Height of all matrices but the embeddings; none: as the model has it
):
    "A file with the tensors of a model in `dtype`; its norms are float32"
    w = GGUFWriter(path, arch)
    w.add_name('seeded')
    w.add_context_length(128), w.add_embedding_length(hidden), w.add_block_count(layers), w.add_feed_forward_length(inner)
    w.add_head_count(heads), w.add_head_count_kv(kv), w.add_layer_norm_rms_eps(1e-5), w.add_layer_norm_eps(1e-5)
    if experts: w.add_expert_count(experts), w.add_expert_used_count(2)
    w.add_array('seeded.list', ['a', 'ä']), w.add_float32('seeded.number', .5), w.add_bool('seeded.yes', True)
    w.add_file_type(dict(f32=0, f16=1, bf16=32)[dtype])
    size = hidden//heads
    parts = {'attn_qkv': ((heads+2*kv)*size, hidden)} if fused else {'attn_q': (heads*size, hidden), 'attn_k': (kv*size, hidden), 'attn_v': (kv*size, hidden)}
    e = (experts,) if experts else ()
    parts |= {'attn_output': (hidden, heads*size), f'ffn_up{"_exps"*bool(e)}': (*e, inner, hidden), f'ffn_gate{"_exps"*bool(e)}': (*e, inner, hidden), f'ffn_down{"_exps"*bool(e)}': (*e, hidden, inner)}
    if experts: parts |= {'ffn_gate_inp': (experts, hidden), 'ffn_down_shexp': (hidden, inner)} # two second matrices in each layer
    all = {'output_norm.weight': (hidden,), 'token_embd.weight': (vocab, hidden), **({} if tied else {'output.weight': (vocab, hidden)})}
    for i in range(layers): all |= {f'blk.{i}.attn_norm.weight': (hidden,), **{f'blk.{i}.{k}.weight': (*s[:-2], rows or s[-2], s[-1]) for k,s in parts.items()}}
    for seed,(name,shape) in enumerate(all.items()):
        x = numbers(seed, shape)
        if len(shape)>1 and dtype=='f16': x = x.astype(np.float16)
        if len(shape)>1 and dtype=='bf16': w.add_tensor(name, (x.view(np.uint32)>>16).astype(np.uint16).view(np.uint8), raw_dtype=GGMLQuantizationType.BF16)
        else: w.add_tensor(name, x)
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    return Path(path)

def sha(data): return hashlib.sha256(data).hexdigest()

def tensor_hashes(path):
    "Type and SHA-256 of each tensor of a file, in the order of the file"
    return {t.name: f'{t.tensor_type.name} {sha(np.ascontiguousarray(t.data).tobytes())}' for t in GGUFReader(path).tensors}

def oracle(python, src, to, kind):
    "Have llama.cpp quantise a file"
    p = subprocess.run([str(python), '-c', ask, str(src), str(to), str(kinds[kind])], capture_output=True, text=True)
    if p.returncode: raise RuntimeError(p.stderr[-2000:])
    return Path(to)

def main(python):
    out = {}
    with tempfile.TemporaryDirectory() as tmp:
        for name,m in models.items():
            src = write_model(Path(tmp)/f'{name}.gguf', **m)
            out[name] = dict(source=sha(src.read_bytes()))
            for kind in kinds if name in ('grouped', 'tight') else five:
                f = oracle(python, src, Path(tmp)/f'{name}-{kind}.gguf', kind)
                out[name][kind] = dict(file=sha(f.read_bytes()), **(dict(tensors=tensor_hashes(f)) if name in ('wide', 'narrow') else {}))
    to = Path(__file__).parents[1]/'tests/data/quantise_oracle.json'
    to.write_text(json.dumps(dict(made_by='llama-cpp-python 0.3.36 (llama.cpp 0c1e57098)', models=out), indent=1)+'\n')
    return to

if __name__=='__main__': print(main(*sys.argv[1:]))
