"""What the vendors' own encoders make of the conversations of `tests/expected/conversations.json`, for tests/test_vendors.py

Each encoder wants an environment of its own, for each brings a package that others trip over:
    python -m venv meta && meta/bin/pip install llama-models==0.3.0 && meta/bin/python tools/vendor_prompts.py llama
    python -m venv mistral && mistral/bin/pip install mistral-common==1.13.1 sentencepiece && mistral/bin/python tools/vendor_prompts.py mistral
"""
import json, sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]/'tests/expected'
TALKS = json.loads((HERE/'conversations.json').read_text())

def llama():
    "The text of Meta's ChatFormat, one dialogue at a time"
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer
    f = ChatFormat(Tokenizer.get_instance())
    def text(ms): return f.tokenizer.decode(f.encode_dialog_prompt([RawMessage(role=m['role'], content=m['content']) for m in ms]).tokens)
    dates = 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' # as Meta's page on the prompt format of Llama 3.1 has it, which the template writes by itself
    def dated(ms):
        sys, rest = (ms[0]['content'], ms[1:]) if ms[0]['role']=='system' else ('', ms)
        return [dict(role='system', content=dates+sys), *rest]
    return 'llama-models', dict(llama3={n: text(ms) for n,ms in TALKS.items()}, llama3_1={n: text(dated(ms)) for n,ms in TALKS.items()})

def mistral():
    "The pieces of mistral-common's tokenizers, with sentencepiece's marks written out"
    from mistral_common.protocol.instruct import messages as M
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    kinds = dict(system=M.SystemMessage, user=M.UserMessage, assistant=M.AssistantMessage)
    def text(tok, ms): return tok.encode_chat_completion(ChatCompletionRequest(messages=[kinds[m['role']](content=m['content']) for m in ms])).text
    makers = dict(v1=MistralTokenizer.v1(), v3=MistralTokenizer.v3(), v3_tekken=MistralTokenizer.v3(is_tekken=True), v7=MistralTokenizer.v7())
    return 'mistral-common', {v: {n: text(t, ms) for n,ms in TALKS.items()} for v,t in makers.items()}

if __name__=='__main__':
    name, out = dict(llama=llama, mistral=mistral)[sys.argv[1]]()
    path = HERE/f'{sys.argv[1]}.json'
    path.write_text(json.dumps(dict(source=f'{name} {version(name)}', prompts=out), indent=1, ensure_ascii=False)+'\n')
    print(path, {k: len(v) for k,v in out.items()})
