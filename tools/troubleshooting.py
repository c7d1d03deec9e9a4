"Write guides/troubleshooting.qmd: error texts as they are printed, what each means and what to do. tests/test_path.py holds every text against the source it comes from."
import ast, re
from pathlib import Path

root = Path(__file__).parent.parent
# group -> (text with {} where a value stands, what it means, what to do)
entries = {
'Recipe and command line': [
    ("There is no recipe {path}. `ftnb new {name} --dataset my.jsonl` writes one.", 'The file is not in this folder.', 'Change into its folder, or write one with `ftnb new my.yaml --dataset my.jsonl`.'),
    ("There is no recipe and no run {arg}.", 'The word is neither a file nor the name of a run in the runs folder.', '`ftnb ls` shows recipes and runs. A recipe ends in `.yaml`.'),
    ("unknown key {k}.", 'A recipe has no such field. The nearest name stands behind it.', 'Correct the spelling; `ftnb new` writes every key with its meaning. A misspelt key never passes in silence.'),
    ("{field}: {value} is not {kinds}.", 'The value has another type than the field, such as a word where a number belongs.', 'Write `2e-4` or `0.0002` for numbers, `true` or `false`, `[a, b]` for lists.'),
    ("{k}: {v} is not one of {choices}.", 'The field knows only these words.', 'Take one of those that are listed.'),
    ("not valid YAML: {problem}.", 'The file can not be read as YAML; line and column are named.', 'Mostly a missing space after a colon, a tab, or a quote that is not closed.'),
    ("{path}, line {n}: {key} stands twice, first in line {m}.", 'Two lines set the same key, and YAML would keep the last in silence.', 'Remove one.'),
    ("{a}: {x} and {b}: {y} both set {field}; keep one of them.", 'Two names of the same thing, such as `lr` and `learning_rate`, with different values.', 'Keep one.'),
    ("{k} is no recipe field: {why}.", 'The key belongs to an older version or to another tool, and its successor is named.', 'Use the successor.'),
    ("-p {p}: write it as name=value.", 'An override on the command line has no `=`.', '`-p lora_r=32`; lists and mappings in quotes: `-p \'mapping={prompt: q, completion: a}\'`.'),
    ("--from {first} comes after --to {last}.", 'The stages are asked for backwards.', 'Order: prepare, plan, train, evaluate, export.'),
    ("There is no run {name} in {runs}.", 'No folder of that name lies in the runs folder.', '`ftnb ls`; the folder is set by `runs` in `settings.ini`.'),
    ("load_in_{n}bit with peft: full can not train", 'Weights of 4 bits have no gradient.', 'Set `peft: qlora`, or leave `load_in_4bit` out.'),
    ("bf16 and fp16 exclude each other; keep one", 'A run computes in one of them.', 'bf16 on Ampere and later, fp16 on a T4; leave both out and the device decides.'),
    ("eval_strategy: steps needs eval_steps", 'It is not said how often.', 'Add `eval_steps: 50`.'),
    ("{path} is not a valid settings file: {why}", '`settings.ini` can not be read.', 'It needs a section `[ftnb]` and `key = value` lines.'),
    ("loss_type: {l} is no loss of method: {m}, which has {names}", 'The variant belongs to another method.', 'Take one of those that are listed, or set `method`.'),
    ("{k}: {v} has no effect with method: {m}; leave it out, or set method: {other}", 'A field of one loss stands beside another.', 'Leave it out, or set the `method` that is named.'),
    ("load_in_{n}bit: {title} can not stand on a base in {m} bits", 'The method needs the weights themselves.', 'A whole base, or `peft: qlora`.'),
    ("packing: true does not go with peft: {peft}", 'Virtual tokens belong to one row.', 'Leave `packing` out.'),
    ("export_formats: {title} can not become part of the weights, which {format} needs; set export_formats: [adapter]", 'There is nothing to merge.', 'Ship the adapter beside the base.'),
    ("{path} is there already; choose another name, or --force to write over it.", '`ftnb new` does not write over a recipe.', 'Another name, or `--force`.'),
],
'Data': [
    ("There is no file {dataset} (looked from {folder}).", 'The path is not right from where the command runs.', 'Give a path from the folder that is named, or an absolute one.'),
    ("There is no dataset: set dataset to a file, a folder, a hub id, or demo.", 'The recipe has no `dataset`.', '`dataset: my.jsonl`.'),
    ("can not tell question from answer in the columns {cols}; say which is which, such as {mapping}.", 'The columns have names that are not known.', 'Set `mapping`, as the message shows it.'),
    ("mapping: {where} has no column {col}; it has {columns}.", 'A column in `mapping` is not in the file.', 'Take one of those that are listed.'),
    ("holds {what}, which method: sft does not train on;", 'The rows are preference pairs or labelled answers.', 'To train on preferences, set the method that the message names; to train on the good answers only, its mapping.'),
    ("{path} is empty: it holds no row; check the file.", 'The file has no row.', 'Check how it was written.'),
    ("no row can be read; line {n}: {fault}; write one JSON object per line.", 'A `.jsonl` file holds something else, often one large JSON list.', 'Name it `.json`, or write one object a line.'),
    ("not UTF-8 at byte {n} of the line; save it as UTF-8.", 'The file has another encoding, mostly Latin-1 or UTF-16.', '`iconv -f latin1 -t utf-8 my.csv > my8.csv`.'),
    ("the column {name} stands twice in the header; rename one.", 'A CSV has two columns of one name.', 'Rename one.'),
    ("No row is left to train on: {n} were read, {m} set aside", 'Every row was refused; the most frequent reason is named.', 'Look into `data/set_aside.jsonl` of the run: line and reason of each.'),
    ("files of type {ending} are not read; known are {suffixes}.", 'The ending is not known.', 'Convert to JSON, JSONL, CSV or Parquet.'),
    ("valid_size: {a} and test_size: {b} take all {n} rows and leave none to train on; make them smaller.", 'There are fewer rows than the split wants.', 'Smaller numbers, or shares below 1.'),
    ("There is no file {path}, and the hub can not be reached for a data set of that name;", 'Neither a file nor reachable as a data set of the hub.', 'Check the path; else the network, and that `HF_HUB_OFFLINE` is not set.'),
],
'Gates of stage 1': [
    ("rows are longer than max_length: {n}, the longest {place}, and would lose {tokens} trained tokens and {ends} ends of turn", 'Gate `nothing_cut`: answers would be cut and lose the token that says stop.', 'Set `max_length` to the number that is named; or `excess_length_strategy: drop`; or accept it with a reason.'),
    ("have an answer without a trained token", 'Gate `answers_trained`: the template does not show which text is the answer.', 'Another `chat_template_path`.'),
    ("train on the question", 'Gate `prompt_masked`: tokens of the question carry a label.', 'Set `assistant_only_loss: true`, or another `chat_template_path`.'),
    ("have an answer that closes with no trained end-of-turn token", 'Gate `end_of_turn_trained`: a model trained so never learns to stop.', 'Another `chat_template_path`.'),
    ("as the end of turn, but the generation config of {model} stops at {ids}, so a server that reads it never stops;", 'Gate `stops_at_serving`: template and generation config disagree.', 'Add the token to `eos_token_id` in the `generation_config.json` of the model folder, or accept it if you serve the merged export.'),
    ("rows of {file} would train questions as prose: {offer}", 'Gate `roles_known`: text with markers such as `### Human:` was found.', "`-p 'mapping={messages: text}'` makes conversations of it."),
    ("rows train an empty <think></think> that the template writes", 'Gate `think_handled`: the template of a reasoning model adds an empty thought.', '`think: ignore_empty` or `think: strip`.'),
    ("rows lose thoughts of earlier turns, which the template leaves out", 'Gate `think_handled`.', '`think: strip`, or cut conversations after each thought.'),
    ("rows would see each other when packed (logits differ by {x} on this architecture); set packing: false", 'Gate `packing_clean`: the attention of this model mixes packed rows.', '`packing: false`.'),
    ("to go on all the same: --accept {gate}=REASON.", 'A gate stopped the run. The proof shows the rows.', 'Mend the cause, or `--accept GATE="why"`; see [accept a gate](accept.qmd).'),
    ("accept: {gate} has no reason; write why it may fail", 'Accepting needs a reason, which is kept in the manifest.', '`--accept nothing_cut="the long rows are noise"`.'),
    ("gate template_same: the chat template of {model} ({a}) is not the one that {run} was prepared with ({b});", 'The model was updated, or another template was set, after stage 1.', '`ftnb run my --from prepare --force`, or set the old template.'),
],
'Model, tokenizer and template': [
    ("There is no model {name}: it is no folder, no hub id (owner/name) and no known short name.", 'The name is misspelt, or the folder lies elsewhere.', '`owner/name`, an absolute path, or a short name; `ftnb doctor MODEL` checks access.'),
    ("{name} is gated: accept its licence at https://huggingface.co/{name} and set HF_TOKEN in the environment or in .env.", 'The authors want you to agree first.', 'Open the page, agree, make a token that may read, put `HF_TOKEN=...` into `.env`. `ftnb doctor MODEL` says whether it works.'),
    ("There is no model {name} on the hub, or it is private; check the spelling, or set HF_TOKEN.", 'The hub answers 404 for both.', 'Check the spelling; for a private one set `HF_TOKEN`.'),
    ("{name} is not in the local cache and the hub can not be reached", 'No network, or offline mode is set.', 'Unset `HF_HUB_OFFLINE`, or give a folder.'),
    ("{path} holds an adapter, not a model: set model_name_or_path to its base, {base}.", 'An adapter was given where the base belongs.', 'Set the base; to train on from an adapter, merge it first.'),
    ("{path} is not a model folder: it has no config.json", 'The folder holds something else.', 'Give the folder that holds `config.json` and the weights.'),
    ("{model} brings Python code of its own; read it, then set trust_remote_code: true.", 'The model needs code that is not in transformers.', 'Read it, pin it with `model_revision`, then allow it.'),
    ("{model} has no weights in safetensors format, and other formats can run code on loading; convert it first.", 'Only pickled weights are there.', 'Convert in a throw-away environment: load with transformers, `save_pretrained`.'),
    ("{model} has no chat template (a base model): set chat_template_path, of {names} its vocabulary fits {fit}.", 'A base model has no format for conversations.', 'Set one that fits its vocabulary, or train on prompt and completion.'),
    ("{model} holds no tokenizer (no tokenizer.json): copy the one of its base model into the folder.", 'A checkpoint folder without tokenizer.', 'Copy `tokenizer.json` and `tokenizer_config.json` of the base.'),
    ("lora_target_modules: {name} is no layer of {model}.", 'Layers have other names in this model.', 'Take the listed ones, or `all-linear`.'),
    ("lora_r: {r} is over the width of {layer}, {n}: the update would be larger than the layer.", 'The rank is larger than the layer.', 'A smaller `lora_r`.'),
],
'Memory, device and training': [
    ("needs {band}, and {device} has {room};", 'The plan stops before anything is loaded.', 'Take one of the ways it names; see [a small GPU](small_gpu.qmd).'),
    ("gpu: {name} is not in the table of devices.", 'The GPU has another name here.', 'Take one of the list, or a size such as `24GB`.'),
    ("bf16: true, but {device} ({kind}) does not compute bfloat16;", 'GPUs before Ampere, such as the T4, do not.', 'Leave `bf16` out: fp16 is taken.'),
    ("fp16: true, but training in float16 needs a GPU and this is {device} ({kind}); leave fp16 out.", 'A CPU computes in bfloat16 or float32.', 'Leave it out.'),
    ("attn_implementation: {name} is not installed; set sdpa.", 'flash-attn is not there.', '`attn_implementation: sdpa`; packing is safe with it.'),
    ("attn_implementation: {name} needs an NVIDIA GPU and this is {device} ({kind}); set sdpa.", 'FlashAttention has no CPU kernel.', '`sdpa`.'),
    ("The loss of step {n} is {x}: {cause}.", 'The loss is not a number; the likely cause is named.', 'bf16 instead of fp16, a tenth of the learning rate, or `max_grad_norm: 1.0`.'),
    ("{run} has no prepared data; run stage 1 first: ftnb run {run} --to prepare.", 'A stage was started without the one before it.', 'Run stage 1 of the same run.'),
    ("resume_from_checkpoint: {path} is not a checkpoint (no trainer_state.json).", 'The folder is no checkpoint, or was saved half.', '`true` takes the last whole one.'),
    ("early_stopping_patience needs validation rows and the data has none; set valid_size above 0.", 'There is nothing to validate on.', '`valid_size: 0.05`.'),
    ("The run needs {n} of disk and {folder} has {m} free;", 'Checkpoints and merged weights need more than is free.', '`output_dir` on another disk, `save_total_limit: 1`, `export_formats: [adapter]`.'),
    ("The disk is full: {path} could not be written ({n} free).", 'It filled up during the run.', 'Free some; the same command goes on from the last checkpoint.'),
],
'Evaluation and export': [
    ("{run} has no held-out rows; set test_size above 0 and prepare again.", 'Nothing was kept back, so nothing can be shown.', '`test_size: 0.05`.'),
    ("The export of {run} does not answer as the trained model:", 'The files on disk give other answers than the model as it was trained.', 'Export again if files were changed; leave `merge_dtype: auto`.'),
    ("Export merges and checks in float32, which takes {n} for {m} weights, and {free};", 'This model can only be merged as a whole, and that needs more memory than is free; the end of the message says why: its checkpoint is quantised, its experts have adapters, or its method needs the base to be loaded.', 'Copy the run folder to a machine with more RAM and run `ftnb run NAME --from export` there, or set `export_formats: [adapter]`.'),
    ("Export holds the trained model in 16 bits at least, which takes {n} for {m} weights, and {free};", 'The merge goes shard by shard, but the trained model has to answer once, so that the files can be held against it.', 'Close other programs, or export on a machine with more memory.'),
    ("The process that loads the exported model was killed, most likely for want of memory;", 'The fresh process that checks the export ran out of RAM.', 'Close other programs, or export on a larger machine.'),
    ("The exported folder can not be loaded with plain transformers and peft:", 'A fresh process could not load the export. Often the base model is a folder given by a relative path.', 'Give `model_name_or_path` as an absolute path or a hub id, and export again.'),
    ("full fine-tuning has no adapter; set export_formats: [merged]", 'There is only a whole model.', '`export_formats: [merged]`.'),
],
}
# group -> (text, where it is printed: a file of a package or a program, what it means, what to do)
stack = [
    ('CUDA out of memory', 'PyTorch', 'The GPU is full. ftnb says which phase grew and what the plan had forecast.', 'Halve `per_device_train_batch_size` and double `gradient_accumulation_steps`; `peft: qlora`; or `on_oom: retry`. See [a small GPU](small_gpu.qmd).'),
    ('Attempting to unscale FP16 gradients.', 'torch/amp/grad_scaler.py', 'Trained weights are in float16, and the loss scaler needs them in float32.', 'Leave `dtype` at auto; in your own script load with `dtype=torch.float32`, or cast what is trained ([PEFT](https://huggingface.co/docs/peft/developer_guides/troubleshooting)).'),
    ('Found an incompatible version of torchao.', 'peft/import_utils.py', 'PEFT looks at torchao whenever an adapter is made, and an old one stops it. Colab ships 0.10.', '`pip install -U "torchao>=0.16"`, or `pip uninstall torchao`; then restart the kernel.'),
    ("Your setup doesn't support bf16/gpu.", 'transformers/training_args.py', 'bf16 is on and there is no GPU that has it, or the CPU was not asked for.', 'In ftnb leave `bf16` out; in a plain script pass `use_cpu=True`, or `bf16=False`.'),
    ('Passed unknown parameter:', 'papermill/execute.py', 'papermill only warns of a name that the parameters cell lacks. ftnb checks all: a field of another stage is allowed, a name that is no field stops the notebook.', 'Nothing, if the notebook goes on.'),
    ("Input notebook does not contain a cell with tag 'parameters'", 'papermill/parameterize.py', 'The tag was lost, mostly by an editor or a cleaner; values are put at the top and then overwritten.', 'Give the cell with the parameters the tag `parameters` again (in JupyterLab: property inspector), or take the notebook that ships with ftnb.'),
    ('Kernel died', 'nbclient/client.py', 'The process of the notebook was killed, mostly for want of RAM (papermill then exits with 138, ftnb with 137) or by a missing processor instruction.', '`ftnb plan` tells the RAM of each stage; `dmesg` says whether the kernel killed it. A smaller batch, or another machine. A crash in a library looks the same: `ftnb doctor` shows which version differs from the lock. In such a notebook every cell claims to be completed; those without an execution number never ran.'),
    ('Cannot access gated repo for url', 'huggingface_hub/utils/_http.py', '401: no token or a wrong one. 403: the token is fine, but the licence was not accepted.', 'Accept at the page of the model, `HF_TOKEN` in `.env`; `ftnb doctor MODEL`.'),
    ('Repository Not Found for url', 'huggingface_hub/utils/_http.py', 'The name is wrong, or it is private and no token is set.', 'Check the spelling; `HF_TOKEN`.'),
    ('Cannot use chat template functions because tokenizer.chat_template is not set', 'transformers/tokenization_utils_base.py', 'A base model has no chat template.', '`chat_template_path: chatml` (or another that fits), in training and in serving.'),
    ('Some modules are dispatched on the CPU or the disk.', 'transformers/quantizers/quantizer_bnb_4bit.py', 'A quantised model does not fit on the GPU as a whole.', 'A smaller model or a larger GPU: the plan says which. Other programs on the GPU? `nvidia-smi`.'),
    ("Attempted to use bitsandbytes native library functionality but it's not available.", 'bitsandbytes/cextension.py', 'bitsandbytes has no binary for this CUDA version.', '`python -m bitsandbytes` says what it looks for; install the torch that `constraints.txt` names.'),
    ('The installed version of bitsandbytes was compiled without GPU support', 'bitsandbytes, versions before 0.45', 'An old or a CPU build.', '`pip install -U bitsandbytes`.'),
    ("but you didn't pass an `eval_dataset` to `Trainer`", 'transformers/trainer.py', 'Validation is asked for and there are no validation rows.', 'In ftnb `valid_size: 0.05`; in a plain script `eval_strategy="no"`.'),
    ("Can't load the configuration of", 'transformers', 'No `config.json` under this name.', 'Check the spelling; a local folder as an absolute path.'),
    ('element 0 of tensors does not require grad and does not have a grad_fn', 'PyTorch', 'Nothing is trainable, or activation checkpointing cuts the graph.', 'In a plain script `model.enable_input_require_grads()`; ftnb does it.'),
    ('Expected all tensors to be on the same device', 'PyTorch', 'Inputs lie on another device than the model.', '`inputs.to(model.device)`.'),
    ('Torch not compiled with CUDA enabled', 'torch/cuda/__init__.py', 'The CPU build of torch is installed.', 'Install the CUDA build: `pip install torch --index-url https://download.pytorch.org/whl/cu128`; `ftnb doctor` shows the device.'),
    ('NVIDIA driver on your system is too old', 'torch', 'torch was built for a newer CUDA than the driver knows.', 'Update the driver, or take a torch for an older CUDA.'),
    ('No space left on device', 'the system', 'A disk or the shared memory is full. The hub cache is often the cause.', '`hf cache ls`, `HF_HOME` on another disk; the run goes on from its last checkpoint.'),
    ('We couldn\'t connect to \'https://huggingface.co\' to load the files', 'transformers', 'No network, or a folder that is not where the path says and is taken for a hub id.', 'An absolute path; else the network and `HF_HUB_OFFLINE`.'),
]
intro = '''---
title: Troubleshooting
---

Search this page (Ctrl-F) for a piece of the message without its numbers and names: values that change are written `{...}`. Messages of ftnb name the value, the place and the way out; here stands what is behind them. `ftnb doctor` looks at packages, device, memory, disk and access in one go; `--debug` shows the traceback.

Exit codes of `ftnb`: 0 done, 2 wrong input, 3 a stage refused, 130 stopped by Ctrl-C, 137 killed for memory, 1 any other failure.
'''

