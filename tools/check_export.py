"ftnb/ is exported from nbs/: fail if somebody edited it by hand, or forgot to export."
import shutil, subprocess, sys, tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
with tempfile.TemporaryDirectory() as d:
    copy = Path(d)/'ftnb'
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns('.venv*', 'runs', '_*', 'reference', '.git', '*.safetensors', 'build', '*.egg-info', '__pycache__'), symlinks=True)
    shutil.copytree(root/'ftnb', copy/'ftnb', dirs_exist_ok=True, ignore=shutil.ignore_patterns('__pycache__'))
    before = {p.name: p.read_text() for p in (copy/'ftnb').glob('*.py')}
    subprocess.run([str(Path(sys.executable).parent/'nbdev-export')], cwd=copy, check=True)
    after = {p.name: p.read_text() for p in (copy/'ftnb').glob('*.py')}
    bad = sorted(n for n in before if n!='_modidx.py' and before[n]!=after.get(n)) + sorted(set(after)-set(before))
if bad: sys.exit(f'ftnb/ differs from what nbs/ exports in {", ".join(bad)}: edit the notebook and run nbdev-export.')
