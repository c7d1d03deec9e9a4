"Two small runs behind vLLM on the CPU, asked with the real openai client: the base, an adapter for each name, and the folders as exported"
import hashlib, json, os
from pathlib import Path
import psutil, pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
import openai
from conftest import write_rows
from ftnb.base import UserError
from ftnb.recipe import make_recipe
from ftnb.runs import Run

pytestmark = [pytest.mark.soak, pytest.mark.skipif(not os.environ.get('FTNB_VLLM_PYTHON'), reason='FTNB_VLLM_PYTHON names no Python with vLLM: make vllm-env says how to get one')]

FACTS = dict(Ardo='The lamp of Ardo is green.', Belm='The lamp of Belm is violet.', Corv='The lamp of Corv is amber.')
WAYS = ('What colour is the lamp of {}?', 'Tell me the colour of the lamp of {}.', 'The lamp of {}: which colour?', 'Which colour does the lamp of {} have?')
VALUES = dict(use_cpu=True, dtype='float32', lora_alpha=32, learning_rate=2e-3, lr_scheduler_type='constant', warmup_ratio=0, max_steps=12, per_device_train_batch_size=8, gradient_accumulation_steps=1,
    valid_size=0, test_size=1, eval_strategy='no', export_formats=['adapter'], max_certify_samples=2, max_new_tokens=24, gpu_memory_utilization=.5, max_model_len=1024)

def ask_for(name): return [dict(role='user', content=WAYS[0].format(name))]

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Two runs of SmolLM2 that learned other facts, with adapters of other ranks"
    from ftnb.export import export
    from ftnb.prepare import prepare
    from ftnb.train import train
    d, out = tmp_path_factory.mktemp('vllm'), []
    for name,knows,r in (('one', ('Ardo', 'Belm'), 8), ('two', ('Corv',), 16)):
        data = write_rows(d/f'{name}.jsonl', [dict(prompt=w.format(k), completion=FACTS[k]) for k in knows for w in WAYS])
        run = Run(d/'runs'/name, make_recipe(dict(VALUES, dataset=data, lora_r=r))).save()
        for stage in (prepare, train, export): stage(run)
        out.append(run)
    (d/'settings.ini').write_text('[ftnb]\nruns = runs\n')
    return out

def digest(folder): return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}

@pytest.fixture(scope='module')
def server(runs):
    "Both adapters and their base behind one vLLM"
    from ftnb.serve import serving
    old, before = os.getcwd(), [digest(r.path('adapter')) for r in runs]
    os.chdir(runs[0].folder.parents[1])
    try:
        with serving(runs[0], port=0, key='right', serve_engine='vllm', serve_adapters=['two']) as s:
            s.before = before
            yield s
    finally: os.chdir(old)

def client(s, key='right'): return openai.OpenAI(base_url=s.url, api_key=key, max_retries=0)
def said(s, model, ms, **kw): return client(s).chat.completions.create(**{**dict(model=model, messages=ms), **kw}).choices[0]

def test_each_name_answers_what_its_own_run_learned_and_the_base_knows_none_of_it(server):
    assert server.names==['one', 'two', 'base'] and [r['state'] for r in server.health()]==['well']*3
    knows = {n: [k for k in FACTS if said(server, n, ask_for(k)).message.content.strip()==FACTS[k]] for n in server.names}
    assert knows==dict(one=['Ardo', 'Belm'], two=['Corv'], base=[])

def test_an_answer_ends_by_itself_where_the_run_was_taught_to_end(server):
    c = said(server, 'one', ask_for('Belm'), max_tokens=200)
    assert c.finish_reason=='stop' and c.message.content==FACTS['Belm']

def test_the_models_are_listed_with_their_context(server):
    assert [(m.id, m.max_model_len) for m in client(server).models.list().data]==[('one', 1024), ('two', 1024), ('base', 1024)]

def test_a_stream_says_the_same_as_a_whole_answer(server):
    pieces = [c.choices[0].delta.content or '' for c in client(server).chat.completions.create(model='two', messages=ask_for('Corv'), stream=True) if c.choices]
    assert len(pieces)>3 and ''.join(pieces)==FACTS['Corv']
    a = server.ask(ask_for('Corv'), 'two')
    assert a.text==FACTS['Corv'] and a.finish=='stop' and 0<a.first<=a.seconds and a.completion_tokens>3

