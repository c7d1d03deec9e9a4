"Execute the tutorials and explanations in a clean kernel each and write their outputs back; --quick takes few steps and writes nothing, --check compares."
import argparse, json, os, re, shutil, subprocess, sys, tempfile, time, warnings
from contextlib import contextmanager
from pathlib import Path

root = Path(__file__).resolve().parent.parent
# With a few steps, for `make test`; a notebook that is not named runs as it stands
quick = dict(your_data={}, schedule=dict(max_steps=2, max_train_samples=24, max_eval_samples=2, max_new_tokens=4), one_gpu=dict(eval_strategy='no', max_steps=2, max_train_samples=24, max_eval_samples=2, max_new_tokens=4),
    preferences=dict(rows=8, held_out_rows=2, batch=2, max_steps=1, few_steps=1, max_new_tokens=4), several_adapters=dict(rows=16, held_out_rows=2, batch=2, max_steps=1, max_new_tokens=4), lora_or_qlora=dict(rows=12, held_out_rows=2, batch=2, max_steps=1),
    export_and_serve=dict(max_train_samples=24, max_steps=2, max_new_tokens=12, max_certify_samples=2, formats=['adapter', 'q8_0']))
demo_quick = dict(max_steps=2, max_train_samples=24, max_eval_samples=4, max_new_tokens=4, per_device_train_batch_size=4, logging_steps=1, save_strategy='no')
PLACES = re.compile(r'(?<![\w.])/(?:work|root|home|tmp|Users|usr|opt|var|content)/\w|\bat 0x[0-9a-f]{6,}')

def books(*names):
    "The notebooks of tutorials and explanations, or those that are named"
    every = [*sorted((root/'nbs/tutorials').glob('[!_.]*.ipynb')), *sorted((root/'nbs/explain').glob('[!_.]*.ipynb'))]
    if bad := set(names)-{stem(p) for p in every}: sys.exit(f'There is no {min(bad)}; there are {", ".join(map(stem, every))}.')
    return [p for p in every if not names or stem(p) in names]

def stem(p): return re.sub(r'^\d+[a-z]*_', '', Path(p).stem)

def execute(path, values=None, cwd=None, timeout=600):
    "A notebook's cells after a run from top to bottom in a kernel of its own; what fails is raised"
    import nbformat, papermill as pm
    os.environ.setdefault('PYDEVD_DISABLE_FILE_VALIDATION', '1')
    with tempfile.TemporaryDirectory() as d, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        out = Path(d)/'out.ipynb'
        pm.execute_notebook(str(path), str(out), parameters=values or {}, cwd=str(cwd or d), progress_bar=False, execution_timeout=timeout, kernel_name='python3', extra_arguments=['--log-level=CRITICAL'])
        return json.loads(out.read_text())['cells']

def _joined(x): return ''.join(x) if isinstance(x, list) else x
def _lines(x): return x.splitlines(True) if isinstance(x, str) else x

def tidy(outputs):
    "Outputs as they are committed: no counts, no metadata, no widgets, no error stream, no speed, streams in one piece"
    res, plain = [], lambda text: re.sub(r' · [\d,.]+ tokens/s', '', text)
    for o in outputs:
        if o['output_type']=='stream':
            if o['name']!='stdout': continue
            text = plain(re.sub(r'[^\n]*\r(?!\n)', '', _joined(o['text'])))
            if res and res[-1]['output_type']=='stream': text = ''.join(res.pop()['text'])+text
            res.append(dict(name='stdout', output_type='stream', text=_lines(text)))
        elif o['output_type']=='error': raise ValueError(f'a cell ended with {o["ename"]}: {o["evalue"]}')
        else:
            data = {k: _lines(plain(_joined(v))) if k!='image/png' and not isinstance(v, dict) else v for k,v in sorted(o['data'].items()) if k!='application/vnd.jupyter.widget-view+json'}
            if data: res.append(dict(data=data, **(dict(execution_count=None) if o['output_type']=='execute_result' else {}), metadata={}, output_type=o['output_type']))
    return res

def with_outputs(path, cells):
    "The notebook with the outputs of a run; a `ValueError` if one shows a place of this machine"
    nb, done = json.loads(Path(path).read_text()), {c['id']: c for c in cells}
    for c in nb['cells']:
        if c['cell_type']!='code': continue
        if c['id'] not in done: raise ValueError(f'{Path(path).name} was edited while it ran')
        c.update(execution_count=None, outputs=tidy(done[c['id']]['outputs']))
        if m := PLACES.search(shown(c)): raise ValueError(f'{Path(path).name}: an output shows {m[0]}...:\n{shown(c)[max(0, m.start()-200):m.end()+100]}')
    return nb

def shown(cell):
    "All text that the outputs of a cell hold"
    return '\n'.join(_joined(t) for o in cell.get('outputs', []) for t in [o.get('text', ''), *(v for k,v in o.get('data', {}).items() if k!='image/png')] if t)

@contextmanager
def workspace(path, few=False):
    "A new folder to run a notebook in; for the first tutorial it holds a run of the demo"
    with tempfile.TemporaryDirectory() as d:
        (Path(d)/'settings.ini').write_text('[ftnb]\nruns = runs\n')
        if stem(path)=='first':
            have = root/'runs/demo'
            if few or not (have/'reports/export.json').exists():
                ps = [x for k,v in (demo_quick if few else {}).items() for x in ('-p', f'{k}={v}')]
                subprocess.run([sys.executable, '-c', 'from ftnb.cli import main; main()', 'run', 'demo', *ps], cwd=d, check=True, stdout=subprocess.DEVNULL)
            else: shutil.copytree(have, Path(d)/'runs/demo', ignore=shutil.ignore_patterns('*.safetensors', 'checkpoints'))
        yield Path(d)

def values_of(path, few):
    "Parameters of a run: its files go to the folder it is started in"
    has = re.search(r'^"?folder:str', '\n'.join(''.join(c['source']) for c in json.loads(Path(path).read_text())['cells'] if 'parameters' in c['metadata'].get('tags', [])), re.M)
    return {**(dict(folder='.') if has else {}), **(quick.get(stem(path), {}) if few else {})}

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('names', nargs='*', help='pages, such as lora or your_data; none: all')
    p.add_argument('--quick', action='store_true', help='few steps, nothing is written')
    p.add_argument('--check', action='store_true', help='say whose committed outputs differ, write nothing')
    a = p.parse_args(argv)
    for path in books(*a.names):
        t = time.time()
        with workspace(path, a.quick) as d: cells = execute(path, values_of(path, a.quick), d)
        try: nb = with_outputs(path, cells)
        except ValueError as e:
            kept = Path(tempfile.gettempdir())/f'{stem(path)}-outputs.json'
            kept.write_text(json.dumps(cells))
            sys.exit(f'{e}\nWhat was executed is in {kept}.')
        old = json.loads(path.read_text())
        moved = [c['id'] for c,o in zip(nb['cells'], old['cells']) if shown(c)!=shown(o)]
        print(f'{stem(path):<20} {time.time()-t:5.0f} s'+(f'  {len(moved)} outputs differ: {", ".join(moved)}' if a.check and moved else ''), flush=True)
        if not (a.quick or a.check): path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True)+'\n')

if __name__=='__main__': main()
