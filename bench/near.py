"""Near duplicates: speed, memory, and how many of the known ones are found.

Speed and memory: N questions recombined from the sentences of the demo (any data file with `--data`), 3 % of them edited
copies of an earlier row; each size in its own process, rows made one by one and not kept. Peak memory is that of the whole process.
Precision and recall: questions of the data with one edited copy of each, by kind of edit. A found pair counts as right if
it is known, or if its words really have the similarity asked for (counted by comparing every pair).

The quality report takes the same rows in as chat records (`describe`), near duplicates included.

    python bench/near.py [--rows 10000 100000 1000000] [--data FILE ...] [--out bench/results/near.json]
"""
import argparse, json, random, re, resource, subprocess, sys, time
from pathlib import Path
from ftnb.describe import Describe
from ftnb.near import NearDuplicates, head_sample, jaccard, join_pairs, near_pairs, shingles, terms
from ftnb.quality import question
from ftnb.records import normalise, shape_of
from ftnb.runs import hardware, versions

DEMO = [str(Path(__file__).parents[1]/'data/demo/train.jsonl')]
FILLERS = 'please now really today maybe again still also quite just'.split()

def questions(files):
    "The distinct questions of data files"
    rows = [json.loads(l) for f in files for l in open(f)]
    return list(dict.fromkeys(question(normalise(r, shape_of(r))) for r in rows if shape_of(r)))

def words_edited(t, rng, n):
    ws = t.split()
    for _ in range(n):
        i = rng.randrange(len(ws))
        kind = rng.choice(('replace', 'drop', 'insert'))
        if kind=='insert': ws.insert(i, rng.choice(FILLERS))
        elif kind=='drop' and len(ws)>3: del ws[i]
        else: ws[i] = rng.choice(FILLERS)
    return ' '.join(ws)

def clause_moved(t, rng):
    parts = re.split(r'(?<=[.!?,;])\s+', t)
    if len(parts)<2: return words_edited(t, rng, 1)
    return ' '.join([*parts[1:], parts[0]])

def number_changed(t, rng):
    if not re.search(r'\d', t): return words_edited(t, rng, 1)
    return re.sub(r'\d+', lambda m: str(int(m[0][:9])+rng.randint(1, 9)), t, count=1)

EDITS = {
    'one word': lambda t,r: words_edited(t, r, 1), 'two words': lambda t,r: words_edited(t, r, 2), 'three words': lambda t,r: words_edited(t, r, 3),
    'a clause moved': clause_moved, 'a number changed': number_changed,
    'punctuation': lambda t,r: re.sub(r'[.,!?;]', lambda m: r.choice(('', '...', ' -')), t)+' ', 'case': lambda t,r: r.choice((t.upper(), t.lower(), t.title())),
}

def known_set(qs, n, seed=0):
    "(texts, {pair: kind of edit}): `n` questions, an edited copy of each, and the rest of the questions"
    rng = random.Random(seed)
    qs = rng.sample(qs, len(qs))
    rows = [(q, i, None) for i,q in enumerate(qs)]
    for i in range(min(n, len(qs))):
        kind = list(EDITS)[i%len(EDITS)]
        rows.append((EDITS[kind](qs[i], rng), i, kind))
    rng.shuffle(rows)
    at = {}
    for p,(_,i,_k) in enumerate(rows): at.setdefault(i, []).append(p)
    return [t for t,_,_ in rows], {tuple(at[i]): next(k for p in at[i] if (k := rows[p][2])) for i in at if len(at[i])==2}

def quality(qs, n, threshold=.6, seed=0):
    "Precision and recall of `near_pairs` on known edits, and against all pairs compared one with another"
    texts, known = known_set(qs, n, seed)
    found = {(a,b): s for a,b,s in near_pairs(texts, threshold, seed)}
    group = {i:n for n,g in enumerate(join_pairs(found)) for i in g}
    hit = lambda p: p[0] in group and group[p[0]]==group.get(p[1])
    fit = NearDuplicates(threshold, seed).fit(head_sample(texts, seed=seed)[0])
    sets, sames = zip(*((set(shingles(ws := terms(t))), ' '.join(ws)) for t in texts))
    near = lambda a,b: min(jaccard(a, b), jaccard(a, b, fit.boilerplate))>=threshold
    enough = [len(s-fit.boilerplate)>=fit.fewest for s in sets]
    holders = {}
    for i,s in enumerate(sets):
        for h in s-fit.boilerplate: holders.setdefault(h, []).append(i)
    true, first = set(), {}
    for i,w in enumerate(sames):
        if (j := first.setdefault(w, i))!=i: true.add((j, i))
    for i,s in enumerate(sets):
        if enough[i]: true |= {(j,i) for j in {j for h in s-fit.boilerplate for j in holders[h] if j<i} if enough[j] and near(sets[j], s)}
    kinds = {}
    for p,k in known.items():
        d = kinds.setdefault(k, dict(known=0, over_threshold=0, found=0))
        d['known'] += 1; d['over_threshold'] += p in true; d['found'] += hit(p)
    right = sum(p in true or p in known for p in found)
    return dict(texts=len(texts), known=len(known), known_found=sum(map(hit, known)), recall_known=round(sum(map(hit, known))/len(known), 4),
        recall_over_threshold=round(sum(map(hit, true))/len(true), 4), found=len(found), found_and_known=sum(p in known for p in found),
        precision_known=round(sum(p in known for p in found)/len(found), 4), precision=round(right/len(found), 4), threshold=threshold, kinds=kinds)

