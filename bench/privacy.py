"""Secrets and private data in real files: rows per second on one core, and what is flagged, to be judged by hand.

    python bench/privacy.py FILE.jsonl ... [--rows 100000] [--sample 100] [--slow] [--planted tests/test_privacy.py] [--judged TEXT] [--out bench/results/privacy.json]

Speed: rows are read, brought to normal form, repeated up to --rows, and scanned with `scan_record` after one pass to
warm up; the scan alone is timed. With --slow it is also done without the pre-filters, and the findings must be equal.
--planted counts the test file's planted values that are found whole, and its near-misses that are flagged.
--judged is what reading the sample gave; it is kept beside the counts.
The sample (kind, words around it) goes to the terminal only: it holds private data, and no result file does.
"""
import argparse, importlib.util, json, random, time
from collections import Counter
from pathlib import Path
from ftnb.base import UserError, read_json, write_json
from ftnb.privacy import find, scan_record, texts
from ftnb.records import normalise, recognise

def records(path):
    "Rows of a JSON Lines file in normal form"
    with open(path, encoding='utf-8') as f: rows = [json.loads(l) for l in f if l.strip()]
    try: shape = recognise(rows[:200], str(path)).name
    except UserError: shape = recognise(rows[:200], str(path), 'dpo').name
    return [normalise(r, shape) for r in rows]

def context(text, f, n=45): return text[max(0, f.start-n):f.end+n].replace('\n', ' ')

def judge(path, rows, sample, seed=0):
    "Flagged rows by kind; prints a random sample of each kind"
    by_kind, flagged = {}, 0
    for i,r in enumerate(rows):
        fs = [(f, context(t, f)) for _,t in texts(r) for f in find(t)]
        flagged += bool(fs)
        for f,c in fs: by_kind.setdefault(f.kind, {}).setdefault(i, []).append(c)
    for kind,hits in by_kind.items():
        print(f'== {Path(path).name}: {kind}: {len(hits)} rows')
        for i in sorted(random.Random(seed).sample(sorted(hits), min(sample, len(hits)))): print(f'{i:6} {" | ".join(hits[i])}')
    return dict(rows=len(rows), flagged_rows=flagged, by_kind={k: len(v) for k,v in by_kind.items()})

def speed(rows, n):
    "Microseconds a row and rows a second, over `n` rows"
    for r in rows[:500]: scan_record(r)
    t, c = time.perf_counter(), time.process_time()
    for i in range(n): scan_record(rows[i%len(rows)])
    t, c = time.perf_counter()-t, time.process_time()-c
    return dict(timed_rows=n, microseconds_a_row=round(c/n*1e6, 1), rows_a_second=round(n/c), wall_seconds=round(t, 2), cpu_seconds=round(c, 2))

def same(rows):
    "Rows whose findings differ without the pre-filters"
    return sum(find(t)!=find(t, fast=False) for r in rows for _,t in texts(r))

def planted(path):
    "Recall on the planted values of a test file, and false alarms on its near-misses"
    spec = importlib.util.spec_from_file_location('planted', path)
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    def whole(kind, v, around):
        t = around.format(v)
        return any(f.kind==kind and f.start<=(a := t.index(v)) and a+len(v)<=f.end for f in find(t))
    missed = [k for k,v,around in m.PLANTED if not whole(k, v, around)]
    return dict(planted=len(m.PLANTED), kinds=len({k for k,_,_ in m.PLANTED}), missed=missed, near_misses=len(m.NEAR), flagged_wrongly=sum(bool(find(t)) for t in m.NEAR))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('files', nargs='+')
    p.add_argument('--rows', type=int, default=100_000)
    p.add_argument('--sample', type=int, default=100)
    p.add_argument('--slow', action='store_true')
    p.add_argument('--planted')
    p.add_argument('--judged')
    p.add_argument('--out')
    a = p.parse_args()
    got = {}
    for f in a.files:
        rows = records(f)
        got[Path(f).name] = judge(f, rows, a.sample)|dict(speed=speed(rows, a.rows), **(dict(texts_that_differ_without_filters=same(rows)) if a.slow else {}))
    if a.planted: got['planted'] = planted(a.planted)
    if a.judged: got['judged'] = a.judged
    print(json.dumps(got, indent=1))
    if a.out: write_json(a.out, {**(read_json(a.out) or {}), **got})

if __name__=='__main__': main()
