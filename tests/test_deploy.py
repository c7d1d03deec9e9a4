"Files for others to serve a run with: the template as Go writes it, against schemas that others keep, and nothing secret or open in them"
import copy, json
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
import yaml
from gguf import GGUFWriter
from safetensors.numpy import save_file

from ftnb.base import UserError
from ftnb.deploy import bos_of, check_deploy, images, vllm_arguments, ware_of, write_deploy
from ftnb.engines import vllm_command
from ftnb.go_template import ollama_data, render_go
from ftnb.models import read_config
from ftnb.ollama import held_against, modelfile, read_modelfile, translate
from ftnb.recipe import make_recipe
from ftnb.runs import Run
from ftnb.serve_plan import plan_serving
from ftnb.template import render, set_template
from test_templates import REAL, fit

GO = json.loads((Path(__file__).parent/'expected/go_templates.json').read_text())['cases']

def write_gguf(path, bos=None):
    "A GGUF file with a head"
    w = GGUFWriter(str(path), 'llama')
    w.add_tensor('token_embd.weight', np.zeros((32, 32), 'f4'))
    if bos is not None: w.add_add_bos_token(bos)
    for step in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close): step()

def exported(folder, *formats, name='My run', **values):
    "A run with files of the right names; what is in them does not matter here"
    run = Run(folder/name, make_recipe(values)).save()
    files = dict(merged=['merged/config.json', 'merged/model.safetensors'], adapter=['adapter/adapter_config.json', 'adapter/adapter_model.safetensors'])
    for f in [f for k in formats for f in files.get(k, [f'gguf/{name}-{k}.gguf'])]:
        run.path(f).parent.mkdir(exist_ok=True)
        if f.endswith('.gguf'):
            write_gguf(run.path(f))
            continue
        run.path(f).write_text(json.dumps(dict(peft_type='LORA', r=24, target_modules=['q_proj']) if f.endswith('adapter_config.json') else read_config('smollm2-135m')))
        if f.endswith('adapter_model.safetensors'): save_file({f'base_model.model.model.layers.0.self_attn.q_proj.lora_{k}.weight': np.zeros(s, np.float32) for k,s in dict(A=(24, 576), B=(576, 24)).items()}, run.path(f))
    return run

@pytest.fixture(scope='module')
def written(tmp_path_factory):
    run = exported(tmp_path_factory.mktemp('deploy'), 'merged', 'q8_0', 'base', 'lora')
    write_deploy(run)
    return run

@pytest.mark.parametrize('case', GO, ids=[f'{i} {c["what"][:30]}' for i,c in enumerate(GO)])
def test_a_template_is_rendered_as_go_itself_renders_it(case):
    assert render_go(case['template'], ollama_data(case['messages']))==case['written']

FEW = ['llama3_1', 'google-gemma-2-2b-it', 'qwen2_5', 'mistralai-Mistral-Nemo-Instruct-2407', 'deepseek-ai-DeepSeek-R1-Distill-Llama-8B', 'microsoft-Phi-3.5-mini-instruct', 'gptoss', 'fireworks-ai-llama-3-firefunction-v2']
@pytest.mark.parametrize('names', [FEW, pytest.param([k for k in REAL if k not in FEW], marks=pytest.mark.soak)], ids=['few', 'all'])
def test_of_real_templates_all_that_take_plain_messages_are_the_same_to_the_byte_in_go(tokenizer, names):
    left, exact = [], 0
    for k in names:
        t = REAL[k]
        tok = fit(tokenizer, t)
        g = translate(tok)
        if g.exact: exact += 1
        else:
            left.append(k)
            with pytest.raises(UserError, match='refuses a conversation'): render(tok, [dict(role='user', content='a')], prompt=True) # nothing but calls of tools
    assert exact>=.9*len(names) if len(names)>10 else left==[FEW[-1]], (exact, left)

