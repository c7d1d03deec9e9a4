"""Three adapters on one base: who answers what, and how much of each is left when they are combined.

Three small data sets by rule, each with a format of its own (an upper-case code, a card of `key: value` lines, a JSON
ticket), one recipe with `tasks`, LoRA on smollm2-135m. Each adapter is the first checkpoint, one every five steps at a
constant learning rate, that answers 95 % of its own validation rows. Then every adapter on every task's held-out rows, and a
grid of combinations with the share of each single adapter's score that is kept. The best combinations of the grid are scored
once more on the held-out rows that the grid did not see.

    python bench/adapters.py [--rate 5e-4] [--steps 40] [--rows 40] [--grid-rows 16] [--keep FOLDER] [--out bench/results/adapters.json]
"""
import argparse, json, os, random, subprocess, sys, tempfile, time
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
CITIES = dict(Lisbon='LIS', Porto='OPO', Madrid='MAD', Vienna='VIE', Berlin='BER', Oslo='OSL', Dublin='DUB', Athens='ATH', Prague='PRG', Warsaw='WAW', Geneva='GVA', Milan='MXP')
STATES = {'arrived this morning': 'OK', 'was handed over at noon': 'OK', 'is held by customs': 'HOLD', 'waits for a signature': 'HOLD', 'came back damaged': 'BACK', 'was refused at the door': 'BACK', 'has not been seen since Monday': 'LOST', 'can not be found': 'LOST'}
NAMES = 'Anna Ben Clara David Elena Felix Greta Hugo Irene Jonas Karla Louis Maria Nils Olga Paul'.split()
THINGS = 'chairs lamps tables shelves mirrors carpets clocks vases stools desks'.split()
DAYS = 'Monday Tuesday Wednesday Thursday Friday Saturday'.split()
DEVICES = 'printer projector heater phone monitor scanner router camera'.split()
TEXTS = {'codes': ('The parcel to {city} {state}.', 'News of {city}: it {state}.', 'Our box for {city} {state}, I hear.', 'Sorry, the crate for {city} {state}.', 'The letter to {city} {state}, they say.'),
    'cards': ('{name} wants {n} {thing} by {day}.', 'Please send {n} {thing} to {name} on {day}.', '{n} {thing} for {name}, {day} at the latest.'),
    'tickets': ('The {device} in room {room} is broken, {hurry}.', 'Room {room}: {device} does not work, {hurry}.', 'Someone should look at the {device} in {room}, {hurry}.')}
HURRY = {'it is urgent': True, 'today please': True, 'no hurry': False, 'next week is fine': False}

def row(task, rng):
    "A question and its answer by the rule of a task"
    c, s, h = rng.choice([*CITIES]), rng.choice([*STATES]), rng.choice([*HURRY])
    v = dict(city=c, state=s, name=rng.choice(NAMES), n=rng.randint(2, 40), thing=rng.choice(THINGS), day=rng.choice(DAYS), device=rng.choice(DEVICES), room=rng.randint(100, 499), hurry=h)
    said = dict(codes=f'{CITIES[c]}/{STATES[s]}', cards='name: {name}\nitem: {thing}\ncount: {n}\nday: {day}'.format(**v), tickets=json.dumps(dict(device=v['device'], room=v['room'], urgent=HURRY[h])))
    return dict(prompt=rng.choice(TEXTS[task]).format(**v), completion=said[task])

def make_data(folder, train=240, held=40, seed=7):
    "Files of rows for each task, none of whose questions stands in two splits; {task: [train, valid, test]}"
    out = {}
    for t in TEXTS:
        rng, seen = random.Random(f'{t}{seed}'), {}
        while len(seen)<train+20+held:
            r = row(t, rng)
            seen.setdefault(r['prompt'], r)
        rows, at = [*seen.values()], 0
        for split,n in (('train', train), ('valid', 20), ('test', held)):
            p = Path(folder)/f'{t}-{split}.jsonl'
            p.write_text(''.join(json.dumps(r)+'\n' for r in rows[at:at+n]))
            out.setdefault(t, []).append(dict(path=str(p.absolute()), split=split))
            at += n
    return out

def recipe(data, steps=40, rate=5e-4):
    "One recipe with a task for each data set"
    return dict(model_name_or_path='smollm2-135m', peft='lora', lora_r=8, lora_alpha=16, learning_rate=rate, lr_scheduler_type='constant_with_warmup', max_steps=steps, per_device_train_batch_size=8, per_device_eval_batch_size=40, max_length=256,
        eval_strategy='no', save_strategy='steps', save_steps=5, save_total_limit=steps, save_only_model=True, logging_steps=5, near_duplicates='report', max_eval_samples=None, tasks={t: dict(dataset=d) for t,d in data.items()})

def train(folder, data, steps=40, rate=5e-4):
    "Run the recipe as a user would, up to stage 3; {task: its run}"
    import yaml
    from ftnb.runs import Run
    (folder/'shop.yaml').write_text(yaml.safe_dump(recipe(data, steps, rate), sort_keys=False))
    (folder/'settings.ini').write_text('[ftnb]\nruns = runs\n')
    subprocess.run([sys.executable, '-c', 'from ftnb.cli import main; main()', 'run', 'shop.yaml', '--to', 'train'], cwd=folder, check=True)
    return {t: Run(folder/f'runs/shop-{t}') for t in data}

