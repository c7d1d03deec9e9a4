"Write the badge, the install cell and the choice of a GPU into the notebooks that open on Colab, from the address in pyproject.toml."
import argparse, json, re, sys, tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLAB = 'https://colab.research.google.com'
METADATA = dict(accelerator='GPU', colab=dict(gpuType='T4', provenance=[]))

INSTALL = '''#@title Install ftnb on Colab (anywhere else this cell does nothing)
#@markdown `drive`: keep a copy of the runs on Google Drive, so that a disconnect loses nothing that was finished
drive = False #@param {type:"boolean"}
import os, sys
if 'COLAB_RELEASE_TAG' in os.environ:
    if 'FTNB_DOOR' not in os.environ: # once a session
        import subprocess
        from importlib.metadata import version
        keep = [f'{p}=={version(p).split("+")[0]}' for p in ('torch', 'numpy', 'ipywidgets', 'ipython', 'ipykernel')] # as Colab has them
        with open('/tmp/keep.txt', 'w') as f: f.write('\\n'.join(keep))
        what = '-q -c /tmp/keep.txt "ftnb[train] @ git+%s@%s" "torchao>=0.16"'
        for k in ('UV_CONSTRAINT', 'UV_BUILD_CONSTRAINT', 'UV_SYSTEM_PYTHON'): os.environ.pop(k, None)
        subprocess.run(f'uv pip install --python {sys.executable} {what} || {sys.executable} -m pip install {what}', shell=True, check=True)
    from ftnb.door import open_colab
    print(open_colab(drive))'''

def project(root=ROOT):
    "(address of the repository, its main branch, version)"
    p = tomllib.loads((root/'pyproject.toml').read_text())
    return p['project']['urls']['Repository'].removesuffix('.git').rstrip('/'), p['tool']['nbdev']['branch'], re.search(r'''__version__ = ["'](.+?)["']''', (root/'ftnb/__init__.py').read_text())[1]

def books(root=ROOT): return [*sorted((root/'nbs/stages').glob('*.ipynb')), root/'nbs/colab.ipynb']

def cell(kind, id, src):
    "A notebook cell"
    more = dict(execution_count=None, outputs=[]) if kind=='code' else {}
    return dict(cell_type=kind, id=id, metadata={}, **more, source=src.splitlines(True))

def door_cells(path, url, ref, root=ROOT):
    "{id: cell} for one notebook"
    owner = url.removeprefix('https://github.com/')
    badge = f'[![Open In Colab]({COLAB}/assets/colab-badge.svg)]({COLAB}/github/{owner}/blob/{ref}/{path.relative_to(root).as_posix()})'
    return {c['id']: c for c in (cell('markdown', 'colab-badge', badge), cell('code', 'colab-install', INSTALL % (url, ref)))}

def with_door(nb, cells):
    "The notebook with its door: the badge after the title, the install cell before the first code"
    old = {c.get('id'): c for c in nb['cells']}
    for id,c in cells.items():
        if id in old: old[id].update(c)
    if 'colab-badge' not in old: nb['cells'].insert(1, cells['colab-badge'])
    if 'colab-install' not in old: nb['cells'].insert(next(i for i,c in enumerate(nb['cells']) if c['cell_type']=='code'), cells['colab-install'])
    nb['metadata'].update(METADATA)
    return nb

def text(nb): return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True)+'\n'

def stale(ref, root=ROOT, write=False):
    "The notebooks whose door is not as it should be"
    url, out = project(root)[0], []
    for p in books(root):
        was = p.read_text()
        now = text(with_door(json.loads(was), door_cells(p, url, ref, root)))
        if json.loads(now)!=json.loads(was): out.append(p)
        if write and now!=was: p.write_text(now)
    return out

def main():
    _, branch, version = project()
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument('--ref', default=branch, help=f'branch or tag that Colab opens and installs; for a release v{version}')
    a.add_argument('--check', action='store_true', help='write nothing; exit 1 if a notebook is stale')
    a = a.parse_args()
    for p in (bad := stale(a.ref, write=not a.check)): print(p.relative_to(ROOT), 'is stale' if a.check else 'was written')
    return 1 if a.check and bad else 0

if __name__=='__main__': sys.exit(main())