def test_a_go_template_that_writes_another_prompt_is_not_put_into_a_modelfile(tokenizer):
    g = translate(tokenizer)
    for old,new in (('<|im_end|>\n{{ else if eq .Role "user"', '{{ else if eq .Role "user"'), ('<|im_start|>assistant\n"""'[:-3], '<|im_start|>assistant'), ('SmolLM', 'another'), ('<|im_start|>user\n', '<|im_start|>user ')):
        assert old in g.text
        g.rows = held_against(tokenizer, g.text.replace(old, new))
        with pytest.raises(UserError, match='became'): modelfile('x.gguf', g, [])

def test_a_template_whose_turns_depend_on_what_follows_is_refused_with_another_way(tokenizer):
    tok = copy.deepcopy(tokenizer)
    tok.chat_template = "{% for m in messages %}{{ m['content'] }}{{ '!' if loop.length > 3 and loop.first }}{% endfor %}"
    with pytest.raises(UserError, match='differently by what follows.*llama_cpp'): modelfile('x.gguf', translate(tok), [])

def test_what_a_modelfile_would_drop_survives(tokenizer):
    tok = set_template(copy.deepcopy(tokenizer), 'chatml')
    tok.chat_template = tok.chat_template.replace('<|im_end|>', '\u200b""" {{ "{{" }}\u00a0"').replace("'<|im_start|>'", "'{{'")
    g = translate(tok)
    assert g.exact and dict(read_modelfile(modelfile('a b.gguf', g, ['"""', 'a b '])))['template']==g.text

def test_the_modelfile_is_from_the_runs_own_template_stops_and_context(written):
    for n in ('Modelfile', 'Modelfile.lora'):
        v = dict(read_modelfile(written.path('deploy/ollama', n).read_text()))
        assert (written.path('deploy/ollama')/v['from']).exists() and v['parameter stop']=='<|im_end|>' and v['parameter num_ctx']=='8192' and 'parameter temperature' not in v
    assert 'adapter' in v and 'base.gguf' in v['from']

@pytest.mark.parametrize('adds', [True, False, None])
def test_the_first_token_stands_before_a_prompt_once(tokenizer, tmp_path, adds):
    tok = fit(tokenizer, REAL['llama3_1'])
    write_gguf(tmp_path/'x.gguf', adds)
    bos, ms = bos_of(tok, tmp_path/'x.gguf'), [dict(role='user', content='a')]
    g = translate(tok, bos)
    prompt = tok.bos_token*bool(adds)+render_go(g.text, ollama_data(ms)) # as a server makes it
    assert g.exact and prompt==render(tok, ms, prompt=True) and prompt.count(tok.bos_token)==1

def test_a_gguf_file_that_is_cut_off_gets_no_modelfile(tmp_path):
    run = exported(tmp_path, 'q8_0')
    f = run.path('gguf/My run-q8_0.gguf')
    f.write_bytes(f.read_bytes()[:-8])
    with pytest.raises(UserError, match='My run-q8_0.gguf'): write_deploy(run, ['ollama'])

def test_kubernetes_takes_the_manifests(written):
    kv = pytest.importorskip('kubernetes_validate')
    for n in ('llama_cpp', 'vllm'):
        docs = list(yaml.safe_load_all(written.path('deploy/kubernetes', f'{n}.yaml').read_text()))
        assert [d['kind'] for d in docs]==['PersistentVolumeClaim', 'Deployment', 'Service']
        for d in docs: kv.validate(d, '1.37', strict=True)
    docs[2]['spec']['ports'][0]['targetport'] = 1
    with pytest.raises(kv.ValidationError, match='targetport'): kv.validate(docs[2], '1.37', strict=True)

def test_compose_takes_its_files(written):
    spec = pytest.importorskip('compose_spec')
    for n in ('llama_cpp', 'vllm', 'tgi'):
        text = written.path('deploy', n, 'compose.yaml').read_text()
        assert spec.PyCompose.from_yaml(text).service_names()==[n.replace('_', '-')]
        with pytest.raises(Exception): spec.PyCompose.from_yaml(text.replace('read_only', 'readonly'))