def code(text):
    "A message as code, values as {...}"
    t = re.sub(r'\{[^}]*\}', '{...}', text)
    return f'`` {t} ``' if '`' in t else f'`{t}`'
def block(text, means, do): return f'**{code(text)}**\n\n{means} *Do:* {do}\n'

def page():
    "The text of the page"
    out = [intro]
    for g,rows in entries.items(): out += [f'## {g}\n', *(block(*r) for r in rows)]
    out += ['## Messages of the libraries below\n', *(block(t, f'({w.split("/")[0]}) {m}', d) for t,w,m,d in stack)]
    out.append('## Nothing of this\n\n`ftnb doctor --json` and the run folder without `data/` are what a report needs: `manifest.json` holds versions and hardware, `events.jsonl` what happened. Look through them before you send them; see [tokens and private data](private.qmd).\n')
    return '\n'.join(out)

def pattern(text):
    "The entry as an expression: each {} stands for anything"
    return re.compile('.*?'.join(re.escape(p) for p in re.split(r'\{[^}]*\}', text) if p.strip()), re.S)

def flat(node):
    "A string expression as text, U+FFFF where a value stands; None if it is none"
    if isinstance(node, ast.Constant): return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr): return ''.join(v.value if isinstance(v, ast.Constant) else '\uffff' for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        a, b = flat(node.left), flat(node.right)
        return None if a is None and b is None else (a or '\uffff')+(b or '\uffff')
    if isinstance(node, ast.BoolOp): return '\uffff'
    if isinstance(node, ast.IfExp): return '\uffff'

def texts():
    "Every text that stands in ftnb's source"
    out = set()
    for p in (root/'ftnb').glob('*.py'):
        for n in ast.walk(ast.parse(p.read_text())):
            if (s := flat(n)) and len(s)>8: out.add(s)
    return out

def main(): (root/'guides/troubleshooting.qmd').write_text(page())

if __name__=='__main__': main()
