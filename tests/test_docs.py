"The site: built from the notebooks, every page there, every link of the navigation and between pages leads somewhere"
import os, re, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
pytest.importorskip('smalldocs')

@pytest.fixture(scope='module')
def site():
    env = dict(os.environ, PATH=f'{BIN}{os.pathsep}{os.environ["PATH"]}')
    p = subprocess.run([sys.executable, 'tools/build_site.py'], cwd=ROOT, env=env, capture_output=True, text=True)
    assert p.returncode==0, (p.stdout+p.stderr)[-3000:]
    return ROOT/'_docs'

class _Links(HTMLParser):
    def __init__(self, text): super().__init__(); self.found = []; self.feed(text)
    def handle_starttag(self, tag, attrs): self.found += [v for k,v in attrs if k in ('href', 'src') and v]

def test_every_chapter_has_a_page_in_the_navigation(site):
    menu = (ROOT/'_quarto.yml').read_text()
    books = [*(ROOT/'nbs').glob('[0-9]*.ipynb'), *(ROOT/'nbs/stages').glob('*.ipynb'), *(ROOT/'nbs/tutorials').glob('*.ipynb')]
    assert len(books)>=60
    for b in books:
        page = f'reference/{b.relative_to(ROOT/"nbs").parent}/'.replace('/./', '/')+re.sub(r'^\d+[a-z]*_', '', b.stem)
        assert (site/f'{page}.html').exists(), page
        assert f'{page}.ipynb' in menu, f'{page} is not in the navigation'

def test_no_link_inside_the_site_is_dead(site):
    dead = []
    for p in site.rglob('*.html'):
        for l in set(_Links(p.read_text()).found):
            u = urlsplit(l)
            if u.scheme or u.netloc or not u.path: continue
            to = (site/unquote(u.path).lstrip('/')) if u.path.startswith('/') else (p.parent/unquote(u.path))
            if not to.exists(): dead.append(f'{p.relative_to(site)}: {l}')
    assert not dead, dead[:10]

def test_no_page_shows_a_path_of_the_machine_it_was_built_on(site):
    here = str(ROOT)
    assert not [p.name for p in site.rglob('*.html') if here in p.read_text()]
