"Runs behind real engines, asked with the real openai client: llama.cpp with adapters by name, transformers serve, and the command line"
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, psutil, pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
import openai
from conftest import make_tiny
from ftnb.base import UserError, write_json
from ftnb.recipe import make_recipe
from ftnb.runs import Run
from ftnb.serve import Server, serving
from ftnb.serve_plan import choose, exported, plan_serving, with_values

HI = [dict(role='user', content='What is 3 times 6?')]
LONG = [dict(role='user', content='so '*600)]

def make_lora(path, seed, rank=4, width=32, blocks=2):
    "A random adapter as GGUF"
    from gguf import GGUFWriter
    rng, w = np.random.default_rng(seed), GGUFWriter(str(path), 'llama')
    w.add_type('adapter'); w.add_string('adapter.type', 'lora'); w.add_float32('adapter.lora.alpha', 64.)
    for i in range(blocks):
        for part,n_in,n_out in (('ffn_down', 2*width, width), ('attn_v', width, width//2)):
            w.add_tensor(f'blk.{i}.{part}.weight.lora_a', rng.normal(size=(rank, n_in)).astype('float32'))
            w.add_tensor(f'blk.{i}.{part}.weight.lora_b', rng.normal(size=(n_out, rank)).astype('float32'))
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Two runs on one tiny base, with everything that an engine reads"
    from ftnb.converter import convert
    from ftnb.prepare import prepare
    from conftest import short_rows, write_rows
    d = tmp_path_factory.mktemp('serve')
    base = make_tiny(d/'base', initializer_range=.3)
    data = write_rows(d/'rows.jsonl', short_rows(12))
    convert(base, d/'base.gguf', 'f16')
    out = []
    for i,name in enumerate(('one', 'two')):
        run = Run(d/'runs'/name, make_recipe(dict(model_name_or_path=base, dataset=data, use_cpu=True, n_threads=1, n_parallel=1, max_new_tokens=8, valid_size=1, test_size=3))).save()
        prepare(run)
        run.path('gguf').mkdir()
        for k in ('base', f'{name}-f16'): shutil.copy(d/'base.gguf', run.path('gguf', f'{k}.gguf'))
        make_lora(run.path('gguf', f'{name}-lora.gguf'), i)
        shutil.copytree(base, run.path('merged'))
        write_json(run.path('state.json'), dict(train=dict(status='done')))
        out.append(run)
    (d/'settings.ini').write_text('[ftnb]\nruns = runs\n')
    return out

@pytest.fixture(autouse=True)
def here(request, monkeypatch):
    if 'runs' in request.fixturenames or 'server' in request.fixturenames: monkeypatch.chdir(request.getfixturevalue('runs')[0].folder.parents[1])
    monkeypatch.delenv('FTNB_API_KEY', raising=False)

@pytest.fixture(scope='module')
def server(runs, request):
    "Both adapters and the base behind llama.cpp"
    old = os.getcwd()
    os.chdir(runs[0].folder.parents[1])
    with serving(runs[0], port=0, key='right', serve_adapters=['two']) as s:
        os.chdir(old)
        yield s

def client(s, key='right'): return openai.OpenAI(base_url=s.url, api_key=key, max_retries=0)
def said(s, model, ms=HI, **kw): return client(s).chat.completions.create(**{**dict(model=model, messages=ms), **kw}).choices[0].message.content

TWO = [[dict(role='user', content=f'{w} '*60)] for w in ('rivers', 'mountains')]
def test_each_name_answers_as_its_own_adapter_whoever_was_asked_before(server):
    alone = {(n, q): said(server, n, ms) for n in server.names for q,ms in enumerate(TWO)}
    assert server.names==['one', 'two', 'base'] and len(set(alone.values()))==6
    order = 'one0 two1 two0 base0 two0 base1 one1 two0 two1 one1 base1 base0 two0 two1 one0 base0 one1'.split() # one slot: what was computed for the one before is still there
    for k in order: assert said(server, k[:-1], TWO[int(k[-1])])==alone[k[:-1], int(k[-1])], k

def test_the_models_are_listed(server):
    ms = client(server).models.list().data
    assert [(m.id, m.max_model_len) for m in ms]==[(n, 512) for n in ('one', 'two', 'base')]
    assert [r['state'] for r in server.health()]==['well']*3

def test_a_stream_says_the_same_as_a_whole_answer(server):
    pieces = [c.choices[0].delta.content or '' for c in client(server).chat.completions.create(model='two', messages=HI, stream=True)]
    assert len(pieces)>3 and ''.join(pieces)==said(server, 'two')
    a = server.ask(HI, 'two')
    assert a.text==''.join(pieces) and 0<a.first<=a.seconds and a.completion_tokens==8

@pytest.mark.parametrize('stream', [False, True])
def test_a_prompt_over_the_context_is_a_400_that_says_how_long_it_is(server, stream):
    with pytest.raises(openai.BadRequestError) as e: client(server).chat.completions.create(model='one', messages=LONG, stream=stream)
    assert e.value.code=='context_length_exceeded' and 'tokens, and one takes 512' in e.value.body['message']

def test_a_wrong_key_is_401_and_an_unknown_model_404(server):
    with pytest.raises(openai.AuthenticationError): client(server, 'wrong').models.list()
    with pytest.raises(openai.NotFoundError, match="Did you mean 'two'"): said(server, 'twoo')

def test_the_engine_itself_wants_a_key_of_its_own(server):
    import httpx
    assert httpx.post(server.engines[0].url+'/v1/chat/completions', json=dict(messages=HI)).status_code==401

def test_a_client_that_leaves_frees_the_only_slot_at_once(server):
    def leave():
        for c in (st := client(server).chat.completions.create(model='one', messages=HI, stream=True, max_tokens=450, extra_body=dict(ignore_eos=True))):
            if c.choices and c.choices[0].delta.content: break
        st.close()
        assert said(server, 'base', max_tokens=2)
        return [l['completion_tokens'] for l in map(json.loads, server.log.read_text().splitlines()) if l['status']==499]
    got = next((n for _ in range(10) if (n := leave())), None) # the tiny model is fast: it may have said all before the client is gone
    assert got and got[-1]<450

def test_the_log_holds_figures_and_no_text(server):
    said(server, 'one', [dict(role='user', content='my secret question')])
    l = json.loads(server.log.read_text().splitlines()[-1])
    assert 'secret' not in server.log.read_text()+server.engines[0].log.read_text() and l['model']=='one' and l['prompt_tokens']>5 and l['completion_tokens']==8 and l['seconds']>0

def test_the_prompt_is_the_runs_own_and_a_tokenizer_of_another_template_is_told(server, runs, monkeypatch):
    from ftnb import tokenizer
    from ftnb.serve_report import measure_server, server_table
    from ftnb.template import set_template
    rep = measure_server(server, n=2, limit=4)
    assert rep['ok'] and rep['prompt']=='same' and rep['certificate']['same_prompts']==rep['n']==2 and rep['memory']['ram']>2**20 and rep==runs[0].report('serve') and rep['line'] in rep.values()
    row, = server_table(rep)
    assert row['same prompt']=='2 of 2' and row['verdict']=='ok'
    tok = tokenizer.run_tokenizer(runs[0])
    set_template(tok, 'generic')
    monkeypatch.setattr(tokenizer, 'run_tokenizer', lambda run: tok)
    with pytest.raises(UserError, match="llama.cpp does not answer as one's gguf-lora file: likely cause: template .*in training"): measure_server(server, n=2, limit=4)
    assert runs[0].report('serve')['ok'] is False and runs[0].report('serve')['certificate']['cause']=='template'

def test_a_taken_port_is_told_before_anything_is_loaded(server, runs):
    t = time.time()
    with pytest.raises(UserError, match=f'Port {server.port} on 127.0.0.1 is taken by process {os.getpid()}'): Server(runs[1], port=server.port)
    assert not runs[1].path('logs').exists()

def test_stopping_leaves_no_process(runs):
    with serving(runs[1], port=0) as s:
        assert s.names==['two'] and s.plan.format=='f16'
        pids = [p.pid for p in psutil.Process(s.engines[0].process.pid).children(recursive=True)]+[s.engines[0].process.pid]
    assert pids and not [p for p in pids if psutil.pid_exists(p)]
    with pytest.raises(openai.APIConnectionError): client(s).models.list()

def test_transformers_serve_answers_the_same_client(runs):
    with serving(runs[0], port=0, key='right', serve_engine='transformers') as s:
        c = client(s)
        whole = said(s, 'one')
        pieces = [k.choices[0].delta.content or '' for k in c.chat.completions.create(model='one', messages=HI, stream=True)]
        assert ''.join(pieces)==whole and c.chat.completions.create(model='one', messages=HI).model=='one'
        with pytest.raises(openai.BadRequestError, match='and one takes 512'): said(s, 'one', LONG)
        with pytest.raises(openai.NotFoundError, match="Did you mean 'one'"): said(s, 'onee')
        with pytest.raises(openai.AuthenticationError): client(s, 'x').models.list()
        for k in (st := c.chat.completions.create(model='one', messages=HI, stream=True, max_tokens=400)):
            if k.choices[0].delta.content: break
        st.close()
        pid = s.engines[0].process.pid
    assert not psutil.pid_exists(pid) and json.loads(s.log.read_text().splitlines()[-1])['status'] in (499, 200)

@pytest.mark.soak
def test_transformers_serve_gives_each_name_a_process(runs):
    with serving(runs[0], port=0, key='right', serve_engine='transformers', serve_adapters=['two', 'base']) as s:
        assert s.names==['one', 'two', 'base'] and len(s.engines)==3 and all(said(s, n) for n in s.names)

FTNB = [sys.executable, '-c', 'from ftnb.cli import main; main()']
def test_ftnb_serve_says_how_to_ask_and_ends_with_ctrl_c(runs):
    p = subprocess.Popen([*FTNB, 'serve', 'two', '--port', '0'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        first = p.stdout.readline()
        assert first.startswith('two answers at http://127.0.0.1:')
        rest = [p.stdout.readline() for _ in range(9)]
        assert all(w in ''.join(rest) for w in ('curl http://127.0.0.1', 'from openai import OpenAI', 'requests.jsonl', 'Ctrl-C'))
        assert openai.OpenAI(base_url=first.split()[-1], api_key='none').chat.completions.create(model='two', messages=HI).choices[0].message.content
        below = [c.pid for c in psutil.Process(p.pid).children(recursive=True)]
        for s in (signal.SIGINT, signal.SIGINT, signal.SIGTERM): # an impatient person, and whatever started it
            os.kill(p.pid, s)
            time.sleep(.02)
        out, err = p.communicate(timeout=30)
        assert p.returncode==0 and err.strip()=='stopped' and below and not [c for c in below if psutil.pid_exists(c)]
    finally: p.kill()

def test_an_engine_that_is_killed_ends_ftnb_serve_with_a_sentence(runs):
    p = subprocess.Popen([*FTNB, 'serve', 'two', '--port', '0', '--json'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while '"log"' not in p.stdout.readline(): pass
        engine, = [c for c in psutil.Process(p.pid).children(recursive=True) if not c.children() and 'llama_process' in ' '.join(c.cmdline())]
        engine.kill()
        _, err = p.communicate(timeout=30)
        assert p.returncode==1 and 'llama.cpp ended' in err and 'signal SIGKILL' in err and 'Traceback' not in err
    finally: p.kill()

def test_what_can_not_be_served_is_one_sentence_with_the_command(runs, tmp_path):
    one, _ = runs
    def why(run, **kw):
        with pytest.raises(UserError) as e: Server(with_values(run, **kw), port=0)
        return str(e.value)
    new = Run(tmp_path/'new', make_recipe(dict(model_name_or_path=one.recipe.model_name_or_path))).save()
    assert 'new is not trained, so there is nothing to serve: ftnb run new --to export' in why(new)
    from ftnb.bench_serve import bench_serve
    with pytest.raises(UserError, match='new is not trained, so there is nothing to measure: ftnb run new --to export'): bench_serve(new)
    write_json(new.path('state.json'), dict(train=dict(status='done')))
    assert 'ftnb export new --formats q8_0' in why(new)
    shutil.copytree(one.path('merged'), new.path('merged'))
    assert '--engine transformers' in why(new)
    assert 'ftnb export one --formats q4_k_m' in why(one, serve_format='q4_k_m')
    assert 'serve_engine: transformers' in why(one, serve_format='merged')
    assert 'leave serve_format out' in why(one, serve_format='f16', serve_adapters=['two'])
    assert "Did you mean 'two'?" in why(one, serve_adapters=['tow'])
    assert '9,999 is more than the 512 tokens' in why(one, max_model_len=9999)
    assert 'FTNB_API_KEY' in why(one, host='0.0.0.0')

def test_a_damaged_file_is_one_sentence_before_anything_starts(runs, tmp_path):
    run = Run(shutil.copytree(runs[1].folder, tmp_path/'two', ignore=shutil.ignore_patterns('logs')))
    f = run.path('gguf', 'two-f16.gguf')
    f.write_bytes(f.read_bytes()[:-200_000])
    with pytest.raises(UserError, match='two-f16.gguf'): Server(run, port=0)
    f.write_bytes(b'')
    with pytest.raises(UserError, match='two-f16.gguf is empty; export it again'): Server(run, port=0)
    f.write_bytes(b'<html>404</html>')
    with pytest.raises(UserError, match='two-f16.gguf is not a GGUF file'): Server(run, port=0)
    assert not run.path('logs').exists()

def test_a_run_on_another_base_or_template_does_not_share_a_server(runs, tmp_path):
    one, two = runs
    other = Run(one.folder.parent/'other', make_recipe(dict(model_name_or_path='smollm2-135m'))).save()
    with pytest.raises(UserError, match='share a base'): plan_serving(with_values(one, serve_adapters=['other']))
    write_json(other.path('recipe.yaml').with_name('manifest.json'), dict(template='x'))
    shutil.copy(one.path('recipe.yaml'), other.path('recipe.yaml'))
    with pytest.raises(UserError, match='another chat template'): plan_serving(with_values(one, serve_adapters=['other']))

def test_vllm_is_given_the_base_the_adapters_and_the_runs_own_tokenizer(runs, monkeypatch):
    from safetensors.numpy import save_file
    monkeypatch.setenv('FTNB_VLLM_PYTHON', sys.executable)
    for i,run in enumerate(runs):
        run.path('adapter').mkdir()
        write_json(run.path('adapter', 'adapter_config.json'), dict(peft_type='LORA', r=4*(i+1), target_modules=['q_proj']))
        save_file(dict(a=np.zeros((2, 2), 'float32')), run.path('adapter', 'adapter_model.safetensors'))
    p = plan_serving(with_values(runs[0], serve_engine='vllm', serve_adapters=['two']))
    j, = p.jobs
    assert p.format=='adapter' and j.adapters==dict(one=str(runs[0].path('adapter')), two=str(runs[1].path('adapter'))) and j.max_lora_rank==8 and j.tokenizer==str(runs[0].path('adapter'))
    assert j.model==runs[0].recipe.model_name_or_path and p.names==dict(one=(0, 'one'), two=(0, 'two'), base=(0, None))
    assert j.use_cpu and j.cache_bytes>2**16 and j.max_model_len==512 # on a CPU, where vLLM would ask for nine tenths of all memory
    with pytest.raises(UserError, match='max_lora_rank: 4 is less than the rank 8'): plan_serving(with_values(runs[0], serve_engine='vllm', serve_adapters=['two'], max_lora_rank=4))

@pytest.mark.parametrize('args,says', [(['-p', 'lora_r=3'], 'a server does not read that'), (['--api-key-env', 'MY_KEY'], 'no such environment variable'), (['--host', '0.0.0.0'], 'FTNB_API_KEY'), (['--format', 'q8'], "Did you mean 'q8_0'?\n"), (['--port', '70000'], 'port')])
def test_a_wrong_option_of_ftnb_serve_is_exit_2(runs, capsys, args, says):
    from ftnb.cli import main
    assert main(['serve', 'two', *args])==2
    err = capsys.readouterr().err
    assert says in err and len(err.strip().splitlines())==1

def done(run, *stages):
    "As if these stages had ended well"
    from ftnb.runs import begin, end
    for s in stages: begin(run, s); end(run, s, line=s)
    return run

def test_stage_6_wants_the_export_first(runs, tmp_path, monkeypatch):
    from ftnb.stages import start_stage
    monkeypatch.chdir(tmp_path)
    run = done(Run(shutil.copytree(runs[0].folder, tmp_path/'run')), 'prepare', 'plan', 'train')
    with pytest.raises(UserError, match='is not exported with these values: run 5_export on it first'): start_stage('serve', dict(output_dir=str(run.folder)))

@pytest.mark.soak
def test_stage_6_starts_asks_measures_and_stops(runs, tmp_path):
    from ftnb.stages import run_stage
    run = done(Run(shutil.copytree(runs[0].folder, tmp_path/'run')), 'prepare', 'plan', 'train', 'evaluate', 'export')
    st = run_stage(run, 'serve')
    rep = run.report('serve')
    assert st['status']=='done' and st['line']==rep['line'] and rep['ok'] and rep['n']==3 and run.path('6_serve.ipynb').exists()
    assert not [p for p in psutil.process_iter(['cmdline']) if str(tmp_path) in ' '.join(p.info['cmdline'] or [])]

@pytest.mark.parametrize('more,word', [(dict(modules_to_save=['lm_head']), 'modules_to_save'), (dict(use_dora=True), 'method dora'), (dict(bias='all'), 'bias all'), (dict(init_lora_weights='pissa'), 'init_lora_weights pissa'), (dict(trainable_token_indices=[3]), 'trainable_token_indices')])
def test_an_adapter_that_vllm_does_not_take_is_served_merged_or_refused_by_its_cause(runs, monkeypatch, tmp_path, more, word):
    from safetensors.numpy import save_file
    monkeypatch.setenv('FTNB_VLLM_PYTHON', sys.executable)
    run = Run(shutil.copytree(runs[0].folder, tmp_path/'odd', ignore=shutil.ignore_patterns('logs')))
    run.path('adapter').mkdir(exist_ok=True)
    write_json(run.path('adapter', 'adapter_config.json'), {**dict(peft_type='LORA', r=4, target_modules=['q_proj']), **more})
    save_file(dict(a=np.zeros((2, 2), 'float32')), run.path('adapter', 'adapter_model.safetensors'))
    assert choose(with_values(run, serve_engine='vllm'))[0]=='merged'
    with pytest.raises(UserError, match=f'vLLM takes no adapter with {word}, as that of odd is; serve the merged model: serve_format: merged'): choose(with_values(run, serve_engine='vllm', serve_format='adapter'))
    shutil.rmtree(run.path('merged'))
    with pytest.raises(UserError, match='ftnb export odd --formats merged makes it'): choose(with_values(run, serve_engine='vllm'))