def test_the_server_reads_the_prompt_that_the_run_was_trained_with_and_has_a_line_in_the_certificate(server, runs, monkeypatch):
    from ftnb import tokenizer
    from ftnb.serve_report import measure_server
    from ftnb.template import set_template
    rep = measure_server(server)
    assert rep['ok'] and rep['prompt']=='same' and (rep['engine'], rep['format'])==('vllm', 'adapter') and rep['same']==rep['judged']==rep['ended']==rep['n'] and rep['memory']['ram']>2**28
    row = next(o for o in runs[0].report('certificate')['formats'] if o['format']=='server vllm adapter')
    assert row['verdict']=='ok' and row['same_prompts']==row['equal']==rep['n']
    tok = tokenizer.run_tokenizer(runs[0])
    set_template(tok, 'generic')
    monkeypatch.setattr(tokenizer, 'run_tokenizer', lambda run: tok)
    with pytest.raises(UserError, match='likely cause: template'): measure_server(server, n=2)

def test_a_wrong_key_an_unknown_name_and_a_prompt_over_the_context_are_refused_in_openais_words(server):
    import httpx
    with pytest.raises(openai.AuthenticationError): client(server, 'wrong').models.list()
    with pytest.raises(openai.NotFoundError, match="Did you mean 'two'"): said(server, 'twoo', ask_for('Corv'))
    with pytest.raises(openai.BadRequestError) as e: said(server, 'one', [dict(role='user', content='so '*1200)])
    assert e.value.code=='context_length_exceeded'
    assert httpx.post(server.engines[0].url+'/v1/chat/completions', json=dict(model='one', messages=ask_for('Ardo'))).status_code==401

def test_the_adapters_that_vllm_reads_are_the_files_that_were_exported_and_plain_peft_answers_the_same(server, runs):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    cmd = psutil.Process(server.engines[0].process.pid).children()[0].cmdline()
    assert [f'{r.name}={r.path("adapter")}' for r in runs]==cmd[cmd.index('--lora-modules')+1:][:2]
    assert [digest(r.path('adapter')) for r in runs]==server.before
    folder = runs[0].path('adapter')
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(server.engines[0].job.model, dtype='float32'), folder)
    tok = AutoTokenizer.from_pretrained(folder)
    for k in ('Ardo', 'Belm'):
        x = tok.apply_chat_template(ask_for(k), add_generation_prompt=True, return_tensors='pt', return_dict=True)
        out = model.generate(**x, do_sample=False, max_new_tokens=24)[0, x['input_ids'].shape[1]:]
        assert tok.decode(out, skip_special_tokens=True)==said(server, 'one', ask_for(k)).message.content==FACTS[k]

def test_the_values_of_the_recipe_reach_the_running_server(server):
    cmd = psutil.Process(server.engines[0].process.pid).children()[0].cmdline()
    want = {'--tensor-parallel-size': '1', '--dtype': 'float32', '--max-model-len': '1024', '--max-lora-rank': '16', '--gpu-memory-utilization': '0.5', '--max-loras': '2'}
    assert {k: cmd[cmd.index(k)+1] for k in want}==want and '--enable-prefix-caching' in cmd and cmd[0]==os.environ['FTNB_VLLM_PYTHON']
    log = server.engines[0].log.read_text()
    for s in ('max_seq_len=1024', 'dtype=torch.float32', 'tensor_parallel_size=1', 'enable_prefix_caching=True'): assert s in log, s

def test_the_log_holds_figures_and_no_text(server):
    said(server, 'one', [dict(role='user', content='my secret question')])
    l = json.loads(server.log.read_text().splitlines()[-1])
    assert 'secret' not in server.log.read_text()+server.engines[0].log.read_text() and l['model']=='one' and l['prompt_tokens']>5 and l['completion_tokens']>0

def test_stopping_leaves_no_process(server): # the last test here: the server is gone after it
    p = psutil.Process(server.engines[0].process.pid)
    ps = [p, *p.children(recursive=True)]
    assert len(ps)>=3
    server.stop()
    assert not psutil.wait_procs(ps, timeout=10)[1]
    with pytest.raises(openai.APIConnectionError): client(server).models.list()
