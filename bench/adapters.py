"""Three adapters on one base: who answers what, and how much of each is left when they are combined.

Three small data sets by rule, each with a format of its own (an upper-case code, a card of `key: value` lines, a JSON
ticket), one recipe with `tasks`, LoRA on smollm2-135m. Then every adapter on every task's held-out rows, and a grid of
combinations in one call, with the share of each single adapter's score that is kept.

    python bench/adapters.py [--steps 60] [--rows 40] [--grid-rows 16] [--keep FOLDER] [--out bench/results/adapters.json]
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

def recipe(data, steps=60):
    "One recipe with a task for each data set"
    return dict(model_name_or_path='smollm2-135m', peft='lora', lora_r=8, lora_alpha=16, learning_rate=1e-3, max_steps=steps, per_device_train_batch_size=8, per_device_eval_batch_size=40, max_length=256, eval_strategy='no', save_strategy='no',
        near_duplicates='report', max_eval_samples=None, tasks={t: dict(dataset=d) for t,d in data.items()})

def train(folder, data, steps=60):
    "Run the recipe as a user would, up to stage 4; the group's folder"
    import yaml
    (folder/'shop.yaml').write_text(yaml.safe_dump(recipe(data, steps), sort_keys=False))
    (folder/'settings.ini').write_text('[ftnb]\nruns = runs\n')
    subprocess.run([sys.executable, '-c', 'from ftnb.cli import main; main()', 'run', 'shop.yaml', '--to', 'evaluate'], cwd=folder, check=True)
    return folder/'runs/shop'

def combos(names):
    "The grid: every way with weights of 1, ties at three densities and other weights"
    from ftnb.domains import combinations
    out = combinations(names, ('ties',), density=(.5, .2, .8))+combinations(names, ('cat', 'linear', 'svd', 'dare_ties'), density=(.5,))
    out += combinations(names, ('ties_svd', 'dare_linear', 'magnitude_prune'), density=(.5,))+combinations(names, ('ties',), weights=(2.,), density=(.2, .5))
    return out+[{**c, 'rank': 8*len(names)} for c in combinations(names, ('ties_svd',), density=(.2, .5))]+[{**c, 'rank': 8*len(names)} for c in combinations(names, ('ties_svd',), weights=(1.5,), density=(.5,))]

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--steps', type=int, default=60); p.add_argument('--rows', type=int, default=40); p.add_argument('--grid-rows', type=int, default=16); p.add_argument('--keep'); p.add_argument('--out', default='bench/results/adapters.json')
    a = p.parse_args()
    from ftnb.runs import Run, hardware, versions
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(a.keep or tmp)
        folder.mkdir(parents=True, exist_ok=True)
        t = time.time()
        group = Run(train(folder, make_data(folder, held=a.rows), a.steps))
        trained = time.time()-t
        from ftnb.shelf import Adapters
        shelf = Adapters(group)
        rep, t, rows = group.report('tasks'), time.time(), []
        def note(row): # the file grows while it runs
            rows.append(row)
            print(row, file=sys.stderr)
            best = max((o for o in rows if o['how'].startswith('ties')), key=lambda o: o['least'], default=None)
            res = dict(about='Three LoRA adapters (r 8, all linear layers) on smollm2-135m, three formats; shares from 0 to 1', steps=a.steps, rows=rep['n'], measure=rep['metric'], scores=rep['scores'],
                answers=[o for t in rep['tasks'] for o in [x for x in rep['answers'] if x['task']==t][:2]], grid_rows=a.grid_rows, grid=rows, best_ties=best, ties_keeps_80=bool(best and best['least']>=.8),
                adapter_bytes={k: o['bytes'] for k,o in shelf.infos.items()}, seconds=dict(runs=round(trained), grid=round(time.time()-t)), versions=versions(), hardware={k: v for k,v in hardware().items() if k in ('cpu', 'cores', 'gpus')}, command='python bench/adapters.py')
            Path(a.out).write_text(json.dumps(res, indent=1, default=str)+'\n')
        shelf.grid(combos(shelf.names), rows=a.grid_rows, each=note)

if __name__=='__main__': main()
