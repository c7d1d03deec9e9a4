"Write guides/families.qmd: what was tested for each model family, from the families of tests/test_families.py, and how quantised checkpoints are taken, from ftnb.quantised."
import sys
from pathlib import Path

root = Path(__file__).parent.parent
sys.path.insert(0, str(root/'tests'))
head = '''---
title: Model families
page-layout: full
toc: false
---

Each family is tested as a tiny random model of its true transformers class: loaded; put on 4-bit layers that are really `Linear4bit`, and counted; a LoRA on all linear layers, one optimizer step of ftnb's trainer, saved, loaded again with the same logits, merged with the same logits; packed rows checked; its place in llama.cpp's converter looked up. Written by `python tools/families.py` from the tests' own table (`tests/test_families.py`).
'''
special = '''## What is special

- **Falcon** fuses query, key and value into `query_key_value`, which is a target like any other. Its layers are of a class that bitsandbytes passes over; ftnb loads a 4-bit or 8-bit Falcon with plain layers (`ftnb.falcon`), so that it really is small. Packed rows see each other: stage 1 refuses `packing: true`. For GGUF, Falcon 7B needs a `num_kv_heads` of 1 in its config.json; Falcon RW has a norm that llama.cpp has no place for.
- **Mixtral, Qwen3-MoE**: `all-linear` trains attention and the experts, as PEFT's parameter targets. The router stays frozen unless it is named: `lora_target_modules: [all-linear, gate]`. The gate loss counts as the model's config says (`router_aux_loss_coef`), as in TRL. Experts are not quantised by bitsandbytes; the plan says how many GiB stay whole. Of Qwen2-MoE, PEFT adapts the shared expert only.
- **Mistral, Gemma 2 and 3**: the sliding window is counted in attention and in the cache of keys and values.
- **Gemma 2** caps its attention scores: it runs with `attn_implementation: eager`, and sdpa is refused in one sentence.
- **Phi-3** fuses its layers (`qkv_proj`, `gate_up_proj`); Phi-1 and Phi-2 call them `fc1`, `fc2`, `dense`.
- **Qwen2** has biases on query, key and value: they stay frozen (`lora_bias: none`) and come along when an adapter is merged.
- **Tied embeddings** (SmolLM2, Gemma, small Qwen, Falcon) stay one tensor in a merged model.
- **Gemma 1 and 2, Phi-3**: the converter to GGUF reads `tokenizer.model` of the base, which transformers 5 does not save.

## Checkpoints that are quantised already

'''
tail = '''
Kept: the weights stay packed, and an adapter stands on them. Unpacked: they are made whole as they are loaded, 16 bits a weight. What can't be done is refused before a weight is read, with the library to install or the way round. Tried on a CPU with transformers 5.23: bitsandbytes in 4 and 8 bits, FP8 and compressed-tensors (FP8), torchao (int8, adapter only). GPTQ and AWQ were not tried: gptqmodel 7.7 asks for torch 2.14.1. transformers 5.23 loads no HQQ.
'''

def table(rows): return '| '+' | '.join(rows[0])+' |\n|'+'---|'*len(rows[0])+''.join('\n| '+' | '.join(map(str, r.values()))+' |' for r in rows)+'\n'

def page():
    "The text of the page"
    import test_families as t
    from ftnb.quantised import packing_table
    rows = [{'family': n, 'model_type': f'`{k}`', 'LoRA, 4 bits, merging': 'tested', 'plan': 'no forecast' if n in t.uncounted else 'exact count', 'attention': t.kernel.get(n, 'sdpa'),
        'packing': 'refused' if n in t.not_packed else 'clean', 'GGUF': 'no' if n in t.no_gguf else 'yes'} for n,(k,_) in t.families.items()]
    return head+'\n'+table(rows)+'\n'+special+table(packing_table().rows)+tail

if __name__=='__main__': (root/'guides/families.qmd').write_text(page())
