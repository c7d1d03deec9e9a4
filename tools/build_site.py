"The site, in _docs/, and what there is to say against it: `smalldocs check` and `smalldocs render --strict` in one build, since each of them builds it whole."
import sys
from pathlib import Path

from smalldocs.check import scan
from smalldocs.site import build

def main(root=Path(__file__).parents[1]):
    site = build(root, quiet=True)
    pages = {p.src: (site.root/p.src).read_text(encoding='utf-8') for p in site.pages.values() if p.src.suffix!='.ipynb'}
    said = [*site.warnings, *(f'{src}:{line}: {why}' for src,text in pages.items() for line,why in scan(text))]
    print(*said, f'{len(site.pages)} pages, {len(said)} things to look at', sep='\n', file=sys.stderr)
    return bool(said)

if __name__=='__main__': sys.exit(main())
