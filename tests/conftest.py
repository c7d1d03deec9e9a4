"What the tests share: no network, a tiny model with a real tokenizer, prepared runs"
import os
os.environ.update(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', HF_HUB_DISABLE_TELEMETRY='1', TOKENIZERS_PARALLELISM='false')

import json
from pathlib import Path
import pytest
from inlab import browser, lab, show # fixtures

ROOT = Path(__file__).parents[1]
TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2)

def make_tiny(folder, kind='llama', **more):
    "Save a tiny random model of a family, with the tokenizer of smollm2, and return its folder as text"
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from ftnb.models import model_path
    tok = AutoTokenizer.from_pretrained(model_path('smollm2-135m'))
    head = dict(head_dim=8) if kind=='gemma2' else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(tok), pad_token_id=0, **{'tie_word_embeddings': True, **TINY, **head, **more})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)

@pytest.fixture(scope='session')
def tokenizer():
    "The tokenizer of smollm2, as a recipe loads it"
    from ftnb.recipe import make_recipe
    from ftnb.tokenizer import load_tokenizer
    return load_tokenizer(make_recipe({}))

@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    "The folder of a tiny random Llama"
    return make_tiny(tmp_path_factory.mktemp('tiny')/'llama')

@pytest.fixture(scope='session')
def demo_rows():
    "The rows of the demo by file name"
    return {s: [json.loads(l) for l in (ROOT/'data/demo'/f'{s}.jsonl').read_text().splitlines()] for s in ('train', 'valid', 'test')}

def write_rows(path, rows):
    "Rows as JSON Lines"
    Path(path).write_text(''.join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False))+'\n' for r in rows))
    return str(path)

def short_rows(n):
    "Short questions and answers of differing length, no two alike"
    return [dict(prompt=f'What is {i} times {i+3}?', completion=f'It is {i*(i+3)}'+', and that is sure'*(i%3)+'.') for i in range(n)]

class Made:
    "Makes prepared runs of the tiny model"
    def __init__(self, tiny, folder): self.tiny, self.folder, self.n = tiny, folder, 0
    def __call__(self, rows=None, **values):
        from ftnb.prepare import prepare
        from ftnb.recipe import make_recipe
        from ftnb.runs import Run
        self.n += 1
        data = write_rows(self.folder/f'rows{self.n}.jsonl', short_rows(26) if rows is None else rows)
        r = make_recipe({**dict(model_name_or_path=self.tiny, dataset=data, dtype='float32', use_cpu=True, peft='full', valid_size=2, test_size=0, eval_strategy='no', save_strategy='no',
            max_steps=2, per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-3, report_to='none'), **values})
        run = Run(self.folder/f'run{self.n}', r).save()
        prepare(run)
        return run

@pytest.fixture
def made(tiny, tmp_path): return Made(tiny, tmp_path)

def pytest_collection_modifyitems(items):
    "The longest files first, so that two test processes end together"
    first = ('test_pipeline', 'test_export', 'test_tutorials', 'test_docs', 'test_browser_run', 'test_run_panel', 'test_eject')
    rank = {n: i for i,n in enumerate(first)}
    items.sort(key=lambda i: rank.get(i.path.stem, len(first)))