def made_rows(n, files, seed=0, share=.03):
    "`n` questions one by one: sentences recombined, a few words exchanged for others of the vocabulary, `share` edited copies of one of the last 1,000"
    rng, recent = random.Random(seed), []
    sents = [s for q in questions(files) for s in re.split(r'(?<=[.!?])\s+', q) if len(s.split())>3]
    vocabulary = [w for s in sents for w in s.split()]
    for i in range(n):
        if recent and rng.random()<share:
            yield EDITS[rng.choice(('one word', 'a number changed', 'punctuation', 'case'))](rng.choice(recent), rng), True
            continue
        ws = ' '.join(rng.choice(sents) for _ in range(3)).split()
        for _ in range(len(ws)//3): ws[rng.randrange(len(ws))] = rng.choice(vocabulary)
        recent.append(t := ' '.join(ws))
        if len(recent)>1000: recent[rng.randrange(1000)] = recent.pop()
        yield t, False

def one(n, files):
    "Rows per second of fit and add alone, and the peak memory of this process"
    rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    rows, spent, hit, made, clean = made_rows(n, files), 0., 0, 0, 0
    head = [next(rows) for _ in range(min(n, 4000))]
    before = rss()
    t = time.perf_counter()
    index = NearDuplicates().fit(o[0] for o in head)
    spent += time.perf_counter()-t
    def feed():
        yield from head
        yield from rows
    for i,(text,copy) in enumerate(feed()):
        t = time.perf_counter()
        near = index.add(i, text)
        spent += time.perf_counter()-t
        made += copy; hit += bool(near) and copy; clean += bool(near) and not copy
    return dict(rows=n, rows_per_second=round(n/spent), seconds=round(spent, 1), peak_mb=round(rss()), before_mb=round(before), bytes_per_row=round((rss()-before)*2**20/n), copies=made, copies_found=hit, others_found=clean)

def described(n, files):
    "Rows per second of the whole quality report, and the peak memory of this process"
    d, spent = Describe(), 0.
    for text,_ in made_rows(n, files):
        rec = dict(messages=[dict(role='user', content=text), dict(role='assistant', content=text[::-1])])
        t = time.perf_counter()
        d.add(rec, 'train', len(text)//4, len(text)//4)
        spent += time.perf_counter()-t
    t = time.perf_counter()
    d.report()
    last = time.perf_counter()-t
    return dict(rows=n, rows_per_second=round(n/(spent+last)), report_seconds=round(last, 1), peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024))

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--rows', type=int, nargs='+', default=[10_000, 100_000, 1_000_000]); p.add_argument('--data', nargs='+', default=DEMO)
    p.add_argument('--out', default='bench/results/near.json'); p.add_argument('--one', nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one: return print(json.dumps(dict(near=one, describe=described)[a.one[0]](int(a.one[1]), a.data)))
    known = {Path(f).stem: [quality(qs, len(qs), t) for t in (.5, .6, .7)] for f in a.data if (qs := questions([f])[:5000])}
    for k,vs in known.items():
        for v in vs: print(k, json.dumps({k:o for k,o in v.items() if k!='kinds'}), flush=True)
    sizes = dict(near=[], describe=[])
    for n in a.rows:
        for k,v in sizes.items():
            got = subprocess.run([sys.executable, __file__, '--one', k, str(n), '--data', *a.data], capture_output=True, text=True, check=True)
            v.append(json.loads(got.stdout)); print(k, v[-1], flush=True)
    res = dict(known=known, **sizes, data=[Path(f).name for f in a.data], versions={k:v for k,v in versions().items() if k in ('python', 'ftnb', 'rensa')},
        hardware={k:v for k,v in hardware().items() if k in ('cpu', 'cores')}, command='python bench/near.py --rows '+' '.join(map(str, a.rows))+' --data '+' '.join(Path(f).name for f in a.data))
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    Path(a.out).write_text(json.dumps(res, indent=1)+'\n')

if __name__=='__main__': main()