def score(shelf, name, data, task, split='valid', skip=0):
    "Share of a task's rows, of the split and from a row on, that an adapter answers as it should"
    from ftnb.domains import Domain, rate
    rows = [json.loads(l) for s in data[task] if s['split']==split for l in open(s['path'])][skip:]
    d = Domain(task, None, [], [], [o['completion'] for o in rows], 48, 'field_accuracy' if task=='tickets' else 'exact_match')
    return rate(shelf.answers([o['prompt'] for o in rows], name, d.limit, 40), d)

def enough(shelf, runs, data, least=.95):
    "Put the first checkpoint of each task that answers enough of its validation rows on the shelf; {task: its steps, score and loss}"
    out = {}
    for t,run in runs.items():
        steps = sorted(int(p.name.split('-')[1]) for p in run.path('checkpoints').glob('checkpoint-*'))
        for n in steps:
            shelf.add(t, run.path('checkpoints', f'checkpoint-{n}'))
            s = score(shelf, t, data, t)
            if s>=least or n==steps[-1]: break
            shelf.delete(t)
        out[t] = dict(steps=n, valid=s, loss=next((e['loss'] for e in reversed(run.events('log')) if e.get('step', 0)<=n and 'loss' in e), None))
        print(t, out[t], file=sys.stderr)
    return out

def combos(names):
    "The grid. With `linear`, `dare_linear` and `magnitude_prune`, A and B are summed each: adapters that began with the same A count three times at weights of 1, so thirds are tried too"
    from ftnb.domains import combinations as c
    many = lambda os: [{**o, 'rank': 8*len(names)} for o in os]
    return [*c(names, ('cat', 'svd')), *c(names, ('ties',), weights=(1., 1.5, 2., 3.), density=(.5, .8, 1.)), *c(names, ('linear', 'dare_linear', 'magnitude_prune'), weights=(1., 1/3), density=(.8,)),
        *c(names, ('dare_ties',), weights=(1., 2.), density=(.8,)), *many(c(names, ('ties_svd',), weights=(1., 2.), density=(.2, .5)))]

def confirm(shelf, data, combo, alone, skip):
    "The share that a combination keeps of each adapter's score, on rows that the grid did not see"
    shelf.combine('again', **{k: v for k,v in combo.items() if v is not None})
    try: return {t: score(shelf, 'again', data, t, 'test', skip)/alone[t] if alone[t] else None for t in alone}
    finally: shelf.delete('again')

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--rate', type=float, default=5e-4); p.add_argument('--steps', type=int, default=40); p.add_argument('--rows', type=int, default=40); p.add_argument('--grid-rows', type=int, default=16); p.add_argument('--keep'); p.add_argument('--out', default='bench/results/adapters.json')
    a = p.parse_args()
    from ftnb.domains import matrix
    from ftnb.recipe import make_recipe
    from ftnb.runs import hardware, versions
    from ftnb.shelf import Adapters
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(a.keep or tmp)
        folder.mkdir(parents=True, exist_ok=True)
        t, data = time.time(), make_data(folder, held=a.rows)
        runs, took = train(folder, data, a.steps, a.rate), {}
        took['train'] = round(time.time()-t)
        shelf = Adapters(make_recipe(dict(model_name_or_path='smollm2-135m')))
        own = enough(shelf, runs, data)
        rep = matrix(shelf, runs)
        print(rep['scores'], file=sys.stderr)
        t, rows, todo = time.time(), [], combos(shelf.names)
        res = dict(about='Three LoRA adapters (r 8, all linear layers) on smollm2-135m, three formats; shares from 0 to 1', criterion='the first checkpoint of each task that answers 95 % of its 20 validation rows', learning_rate=a.rate, adapters=own, rows=rep['n'], measure=rep['metric'], scores=rep['scores'],
            answers=[o for k in rep['tasks'] for o in [x for x in rep['answers'] if x['task']==k][:2]], grid_rows=a.grid_rows, grid=rows, planned=len(todo), adapter_bytes={k: o['bytes'] for k,o in shelf.infos.items()}, seconds=took,
            versions=versions(), hardware={k: v for k,v in hardware().items() if k in ('cpu', 'cores', 'gpus')}, command='python bench/adapters.py')
        def write():
            took['grid'] = round(time.time()-t)
            Path(a.out).write_text(json.dumps(res, indent=1, default=str)+'\n')
        def note(row): # the file grows while it runs
            rows.append(row)
            print(row, file=sys.stderr)
            write()
        shelf.grid(todo, runs, rows=a.grid_rows, each=note)
        made = rows[1+len(shelf.names):]
        alone = {k: score(shelf, k, data, k, 'test', a.grid_rows) for k in shelf.names}
        best = {kind: max((i for i,o in enumerate(made) if o['how'].startswith(kind)), key=lambda i: (made[i]['least'], sum(made[i][f'{k} kept'] for k in shelf.names))) for kind in ('ties', '')}
        res['confirmed'] = {k or 'any': dict(how=made[i]['how'], weights=made[i]['weights'], density=made[i]['density'], rows=a.rows-a.grid_rows, grid={n: made[i][f'{n} kept'] for n in shelf.names}, kept=confirm(shelf, data, todo[i], alone, a.grid_rows)) for k,i in best.items()}
        res['ties_keeps_80'] = all((v or 0)>=.8 for v in res['confirmed']['ties']['kept'].values())
        write()

if __name__=='__main__': main()
