"Makes an environment with vLLM for the CPU: `python tools/vllm_env.py .venv-vllm`; more arguments go to pip"
import subprocess, sys, time
from pathlib import Path

LOCK = Path(__file__).with_name('vllm-constraints.txt')
TORCH = 'https://download.pytorch.org/whl/cpu' # the CPU builds of torch are not on PyPI
CHECK = 'import torch, transformers, vllm; from vllm.entrypoints.openai import api_server; print("vLLM", vllm.__version__, "torch", torch.__version__, "transformers", transformers.__version__)'

def pip(py, *args): return subprocess.run([py, '-m', 'pip', 'install', '-q', '--no-deps', *args]).returncode

def make(folder, *more):
    "An environment in `folder` with the versions of the file, and its Python; nothing is resolved, as the file names everything"
    t, py = time.time(), Path(folder).absolute()/'bin/python'
    if not py.exists(): subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
    torch = next(l for l in LOCK.read_text().splitlines() if l.startswith('torch=='))
    if pip(py, torch, *more) and pip(py, torch, '--extra-index-url', TORCH, *more): raise SystemExit(f'{torch} was found neither by pip as it is set up here nor at {TORCH}.')
    if pip(py, '-r', LOCK, *more): raise SystemExit(f'Not everything in {LOCK} could be installed; pip says above what was not.')
    if subprocess.run([py, '-c', CHECK]).returncode: raise SystemExit(f'Everything was installed into {folder}, and vLLM can not be imported; the reason stands above.')
    print(f'made in {time.time()-t:.0f} s: export FTNB_VLLM_PYTHON={py}')

if __name__=='__main__':
    if len(sys.argv)<2: raise SystemExit('Where to? python tools/vllm_env.py .venv-vllm')
    make(*sys.argv[1:])
