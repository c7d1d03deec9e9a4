"""Exported files behind their server: time to the first token, tokens per second and memory at 1, 4 and 16 clients,
with threads, batch and context changed one at a time, beside what the certificate says of each file.

    python bench/serve.py RUN [--formats q8_0,q4_k_m] [--clients 1,4,16] [--repeats 3] [--out bench/results/serve.json]

RUN is the name or the folder of a run that was exported with GGUF files:

    ftnb export demo --formats adapter,merged,f16,q8_0,q4_k_m
"""
import argparse, os, sys
os.environ.setdefault('HF_HUB_OFFLINE', '1')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ints = lambda s: [int(x) for x in s.split(',') if x]
    p.add_argument('run'); p.add_argument('--formats', default=None); p.add_argument('--clients', type=ints, default=[1, 4, 16]); p.add_argument('--threads', type=ints, default=None)
    p.add_argument('--n-batch', type=ints, default=[64, 512]); p.add_argument('--context', type=ints, default=[1024, 4096]); p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--prompts', type=int, default=8); p.add_argument('--max-tokens', type=int, default=64); p.add_argument('--n-parallel', type=int, default=4); p.add_argument('--n-threads', type=int, default=None); p.add_argument('--out', default='bench/results/serve.json')
    a = p.parse_args()
    from ftnb.base import write_json
    from ftnb.bench_serve import bench_serve, cores
    from ftnb.runs import Run, run_folder, versions
    b = bench_serve(Run(run_folder(a.run)), a.formats and a.formats.split(','), a.clients, a.threads or sorted({1, cores()}), a.n_batch, a.context, a.repeats, a.prompts, a.max_tokens, lambda l: print(l, flush=True), n_parallel=a.n_parallel, n_threads=a.n_threads)
    print(b)
    write_json(a.out, dict(command=' '.join(['python', 'bench/serve.py', *sys.argv[1:]]), versions=versions(), **b.report))

if __name__=='__main__': main()
