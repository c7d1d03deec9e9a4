"""Pipeline overhead: `ftnb run` (five notebooks, each in its own kernel) against one script doing the same work.

The script uses stock TRL, PEFT and transformers with the same settings in one process: tokenise, train, generate with base
and tuned on the same rows, score, merge, save. It neither checks data, nor plans, nor verifies the export, nor keeps a record.

    python bench/overhead.py [--runs 3] [--steps 60] [--out bench/results/overhead.json]
"""
import argparse, json, os, shutil, statistics, subprocess, sys, tempfile, time
os.environ.setdefault('HF_HUB_OFFLINE', '1')

SCRIPT = '''
import json, sys, torch, sacrebleu
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
model_path, data, out, steps, rows = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
tok = AutoTokenizer.from_pretrained(model_path)
read = lambda s: [json.loads(l)['messages'] for l in open(f'{data}/{s}.jsonl')]
def enc(ms):
    full = tok.apply_chat_template(ms, tokenize=True, return_dict=False)
    n = len(tok.apply_chat_template(ms[:-1], tokenize=True, add_generation_prompt=True, return_dict=False))
    return dict(input_ids=full, labels=[-100]*n+full[n:])
train, valid, test = ([enc(m) for m in read(s)] for s in ('train', 'valid', 'test'))
bf16 = any(f in open('/proc/cpuinfo').read() for f in ('avx512_bf16', 'amx_bf16'))
dtype = torch.bfloat16 if bf16 else torch.float32
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
args = SFTConfig(output_dir=out+'/ck', per_device_train_batch_size=4, max_steps=steps, learning_rate=1e-3, lr_scheduler_type='cosine', warmup_steps=.05, report_to='none', use_cpu=True,
    bf16=bf16, gradient_checkpointing=False, save_steps=50, disable_tqdm=True, eval_strategy='epoch')
t = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(train), eval_dataset=Dataset.from_list(valid), processing_class=tok,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules='all-linear', task_type='CAUSAL_LM'))
t.train(); t.save_model(out+'/adapter')
m = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype), out+'/adapter').eval()
tok.padding_side = 'left'
ask = sorted(read('test')[:rows], key=lambda ms: len(ms[1]['content']))
def answer():
    res = []
    for i in range(0, len(ask), 96):
        b = tok([tok.apply_chat_template(x[:-1], tokenize=False, add_generation_prompt=True) for x in ask[i:i+96]], return_tensors='pt', padding=True, add_special_tokens=False)
        with torch.inference_mode(): res += tok.batch_decode(m.generate(**b, max_new_tokens=92, do_sample=False)[:, b['input_ids'].shape[1]:], skip_special_tokens=True)
    return res
tuned = answer()
with m.disable_adapter(): base = answer()
refs = [x[-1]['content'] for x in ask]
print([sacrebleu.corpus_bleu(p, [refs]).score for p in (base, tuned)])
PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32), out+'/adapter').merge_and_unload().to(dtype).save_pretrained(out+'/merged')
tok.save_pretrained(out+'/merged')
'''

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--runs', type=int, default=3); p.add_argument('--steps', type=int, default=60); p.add_argument('--rows', type=int, default=24); p.add_argument('--out', default='bench/results/overhead.json')
    a = p.parse_args()
    from ftnb.base import shipped
    from ftnb.models import model_path
    from ftnb.runs import hardware, versions
    path, data, got = model_path('smollm2-135m'), str(shipped('data', 'demo')), dict(script=[], ftnb=[])
    for _ in range(a.runs):
        for name in ('script', 'ftnb'):
            with tempfile.TemporaryDirectory() as d:
                cmd = [sys.executable, '-c', SCRIPT, path, data, d, str(a.steps), str(a.rows)] if name=='script' else [sys.executable, '-c', 'from ftnb.cli import main; main()', 'run', 'demo', '-p', f'max_steps={a.steps}', '-p', f'max_eval_samples={a.rows}', '-p', 'use_cpu=true']
                t = time.perf_counter()
                q = subprocess.run(cmd, cwd=d, capture_output=True, text=True)
                if q.returncode: sys.exit(q.stderr[-3000:])
                got[name].append(round(time.perf_counter()-t, 1))
                print(name, got[name][-1], flush=True)
    med = {k: statistics.median(v) for k,v in got.items()}
    res = dict(ratio=round(med['ftnb']/med['script'], 3), seconds=got, steps=a.steps, rows=a.rows, versions=versions(), hardware={k:v for k,v in hardware().items() if k in ('cpu', 'cores', 'gpus')}, command=' '.join(['python', *sys.argv]))
    os.makedirs(os.path.dirname(a.out) or '.', exist_ok=True)
    json.dump(res, open(a.out, 'w'), indent=1)
    print('ratio', res['ratio'])

if __name__=='__main__': main()