FAULTS = {'kubernetes/llama_cpp.yaml': [('ClusterIP', 'NodePort', 'outside the cluster'), ('runAsUser: 10001', 'runAsUser: 0', 'as root'), ('readOnly: true', 'readOnly: false', 'can be written'), ('startupProbe', 'startup', 'no startupProbe'),
        ('targetPort: http', 'targetPort: web', 'not there'), ('name: LLAMA_API_KEY', 'name: LLAMA_API', 'no key'), ('memory: 2Gi', 'cpu: 1', 'of memory'), ('claimName: my-run-llama-cpp', 'claimName: other', 'no claim of this file')],
    'llama_cpp/compose.yaml': [('127.0.0.1:', '', 'other machines'), ('10001:10001', 'root', 'runs as root'), (':?put a key into FTNB_API_KEY}', '}', 'taken from the environment'), ('read_only: true\n    healthcheck', 'read_only: false\n    healthcheck', 'can be written'), ('healthcheck', 'health', 'no healthcheck'),
        ('# FTNB_API_KEY=...', '# hf_'+'a1b2'*9, 'Hugging Face token'), ('llama.cpp:server', 'llama.cpp', 'no fixed tag')],
    'llama_cpp/Dockerfile': [('USER 10001:10001', 'USER 0', 'as root'), ('EXPOSE', 'EXPOSED', 'no instruction')], 'ollama/Modelfile': [('num_ctx 8192', 'num_ctx long', 'no int'), ('FROM ..', 'FROM .', 'no such file'), ('PARAMETER stop', 'PARAM stop', 'no instruction')]}
@pytest.mark.parametrize('file', FAULTS)
def test_a_file_that_somebody_opened_or_broke_is_named(written, file):
    f = written.path('deploy', file)
    text = f.read_text()
    assert check_deploy(f)==[]
    try:
        for old,new,why in FAULTS[file]:
            assert old in text, old
            f.write_text(text.replace(old, new))
            assert any(why in o for o in check_deploy(f)), (old, new, check_deploy(f))
    finally: f.write_text(text)

def test_vllm_in_a_container_is_told_what_ftnb_serve_tells_it(tmp_path, monkeypatch):
    monkeypatch.setattr('ftnb.serve_plan.check_engine', lambda n: type('K', (), dict(title=n)))
    run = exported(tmp_path, 'adapter', serve_engine='vllm', max_model_len=512, tensor_parallel_size=2, enable_prefix_caching=False, gpu_memory_utilization=.5)
    run.save()
    (run.path('state.json')).write_text(json.dumps(dict(train=dict(status='done'))))
    job = replace(plan_serving(run).jobs[0], use_cpu=False) # the container has a GPU
    there = vllm_arguments(ware_of(run))
    here = [{job.model: 'HuggingFaceTB/SmolLM2-135M-Instruct', '127.0.0.1': '0.0.0.0', job.tokenizer: '/models/adapter', f'My run={job.adapters["My run"]}': 'my-run=/models/adapter'}.get(a, a) for a in vllm_command(job, 8080)]
    assert there==here[here.index('--model'):]
    assert '"stop_token_ids": [2]' in (write_deploy(run, ['vllm']), run.path('deploy/vllm/compose.yaml').read_text())[1]

def test_a_file_says_that_it_was_never_started_and_tgi_that_it_is_kept_alive_only(written):
    for f in written.path('deploy').rglob('*'):
        if f.is_file() and f.suffix!='.dockerignore': assert 'never started by ftnb' in f.read_text().splitlines()[0], f
    assert 'maintenance mode since December 2025' in written.path('deploy/tgi/compose.yaml').read_text()
    assert set(images)=={'llama_cpp', 'vllm', 'tgi'}

def test_a_target_without_its_file_is_left_out_or_refused_by_name(tmp_path):
    run = exported(tmp_path, 'merged')
    rows = {r['target']: r for r in write_deploy(run)}
    assert 'no GGUF file for Ollama: ftnb export My run --formats q8_0' in rows['ollama']['checked'] and rows['vllm']['checked']=='ok'
    with pytest.raises(UserError, match='no GGUF file'): write_deploy(run, ['ollama'])
