"The rules of the house: floors, light imports, small modules, clean notebooks, a docstring for every public name"
import ast, json, os, re, statistics, subprocess, sys
from pathlib import Path

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
ROOT = Path(__file__).parents[1]
notebooks = sorted(ROOT.glob('nbs/[0-9][0-9]*_*.ipynb'))
heavy = {'torch', 'transformers', 'datasets', 'pandas', 'peft', 'trl', 'accelerate'}

def cells(path): return json.loads(path.read_text())['cells']
def source(cell): return ''.join(cell['source'])
def exported(path):
    "Source of the cells of a notebook that go into its module"
    return [source(c) for c in cells(path) if c['cell_type']=='code' and re.search(r'^#\|\s*exporti?\b', source(c), re.M)]
def module_of(path): return re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(source(c) for c in cells(path)), re.M)[1]
def floor_of(path): return int(path.name[0])

modules = {module_of(p): p for p in notebooks}
low = [m for m,p in modules.items() if floor_of(p)<=2]

def top_imports(src):
    "Modules imported when the code is loaded, also in a `try` or an `if`, but not in a function"
    todo = list(ast.parse(src).body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)): continue
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            mod = f'ftnb.{node.module}' if node.level and node.module else 'ftnb' if node.level else node.module
            if mod=='ftnb': yield from (f'ftnb.{a.name}' for a in node.names)
            else: yield mod
        else: todo += ast.iter_child_nodes(node)

def imports_of(path): return {m for src in exported(path) for m in top_imports(src)}
def ours(path): return {m.split('.')[1] for m in imports_of(path) if m.startswith('ftnb.')} & set(modules)

ids = dict(ids=lambda p: p.stem if isinstance(p, Path) else str(p))
def tracked(): return subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True).stdout.split('\0')[:-1]

def test_every_notebook_has_its_own_module():
    assert len(notebooks)>20 and len(modules)==len(notebooks)
    assert {p.stem for p in (ROOT/'ftnb').glob('[a-z]*.py')}==set(modules)

@pytest.mark.parametrize('path', notebooks, **ids)
def test_imports_come_from_lower_floors_or_from_the_left(path):
    for m in ours(path):
        other = modules[m]
        assert floor_of(other)<floor_of(path) or floor_of(other)==floor_of(path) and other.name<path.name, f'{path.name} imports {m} of {other.name}'

@pytest.mark.parametrize('path', [p for p in notebooks if floor_of(p)>=4], **ids)
def test_stages_and_panels_never_import_the_model_floor(path): assert not [m for m in ours(path) if floor_of(modules[m])==3]

@pytest.mark.parametrize('path', [p for p in notebooks if floor_of(p)<=2], **ids)
def test_floors_0_to_2_import_no_heavy_library_at_top(path): assert not {m.split('.')[0] for m in imports_of(path)} & heavy

def test_light_imports_are_light_and_quick():
    code = ('import importlib, sys, time; t = time.perf_counter(); import ftnb\n'
        f'for m in {low!r}: importlib.import_module("ftnb."+m)\n'
        f'print(time.perf_counter()-t, *[m for m in ("torch", "transformers", "datasets", "pandas") if m in sys.modules])')
    out = [subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split() for _ in range(3)]
    assert not out[0][1:], f'loaded by floors 0 to 2: {out[0][1:]}'
    seconds = statistics.median(float(o[0]) for o in out)
    print(f'import of ftnb and {len(low)} modules: {seconds:.2f} s')
    assert seconds<1.5

@pytest.mark.parametrize('name', sorted(modules))
def test_modules_can_be_read_in_one_sitting(name):
    n = len((ROOT/'ftnb'/f'{name}.py').read_text().splitlines())
    assert n<=250, f'{name}.py has {n} lines'

committed = [ROOT/f for f in tracked() if f.endswith('.ipynb') and (ROOT/f).exists()]
places = tuple(f'/{d}/' for d in ('work', 'root', 'tmp'))

@pytest.mark.parametrize('path', committed, **ids)
def test_committed_notebooks_are_clean(path):
    nb = json.loads(path.read_text())
    assert 'widgets' not in nb['metadata']
    assert nb['metadata']['kernelspec']['language']=='python'
    outputs = json.dumps([c.get('outputs', []) for c in nb['cells']])
    assert not [p for p in places if p in outputs]

def test_no_tracked_file_names_a_place_of_one_machine():
    bad = []
    for f in tracked():
        try: text = (ROOT/f).read_text()
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError): continue
        bad += [f'{f}, line {i}' for i,l in enumerate(text.splitlines(), 1) if any(p in l for p in places[:2])]
    assert not bad

@pytest.mark.parametrize('name', sorted(modules))
def test_public_functions_and_classes_have_a_docstring(name):
    tree = ast.parse((ROOT/'ftnb'/f'{name}.py').read_text())
    public = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id=='__all__')
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert not [n.name for n in tree.body if isinstance(n, kinds) and n.name in public and not ast.get_docstring(n)]
