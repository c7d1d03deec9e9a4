"The pages of the site: none outside the learning path, errors that still exist, commands that the command line knows"
import re, shlex, sys
from importlib.util import find_spec
from pathlib import Path
import pytest
import yaml
from ftnb.base import UserError
from ftnb.cli import parser
from ftnb.fields import names
from ftnb.gates import gate_table
from ftnb.recipe import make_recipe

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import path as way # noqa: E402
import troubleshooting as trouble # noqa: E402

PAGES = sorted([*ROOT.glob('*.qmd'), *(ROOT/'guides').glob('*.qmd')])
MENU = (ROOT/'_quarto.yml').read_text()

def pages():
    "Every page of the site that is no module's, as it is named in the navigation"
    books = [f for d in ('stages', 'tutorials', 'explain') for f in (ROOT/'nbs'/d).glob('*.ipynb')]+[f for f in (ROOT/'nbs').glob('*.ipynb') if not f.name[0].isdigit()]
    named = [(Path('reference')/f.relative_to(ROOT/'nbs').parent/re.sub(r'^\d+[a-z]*_', '', f.name)).as_posix() for f in books if not f.name.startswith('_')]
    return sorted([*(f.relative_to(ROOT).as_posix() for f in PAGES), *named])

def test_no_page_stands_outside_the_learning_path():
    assert len(pages())>=30
    assert not set(pages())-{o.page for o in way.path}
    assert len({o.page for o in way.path})==len(way.path)

def test_every_page_and_every_chapter_is_in_the_navigation_once():
    for p in [*pages(), *(p for p,_ in way.modules())]: assert len(re.findall(rf'^ +- {re.escape(p)}$', MENU[MENU.index('sidebar:'):], re.M))==1, f'{p}: run python tools/path.py'

def test_the_page_of_the_path_and_the_navigation_are_what_their_maker_writes():
    assert (ROOT/'guides/path.qmd').read_text()==way.page(), 'run python tools/path.py'
    assert MENU==way.config(MENU), 'run python tools/path.py'
    assert yaml.safe_load(MENU)['project']['post-render']=='python tools/path.py'

def test_from_the_first_page_the_path_leads_through_the_three_levels_and_never_to_a_missing_page():
    steps = {o.page: o for o in way.there()}
    assert all(o.next in steps and o.level in way.levels and 1<=o.minutes<=30 and o.needs for o in steps.values())
    seen, p = [], 'index.qmd'
    while p not in seen:
        seen.append(p)
        p = steps[p].next
    rank = list(way.levels)
    ranks = [rank.index(steps[p].level) for p in seen]
    assert set(ranks)=={0, 1, 2} and ranks==sorted(ranks) and len(seen)>=len(steps)-2

def test_a_page_that_is_not_written_yet_is_stepped_over(monkeypatch):
    last = way.path[-1]
    monkeypatch.setattr(way, 'path', [way.Step('index.qmd', *way.path[0][1:4], 'guides/none.qmd'), way.Step('guides/none.qmd', *last[1:4], 'planner.qmd'), *[o for o in way.path if o.page=='planner.qmd']])
    assert way.there()[0].next=='planner.qmd'

def test_each_page_gets_one_line_under_its_title(tmp_path):
    html = '<html><header><nav></nav></header><header id="title-block-header"><h1>T</h1></header><p>text</p></html>'
    for p in ('guides/data.html', 'planner.html', 'reference/arch.html', 'reference/stages/train.html'):
        (tmp_path/p).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/p).write_text(html)
    way.stamp(tmp_path)
    way.stamp(tmp_path)
    for p in tmp_path.rglob('*.html'): assert p.read_text().count('class="ftnb-path"')==1 and '</h1></header><p class="ftnb-path" ' in p.read_text()
    assert 'Fundamentals · reference, floor 1' in (tmp_path/'reference/arch.html').read_text()
    assert 'needs: ' in (tmp_path/'planner.html').read_text() and 'href="../../guides/' not in (tmp_path/'planner.html').read_text()
    assert 'next: <a href="evaluate.html">4 · Evaluate</a>' in (tmp_path/'reference/stages/train.html').read_text()

def test_reading_times_are_not_far_from_the_length_of_the_pages():
    for o in way.there():
        if o.page.endswith('.qmd') and (n := len(way.source(o.page).read_text().split()))<3000: assert n/400<o.minutes+1 and o.minutes<=n/60+3, (o.page, n, o.minutes)

# ---- troubleshooting

def test_the_page_of_errors_is_what_its_maker_writes(): assert (ROOT/'guides/troubleshooting.qmd').read_text()==trouble.page(), 'run python tools/troubleshooting.py'

SOURCE = trouble.texts()
@pytest.mark.parametrize('text', [r[0] for rows in trouble.entries.values() for r in rows])
def test_an_error_text_on_the_page_still_exists_in_ftnb(text):
    assert any(trouble.pattern(text).search(s) for s in SOURCE), 'the message was changed: change it in tools/troubleshooting.py too'

def test_a_text_that_is_gone_would_be_noticed(): assert not any(trouble.pattern('There is no recipe {path}; make one.').search(s) for s in SOURCE)

