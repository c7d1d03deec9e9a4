"""What the pinned converter of llama.cpp knows, as data/llama_cpp.json: run after its version in nbs/18e_gguf_ready.ipynb has changed.

`python tools/llama_cpp_table.py` fetches the converter if it is not there yet, and writes the architectures with their names in GGUF and the
hashes of the pre-tokenizers. `tests/test_converter.py` holds the file against the converter."""
import json, os, subprocess, sys
from pathlib import Path

from ftnb.base import write_atomic
from ftnb.converter import fetch_converter
from ftnb.gguf_ready import llama_cpp, read_converter

code = '''
import json, logging, sys
logging.disable()
sys.path[:0] = sys.argv[1:]
import gguf
from conversion import ModelBase, ModelType, load_all_models
load_all_models()
print(json.dumps({k: gguf.MODEL_ARCH_NAMES[c.model_arch] for k,c in sorted(ModelBase._model_classes[ModelType.TEXT].items())}))
'''

def table()->dict:
    "Version, architectures, pre-tokenizers and the text that they are told apart by"
    f = fetch_converter()
    p = subprocess.run([sys.executable, '-c', code, str(f/'gguf-py'), str(f)], capture_output=True, text=True, env={k:v for k,v in os.environ.items() if k!='PYTHONPATH'}, check=True)
    known = read_converter(f)
    return dict(version=llama_cpp['version'], **{**known, 'architectures': {k: v for k,v in json.loads(p.stdout.splitlines()[-1]).items() if k in known['architectures']}})

if __name__=='__main__':
    t = table()
    print(write_atomic(Path(__file__).parent.parent/'data/llama_cpp.json', json.dumps(t, indent=0, ensure_ascii=False)+'\n'), len(t['architectures']), 'architectures', len(t['pre']), 'pre-tokenizers')
