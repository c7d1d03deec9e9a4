"""Stage 1 at 10,000, 100,000 and 1,000,000 rows: read, check, de-duplicate, scan, tokenise, prove.

Rows are questions and answers recombined by a seed from the sentences of real files, 2 % of them copies, so that the size can
grow while rows stay different. Each size runs in a process of its own, which tells its peak memory and where the time went.

    python bench/prepare.py --data gsm8k_train_messages.jsonl --rows 10000 100000 [--out bench/results/prepare.json]
"""
import argparse, json, os, random, resource, subprocess, sys, tempfile, time
os.environ.setdefault('HF_HUB_OFFLINE', '1')

def sentences(path):
    "(questions, answers) of a file, cut into sentences"
    qs, ans = [], []
    for l in open(path, encoding='utf-8'):
        r = json.loads(l)
        ms = r.get('messages') or [dict(content=r['instruction']), dict(content=r['output'])]
        qs += [s.strip() for s in ms[-2]['content'].split('. ') if s.strip()]
        ans += [s.strip() for s in ms[-1]['content'].split('\n') if s.strip()]
    return qs, ans

def make(path, data, n, seed=0):
    "Write `n` rows to `path`"
    rng, (qs, ans), last = random.Random(seed), sentences(data), None
    with open(path, 'w', encoding='utf-8') as f:
        for i in range(n):
            if last is None or rng.random()>=.02: last = json.dumps(dict(messages=[dict(role='user', content='. '.join(rng.choice(qs) for _ in range(3))+'?'), dict(role='assistant', content='\n'.join(rng.choice(ans) for _ in range(3)))]))
            f.write(last+'\n')

def one(n, data):
    "Stage 1 on `n` rows in this process"
    from ftnb import intake, prepare
    from ftnb.recipe import make_recipe
    from ftnb.runs import Run
    spent = {}
    def timed(mod, name, key):
        f = getattr(mod, name)
        def g(*a, **k):
            t = time.perf_counter()
            try: return f(*a, **k)
            finally: spent[key] = spent.get(key, 0)+time.perf_counter()-t
        setattr(mod, name, g)
    timed(intake, 'policy', 'private data and secrets')
    timed(prepare, 'take_in', 'read, normalise and scan'); timed(prepare, 'sift', 'split, duplicates and leaks'); timed(prepare, 'encode', 'tokenise'); timed(prepare, 'inspect_row', 'inspect for the gates')
    with tempfile.TemporaryDirectory() as d:
        make(f'{d}/rows.jsonl', data, n)
        from ftnb.tokenizer import load_tokenizer
        r = make_recipe(dict(dataset=f'{d}/rows.jsonl', max_length=2048))
        load_tokenizer(r)
        before, t = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        done = prepare.prepare(Run(f'{d}/run', r))
        s = time.perf_counter()-t
        rep = done.report
        return dict(rows=n, seconds=round(s, 1), rows_per_second=round(n/s), peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024, before_mb=before//1024, file_mb=os.path.getsize(f'{d}/rows.jsonl')>>20,
            share={k: round(v/s, 3) for k,v in spent.items()}, train=rep['splits']['train'], set_aside=rep['aside'])

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--data', required=True); p.add_argument('--rows', type=int, nargs='+', default=[10_000, 100_000]); p.add_argument('--out', default='bench/results/prepare.json'); p.add_argument('--one', type=int)
    a = p.parse_args()
    if a.one: return print(json.dumps(one(a.one, a.data)))
    from ftnb.runs import hardware, versions
    got = []
    for n in a.rows:
        q = subprocess.run([sys.executable, __file__, '--data', a.data, '--one', str(n)], capture_output=True, text=True)
        if q.returncode: sys.exit(q.stderr[-3000:])
        got.append(json.loads(q.stdout.strip().splitlines()[-1]))
        print(got[-1], flush=True)
        os.makedirs(os.path.dirname(a.out) or '.', exist_ok=True)
        json.dump(dict(runs=got, data=os.path.basename(a.data), versions=versions(), hardware={k:v for k,v in hardware().items() if k in ('cpu', 'cores')}, command='python bench/prepare.py --data '+os.path.basename(a.data)+' --rows '+' '.join(map(str, a.rows))), open(a.out, 'w'), indent=1)

if __name__=='__main__': main()
