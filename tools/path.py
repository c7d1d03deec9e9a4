"""The learning path: level, time, what must be known and what comes next of every page, in one table.

`python tools/path.py` writes guides/path.qmd and the navigation in _quarto.yml from it. With QUARTO_PROJECT_OUTPUT_DIR
set, as after rendering, it puts one line under the title of each page of the site."""
import html, json, os, re
from pathlib import Path
from typing import NamedTuple

root = Path(os.environ.get('QUARTO_PROJECT_DIR') or Path(__file__).parent.parent).resolve()
levels = dict(Fundamentals='From nothing to a first result that can be trusted', Advanced='Why it works, what it costs, what to change', Production='Runs that nobody watches, results that others use')

class Step(NamedTuple):
    "A page of the path"
    page:str # Source of the page, as in _quarto.yml
    level:str
    minutes:int # Reading time; running is said beside it
    needs:str # What must be known or there
    next:str # Page that comes next
    runs:str='' # Time to run it, where it is run

def t(name): return f'reference/tutorials/{name}.ipynb'
def s(name): return f'reference/stages/{name}.ipynb'
def e(name): return f'reference/explain/{name}.ipynb'
def g(name): return f'guides/{name}.qmd'
F, A, P = levels
path = [
    Step('index.qmd', F, 5, 'nothing', t('first')),
    Step(g('path'), F, 3, 'nothing', t('first')),
    Step(t('first'), F, 10, 'nothing; a terminal', s('prepare'), '12 min to run'),
    Step(s('prepare'), F, 5, 'your first fine-tuning', s('plan')),
    Step(s('plan'), F, 5, 'stage 1', s('train')),
    Step(s('train'), F, 5, 'stages 1 and 2', s('evaluate')),
    Step(s('evaluate'), F, 5, 'stage 3', s('export')),
    Step(s('export'), F, 5, 'stage 4', s('serve')),
    Step(s('serve'), F, 5, 'stage 5', g('data')),
    Step(g('data'), F, 4, 'your first fine-tuning', t('your_data')),
    Step(t('your_data'), F, 10, 'a file of your own, or the one it makes', t('will_it_fit'), 'under 5 min to run'),
    Step(t('will_it_fit'), F, 10, 'what a GPU is', g('small_gpu'), 'under 5 min to run'),
    Step(g('small_gpu'), F, 4, 'will it fit', g('colab')),
    Step(g('colab'), F, 3, 'a Google account', 'reference/colab.ipynb'),
    Step('reference/colab.ipynb', F, 5, 'Colab', 'methods.qmd'),
    Step('methods.qmd', F, 5, 'LoRA by name', g('howto')),
    Step(g('howto'), F, 2, 'your first fine-tuning', g('troubleshooting')),
    Step(g('troubleshooting'), F, 2, 'an error message', e('lora')),
    Step(e('lora'), A, 15, 'matrices; Python', e('loss_masking')),
    Step(e('loss_masking'), A, 12, 'tokens and chat templates', e('quantisation')),
    Step(e('quantisation'), A, 15, 'LoRA from scratch', e('where_memory_goes')),
    Step(e('where_memory_goes'), A, 15, 'what a backward pass is', 'planner.qmd'),
    Step('planner.qmd', A, 10, 'where the memory goes', 'accuracy.qmd'),
    Step('accuracy.qmd', A, 8, 'how the planner counts', g('choosing')),
    Step(g('choosing'), A, 12, 'stage 3; your data', g('presets')),
    Step(g('presets'), A, 5, 'choosing parameters', g('methods')),
    Step(g('methods'), A, 5, 'LoRA from scratch', g('sweep')),
    Step(g('sweep'), A, 3, 'a recipe that works', g('families')),
    Step(g('families'), A, 5, 'a model of your choice', g('compare')),
    Step(g('compare'), A, 4, 'two runs', g('rate')),
    Step(g('rate'), A, 4, 'stage 4, or answers of your own', g('preferences')),
    Step(g('preferences'), A, 4, 'pairs, or single answers with a verdict', t('preferences')),
    Step(t('preferences'), A, 15, 'stages 1 to 4', g('adapters'), 'under 5 min to run'),
    Step(g('adapters'), A, 3, 'a recipe that works', t('several_adapters')),
    Step(t('several_adapters'), A, 12, 'LoRA from scratch', t('lora_or_qlora'), 'under 5 min to run'),
    Step(t('lora_or_qlora'), A, 12, 'quantisation', t('one_gpu'), 'under 5 min to run'),
    Step(t('one_gpu'), A, 12, 'QLoRA; choosing parameters', g('resume'), 'under 5 min to run'),
    Step(g('resume'), A, 3, 'stage 3', g('accept')),
    Step(g('accept'), A, 3, 'stage 1 and its proof', g('import')),
    Step(g('import'), A, 3, 'a configuration of another tool', 'measured.qmd'),
    Step('measured.qmd', A, 6, 'what an interval is', g('peers')),
    Step(g('peers'), A, 6, 'nothing', g('schedule')),
    Step(g('schedule'), P, 4, 'a recipe that works', t('schedule')),
    Step(t('schedule'), P, 10, 'cron or another scheduler', g('private'), 'under 5 min to run'),
    Step(g('private'), P, 4, 'your data', g('chat')),
    Step(g('chat'), P, 4, 'stage 3', g('use')),
    Step(g('use'), P, 4, 'stage 5', t('export_and_serve')),
    Step(t('export_and_serve'), P, 12, 'stage 5', g('serve'), 'under 5 min to run'),
    Step(g('serve'), P, 5, 'stage 5', g('serve_deploy')),
    Step(g('serve_deploy'), P, 6, 'serve a run', g('eject')),
    Step(g('eject'), P, 3, 'TRL', g('measure')),
    Step(g('measure'), P, 3, 'a run on a GPU', g('howto')),
]
floors = {'0': ('Words', F), '1': ('Arithmetic', F), '2': ('Data', A), '3': ('Model', A), '4': ('Stages and command line', P), '5': ('Panels', P)}

