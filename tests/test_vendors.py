"Prompts of Llama and Mistral: byte for byte what the vendors' own encoders give, made by tools/vendor_prompts.py"
import json, zipfile
from pathlib import Path
from types import SimpleNamespace
import pytest

from ftnb.base import shipped
from ftnb.template import pin_date, render

HERE = Path(__file__).parent
TALKS = json.loads((HERE/'expected/conversations.json').read_text())
LLAMA, MISTRAL = (json.loads((HERE/f'expected/{n}.json').read_text()) for n in ('llama', 'mistral'))
with zipfile.ZipFile(HERE/'templates/llama.cpp.zip') as z: CPP = {n: z.read(f'{n}.jinja').decode() for n in ('meta-llama-Llama-3.1-8B-Instruct', 'mistralai-Mistral-Nemo-Instruct-2407')}

def prompt(tokenizer, template, talk, bos, eos):
    "The prompt of a conversation by a template"
    from transformers.utils.chat_template_utils import render_jinja_template
    t = pin_date(template)
    def apply(ms, tokenize=False, add_generation_prompt=False, tools=None):
        return render_jinja_template([ms], tools=tools, chat_template=t, add_generation_prompt=add_generation_prompt, bos_token=bos, eos_token=eos)[0][0]
    return render(SimpleNamespace(apply_chat_template=apply, chat_template=t, name_or_path='x'), TALKS[talk], prompt=True)

def plain(pieces):
    "Sentencepiece's text as characters"
    import re
    return re.sub('(?:<0x[0-9A-F]{2}>)+', lambda m: bytes(int(h, 16) for h in re.findall('<0x(..)>', m[0])).decode(), pieces).replace('▁', ' ')

# Where the templates differ from the encoders: Meta's template cuts off space around a text, which ChatFormat keeps; Nemo's keeps space after an answer, which mistral-common cuts off;
# version 3 writes the system message before the last question, ftnb's template before the first, where it stays when turns are added
LLAMA_DIFFERS, NEMO_DIFFERS, V3_DIFFERS = {'spaces'}, {'spaces'}, {'system_two'}
@pytest.mark.parametrize('talk', TALKS)
def test_llama_3_1_prompts_are_metas(tokenizer, talk):
    got = prompt(tokenizer, CPP['meta-llama-Llama-3.1-8B-Instruct'], talk, '<|begin_of_text|>', '<|eot_id|>')
    assert (got.encode()==LLAMA['prompts']['llama3_1'][talk].encode()) is (talk not in LLAMA_DIFFERS)

@pytest.mark.parametrize('talk', TALKS)
def test_the_llama3_template_for_base_models_is_metas_without_dates(tokenizer, talk):
    got = prompt(tokenizer, shipped('data', 'templates', 'llama3.jinja').read_text(), talk, '<|begin_of_text|>', '<|eot_id|>')
    assert (got.encode()==LLAMA['prompts']['llama3'][talk].encode()) is (talk not in LLAMA_DIFFERS)

@pytest.mark.parametrize('talk', TALKS)
def test_mistral_nemo_prompts_are_mistrals(tokenizer, talk):
    got = prompt(tokenizer, CPP['mistralai-Mistral-Nemo-Instruct-2407'], talk, '<s>', '</s>')
    assert (got.encode()==MISTRAL['prompts']['v3_tekken'][talk].encode()) is (talk not in NEMO_DIFFERS)

@pytest.mark.parametrize('talk', TALKS)
def test_the_mistral_template_for_base_models_is_that_of_version_3_but_for_the_place_of_the_system_message(tokenizer, talk):
    got = prompt(tokenizer, shipped('data', 'templates', 'mistral.jinja').read_text(), talk, '<s>', '</s>')
    assert (got.encode()==plain(MISTRAL['prompts']['v3'][talk]).encode()) is (talk not in V3_DIFFERS)