@pytest.mark.parametrize('text, where', [(t, w) for t,w,*_ in trouble.stack if w.endswith('.py')])
def test_an_error_text_of_a_library_stands_in_the_installed_version(text, where):
    spec = find_spec(where.split('/')[0])
    if not spec: pytest.skip(f'{where} is not installed')
    src = re.sub(r'["\']\s*\n\s*f?["\']', '', (Path(spec.origin).parent.parent/where).read_text())
    assert text in src

@pytest.mark.parametrize('bad', [dict(lora_rank='x'), dict(learnin_rate=1), dict(peft='lorra'), dict(peft='full', load_in_4bit=True), dict(bf16=True, fp16=True), dict(eval_strategy='steps'), dict(lr=1e-4, learning_rate=1e-3), dict(loss_type='ipo'), dict(beta=.5), dict(peft='prefix', packing=True), dict(peft='prompt', export_formats=['merged']), dict(peft='loha', load_in_4bit=True), dict(peft='full', export_formats=['adapter'])])
def test_what_a_wrong_recipe_says_is_found_on_the_page(bad):
    with pytest.raises(UserError) as e: make_recipe(bad)
    assert any(trouble.pattern(r[0]).search(str(e.value)) for r in trouble.entries['Recipe and command line']+trouble.entries['Evaluation and export'])

def test_about_sixty_of_the_texts_are_there_and_none_twice():
    texts = [r[0] for rows in trouble.entries.values() for r in rows]+[r[0] for r in trouble.stack]
    assert len(texts)>=80 and len(set(texts))==len(texts)

# ---- what the pages tell people to type

def blocks(f): return [(m[1], m[2]) for m in re.finditer(r'^```(\w*)\n(.*?)^```', f.read_text(), re.M|re.S)]
def commands():
    for f in [*PAGES, ROOT/'README.md']:
        lines = [(l.strip(), True) for _,b in blocks(f) for l in b.replace('\\\n', ' ').splitlines()]+[(l, False) for l in re.findall(r'`(ftnb [a-z][^`]*)`', f.read_text())]
        for l,whole in lines:
            l = re.split(r'\s#|>|\||&&|;', re.sub(r'^\S* ?\* .*?(?=ftnb)|^for .*? do ', '', l))[0].strip()
            if l.startswith('ftnb ') and '...' not in l and 'MODEL' not in l and 'NAME' not in l and 'GATE' not in l: yield f.name, l, whole

def test_every_command_on_the_pages_is_one_that_the_command_line_takes(capsys):
    p, seen = parser(), list(commands())
    assert len({c for _,c,_ in seen})>=35
    for f,c,whole in seen:
        try: a = p.parse_args(shlex.split(c)[1:])
        except SystemExit as e:
            said = capsys.readouterr().err
            assert not e.code or not whole and 'are required' in said, f'{f}: {c}: {said}' # in a sentence a command may stand alone
        else:
            for v in getattr(a, 'param', None) or []: assert v.split('=')[0] in names, f'{f}: {c}'
            for v in getattr(a, 'accept', None) or []: assert v.split('=')[0] in gate_table, f'{f}: {c}'

def test_every_recipe_on_the_pages_is_valid():
    n = 0
    for f in PAGES:
        for kind,b in blocks(f):
            if kind!='yaml': continue
            make_recipe(yaml.safe_load(b))
            n += 1
    assert n>=3

def test_every_field_in_code_on_the_how_to_pages_exists():
    odd = [(f.name, k) for f in PAGES if f.parent.name=='guides' and f.name not in ('troubleshooting.qmd', 'peers.qmd') for k in re.findall(r'`([a-z][a-z0-9_]+_[a-z0-9_]+): ', f.read_text()) if k not in names and k not in gate_table]
    assert not odd

def test_links_between_the_pages_lead_somewhere():
    dead = []
    for f in PAGES:
        for l in re.findall(r'\]\(([^)#]+?)(?:#[^)]*)?\)', re.sub(r'^```.*?^```', '', f.read_text(), flags=re.M|re.S)):
            if re.match(r'\w+:', l): continue
            to = (f.parent/l).resolve().relative_to(ROOT).as_posix()
            if not (ROOT/to).exists() and not way.source(to): dead.append(f'{f.name}: {l}')
    assert not dead

def test_the_demos_figures_on_the_first_page_are_those_that_were_measured():
    rows = [l for l in (ROOT/'index.qmd').read_text().splitlines() if re.match(r'\| (valid JSON|fields|whole|perplexity)', l)]
    assert len(rows)==4 and all(l in (ROOT/'measured.qmd').read_text() for l in rows)

def test_the_site_makes_links_relative_and_leaves_other_slashes_alone():
    from docs_prerender import relative
    assert relative('[a](/base.html#x) and/or https://arxiv.org/abs/1 [b](https://x.org/y) `runs/my`', '/', '../')=='[a](../base.html#x) and/or https://arxiv.org/abs/1 [b](https://x.org/y) `runs/my`'
    assert relative('[a](https://me.io/ftnb/base.html)', 'https://me.io/ftnb/', '')=='[a](base.html)'
    assert relative('[a](../stages/1_prepare.ipynb) [b](01_first.ipynb) [c](https://x.org/01_first.ipynb)', '/', '../')=='[a](../stages/prepare.ipynb) [b](first.ipynb) [c](https://x.org/01_first.ipynb)'