def source(page):
    "The tracked file behind a page, or None if it is not there yet"
    p = Path(page)
    if p.parts[0]!='reference': return root/p if (root/p).exists() else None
    folder = root/'nbs'/p.relative_to('reference').parent
    return next((f for f in sorted(folder.glob('*.ipynb')) if re.sub(r'^\d+[a-z]*_', '', f.name)==p.name), None)

def title(page):
    "The title of a page"
    f = source(page)
    if f.suffix=='.qmd': return re.search(r'^title:\s*(.+)$', f.read_text(), re.M)[1].strip('"\'')
    return re.search(r'^#\s*(.+)$', ''.join(json.loads(f.read_text())['cells'][0]['source']), re.M)[1]

def there():
    "The steps whose page exists, and `next` skipping those that do not"
    at = {o.page: o for o in path}
    def on(p, seen=()): return p if source(p) or p in seen else on(at[p].next, (*seen, p))
    return [o._replace(next=on(o.next)) for o in path if source(o.page)]

def modules():
    "(page, floor) of every chapter, in reading order"
    return [(f'reference/{re.sub(r"^[0-9]+[a-z]*_", "", f.name)}', f.name[0]) for f in sorted((root/'nbs').glob('[0-9]*.ipynb'))]

def page():
    "The text of guides/path.qmd"
    out = ['---\ntitle: The learning path\n---\n\nEvery page says under its title its level, how long it takes, what must be known and what comes next. Read downwards, or take what you need: *needs* says what a page builds on. Written by `python tools/path.py`.\n']
    steps = there()
    def link(p): return f'[{title(p)}]({os.path.relpath(p, "guides")})'
    for l,why in levels.items():
        mine = [o for o in steps if o.level==l]
        out.append(f'## {l}\n\n{why}: {len(mine)} pages, {sum(o.minutes for o in mine)} minutes.\n\n| page | minutes | to run | needs | next |\n|---|---|---|---|---|')
        out[-1] += ''.join(f'\n| {link(o.page)} | {o.minutes} | {o.runs.replace(" to run", "")} | {o.needs} | {link(o.next)} |' for o in mine)+'\n'
    out.append('## Reference\n\nOne page for each module, made from the notebook that is its source. The first digit of a notebook is its floor; each builds on the floors below.\n\n| floor | what | level | modules |\n|---|---|---|---|')
    def short(p): return f'[{Path(p).stem}]({os.path.relpath(p, "guides")})'
    out[-1] += ''.join(f'\n| {k} | {n} | {l} | {", ".join(short(p) for p,f in modules() if f==k)} |' for k,(n,l) in floors.items())+'\n'
    return '\n'.join(out)

def navigation():
    "The sidebar as YAML: the path in three levels, then the modules by floor"
    out, steps = ['      - index.qmd'], [o for o in there() if o.page!='index.qmd']
    for l in levels: out += [f'      - section: {l}', '        contents:', *(f'          - {o.page}' for o in steps if o.level==l)]
    for k,(n,_) in floors.items():
        if mine := [p for p,f in modules() if f==k]: out += [f'      - section: "Reference: {n.lower()}"', '        contents:', *(f'          - {p}' for p in mine)]
    return '\n'.join(out)+'\n'

def config(text):
    "The text of _quarto.yml with this navigation"
    return re.sub(r'(?ms)(^  sidebar:\n.*?^    contents:\n).*?(?=^\S|\Z)', lambda m: m[1]+navigation()+'\n', text)

opened = '<p class="ftnb-path" style="font-size:.875rem;margin:0 0 1.5rem;padding-bottom:.5rem;border-bottom:1px solid #8886">'
def line(o, page):
    "The line under a title"
    up = os.path.relpath(re.sub(r'\.(qmd|ipynb)$', '.html', o.next), Path(page).parent)
    return f'{opened}{o.level} · {o.minutes} min{f" and {o.runs}" if o.runs else ""} · needs: {html.escape(o.needs)} · next: <a href="{up}">{html.escape(title(o.next))}</a></p>'

def module_line(p, floor):
    "The same for the page of a module"
    n, l = floors[floor]
    back = os.path.relpath('guides/path.html', Path(p).parent)
    return f'{opened}{l} · reference, floor {floor}: {n.lower()}{"" if floor=="0" else " · needs: the floors below"} · <a href="{back}">the learning path</a></p>'

def stamp(site):
    "Put the line under the title of every page of a rendered site"
    lines = {o.page: line(o, o.page) for o in there()} | {p: module_line(p, f) for p,f in modules()}
    for p,l in lines.items():
        f = Path(site)/re.sub(r'\.(qmd|ipynb)$', '.html', p)
        if not f.exists(): continue
        head, mark, rest = f.read_text().partition('id="title-block-header"')
        if mark and 'class="ftnb-path"' not in rest: f.write_text(head+mark+rest.replace('</header>', '</header>'+l, 1))

def main():
    if out := os.environ.get('QUARTO_PROJECT_OUTPUT_DIR'): return stamp(root/out)
    f = root/'guides/path.qmd'
    if not f.exists(): f.write_text('---\ntitle: The learning path\n---\n') # it lists itself
    f.write_text(page())
    q = root/'_quarto.yml'
    q.write_text(config(q.read_text()))

if __name__=='__main__': main()
