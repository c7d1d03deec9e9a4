"Write guides/choosing.qmd: what each parameter does, its default, when to change it, and who says so, from the recipe's help texts and the rules of ftnb.advice."
import re
from pathlib import Path

from ftnb.advice import rules, sources
from ftnb.fields import defaults, help_of
from ftnb.form import show_value

root = Path(__file__).parent.parent
# (field, group, when to change it, sources)
parameters = [
    ('peft', 'Method', 'lora to begin with; qlora if the plan says that the base does not fit in 16 bits; full if there is much data and memory, or knowledge is to be taught rather than form', ('LoRA Without Regret', 'QLoRA', 'LoRA Learns Less and Forgets Less')),
    ('lora_r', 'Adapter', '8 to 16 for form and tone; up to 64 or 256 when the loss stops falling early on 10,000 rows and more', ('LoRA', 'LoRA Without Regret', 'Tinker, LoRA primer')),
    ('lora_alpha', 'Adapter', 'keep it at one or two times r; change the learning rate instead', ('LoRA', 'rsLoRA')),
    ('lora_dropout', 'Adapter', '0.05 to 0.1 when the validation loss rises while the training loss falls', ('QLoRA',)),
    ('lora_target_modules', 'Adapter', 'keep all-linear; fewer layers save little memory and cost quality', ('QLoRA', 'LoRA Without Regret')),
    ('use_rslora', 'Adapter', 'true from about r=64 on', ('rsLoRA',)),
    ('learning_rate', 'Optimisation', 'adapters 1e-4 to 5e-4, full fine-tuning 1e-6 to 5e-5, less for larger models; halve it if the loss jumps, double it if it hardly moves', ('LoRA Without Regret', 'QLoRA', 'Tulu 3')),
    ('lr_scheduler_type', 'Optimisation', 'cosine and linear end low, which suits a run of known length; constant if you mean to go on later', ('SGDR', 'Tulu 3')),
    ('warmup_steps', 'Optimisation', '0.03 to 0.1 as a share; more if the loss jumps in the first steps', ('Accurate, Large Minibatch SGD', 'Tulu 3')),
    ('per_device_train_batch_size', 'Optimisation', 'as large as fits; what counts for learning is this times gradient_accumulation_steps, 8 to 64 for adapters', ('LoRA Without Regret', 'Small Batch Size Training')),
    ('gradient_accumulation_steps', 'Optimisation', 'the same effective batch with less memory; the loss is weighted by tokens, so 1 x 4 equals 4 x 1', ('Gradient accumulation fix', 'Small Batch Size Training')),
    ('num_train_epochs', 'Optimisation', '1 to 3; more only with early stopping, and judged by answers rather than by the validation loss', ('InstructGPT', 'Scaling Data-Constrained Language Models', 'Tulu 3')),
    ('optim', 'Optimisation', 'adamw_8bit or paged_adamw_8bit in full fine-tuning on a GPU that is short of memory; an adapter has few states to save', ('8-bit Optimizers', 'bitsandbytes, optimizers')),
    ('weight_decay', 'Optimisation', '0 for adapters; 0.01 to 0.1 in long full fine-tuning', ('AdamW',)),
    ('max_length', 'Data', 'the length of your longest row, which stage 1 tells; it decides the memory of packed rows and of rows not counted yet', ('TRL, memory', 'Fewer Truncations')),
    ('packing', 'Data', 'true when rows are much shorter than max_length and there are many; it makes fewer, fuller steps', ('Packing with FlashAttention 2', 'Fewer Truncations')),
    ('activation_checkpointing', 'Memory', 'false if the plan has room for the activations: saves the second forward pass, a quarter to a third of the computing', ('Activation checkpointing',)),
    ('dtype', 'Memory', 'leave it: bfloat16 where the device has it, float16 on a T4, float32 weights in full fine-tuning', ('Mixed Precision Training', 'Revisiting BFloat16 Training')),
    ('seed', 'Repeatability', 'train twice with two seeds before you believe a small difference', ('Fine-Tuning Pretrained Language Models', 'Adding Error Bars to Evals')),
]
intro = '''---
title: Choosing parameters
page-layout: full
toc: false
---

Change few things, one at a time, and let the held-out rows decide: `ftnb run my.yaml -p learning_rate=1e-4` keeps the run and makes a second one, `ftnb diff my my-2` says what it did. The defaults are a sound first run on 500 to 50,000 rows.

Order in which it pays: data (read the proof), learning rate, epochs, rank. Whether it fits is not a matter of taste: `ftnb plan` counts it.

Written by `python tools/choosing.py` from the help texts of `ftnb.fields` and the rules of `ftnb.advice`. The recipe panel says the same sentences beside the fields.
'''

def link(s): return f'[{s}]({sources[s]})'
def cell(s): return s.replace('|', '\\|')
def plain(says): return re.sub(r'\{[^}]*\}', 'N', says)

def page():
    "The text of the page"
    d, h, out = defaults(), help_of(), [intro]
    d['learning_rate'] = '2e-4 for adapters, 2e-5 for full; 5e-5 and 1e-6 with preferences'
    for g in dict.fromkeys(p[1] for p in parameters):
        out.append(f'## {g}\n\n| parameter | default | what it is | when to change it | source |\n|---|---|---|---|---|')
        out[-1] += ''.join(f'\n| `{f}` | {cell(show_value(d[f]))} | {cell(h[f])} | {cell(when)} | {", ".join(map(link, ss))} |' for f,k,when,ss in parameters if k==g)+'\n'
    out.append('## When ftnb speaks up\n\nA valid recipe runs as it is written. `ftnb.advice.advice(recipe)` and the panel say what is unusual; N stands for your numbers.\n\n| field | when | what is said | | source |\n|---|---|---|---|---|')
    out[-1] += ''.join(f'\n| `{o.field}` | {cell(o.told)} | {cell(plain(o.says))} | {o.kind} | {link(o.source)} |' for o in rules)+'\n'
    return '\n'.join(out)

def main():
    (root/'guides').mkdir(exist_ok=True)
    (root/'guides/choosing.qmd').write_text(page())

if __name__=='__main__': main()
