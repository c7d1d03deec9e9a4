"Before the site is rendered: process the notebooks of nbs/ into reference/, which git ignores."
import ast, json, os, re, shutil
from functools import cache
from pathlib import Path

root = Path(os.environ.get('QUARTO_PROJECT_DIR', Path(__file__).parent.parent)).resolve()
out = root/'reference'
widget = 'application/vnd.jupyter.widget-view+json'

def page_name(p):
    "01a_name.ipynb as name.ipynb, as nbdev names its pages"
    return p.with_name(re.sub(r'^\d+[a-z]*_', '', p.name.lower()))

def relative(text, base, up):
    "Links to other pages as relative ones, to notebooks under the names of their pages"
    text = text.replace(base, up) if '://' in base else re.sub(r'(\]\(|href=")/(?=\w)', lambda m: m[1]+up, text)
    return re.sub(r'(\]\((?:\.\./|\w+/)*)\d+[a-z]*_(\w+\.ipynb)', r'\1\2', text)

def static(nb, rel, base):
    "The notebook without what needs a kernel, its links relative"
    nb['metadata'].pop('widgets', None)
    up = '../'*(len(rel.parts)-1)
    for c in nb['cells']:
        c['metadata'] = {k:v for k,v in c.get('metadata', {}).items() if k=='tags'}
        src = ''.join(c['source'])
        if c['cell_type']=='raw': src = re.sub(r'^output-file:.*\n', '', src, flags=re.M)
        if c['cell_type']=='markdown': src = relative(src, base, up)
        c['source'] = src
        for o in c.get('outputs', []):
            data = o.get('data', {})
            data.pop(widget, None)
            if 'text/markdown' in data: data['text/markdown'] = relative(''.join(data['text/markdown']), base, up)
    return nb

def keep_examples_asleep():
    "nbdev runs a cell again if an import stands in it; examples that bring their own import are left as they were saved"
    from nbdev import processors
    wants = processors._do_eval
    def runs(cell):
        if not wants(cell): return False
        if cell.directives_.keys() & {'export', 'exports', 'exporti', 'exec_doc'}: return True
        trees = cell.parsed_()
        return bool(processors._show_docs(trees)) or all(isinstance(t, (ast.Import, ast.ImportFrom)) for t in trees)
    processors._do_eval = runs

def read_settings_once():
    "nbdev reads pyproject.toml anew for each cell"
    from nbdev import processors
    processors.get_config = cache(processors.get_config)

def main():
    os.chdir(root)
    keep_examples_asleep()
    read_settings_once()
    from nbdev.config import get_config
    from nbdev.doclinks import _build_modidx
    from nbdev.serve import proc_nbs
    cfg = get_config()
    _build_modidx()
    made = proc_nbs(force=True, n_workers=0)
    base = f'{cfg.doc_host}{cfg.doc_baseurl}'.rstrip('/')+'/'
    shutil.rmtree(out, ignore_errors=True)
    for f in sorted(made.rglob('*.ipynb')):
        rel = page_name(f.relative_to(made))
        (out/rel).parent.mkdir(parents=True, exist_ok=True)
        (out/rel).write_text(json.dumps(static(json.loads(f.read_text()), rel, base), indent=1))

if __name__=='__main__': main()
