"Engines as processes: the commands they get, how they are started, watched and stopped, and the ports they take"
import os, signal, socket, subprocess, sys, time
import psutil, pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
import ftnb.engines as E
from ftnb.base import UserError
from ftnb.engines import Engine, Job, Kind, start_watched, stop_watched, transformers_command, vllm_command
from ftnb.ports import check_host, free_port, is_loopback, listen

def gone(pids, seconds=8):
    "Whether all processes end within some seconds"
    end = time.time()+seconds
    while time.time()<end:
        if not [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status()!=psutil.STATUS_ZOMBIE]: return True
        time.sleep(.05)

def below(pid, n):
    "The processes that a process started, once there are `n`"
    for _ in range(200):
        if len(ps := psutil.Process(pid).children(recursive=True))>=n: return [p.pid for p in ps]
        time.sleep(.05)
    raise AssertionError(f'no {n} processes below {pid}')

def after(cmd, name): return cmd[cmd.index(name)+1]

def test_every_field_of_a_job_reaches_vllm(monkeypatch):
    monkeypatch.setenv('FTNB_VLLM_PYTHON', '/venvs/vllm/bin/python')
    j = Job('/m/base', 'base', '/runs/a/adapter', dict(a='/runs/a/adapter', b='/runs/b/adapter'), 2048, dtype='bfloat16', tensor_parallel_size=2, max_lora_rank=24, enable_prefix_caching=False, gpu_memory_utilization=.5)
    cmd = vllm_command(j, 9000)
    assert cmd[:3]==['/venvs/vllm/bin/python', '-m', 'vllm.entrypoints.openai.api_server'] and '--no-enable-prefix-caching' in cmd and '--trust-remote-code' not in cmd
    want = {'--model': '/m/base', '--served-model-name': 'base', '--tokenizer': '/runs/a/adapter', '--host': '127.0.0.1', '--port': '9000', '--dtype': 'bfloat16', '--tensor-parallel-size': '2', '--max-model-len': '2048', '--gpu-memory-utilization': '0.5', '--max-lora-rank': '32', '--max-loras': '2'}
    assert {k: after(cmd, k) for k in want}==want
    assert cmd[cmd.index('--lora-modules')+1:]==['a=/runs/a/adapter', 'b=/runs/b/adapter']
    plain = vllm_command(Job('/m/merged', 'demo'), 9000)
    assert '--enable-lora' not in plain and '--max-model-len' not in plain and '--enable-prefix-caching' in plain

def test_vllm_on_a_cpu_compiles_nothing_and_is_told_how_much_its_cache_may_take():
    cmd = vllm_command(Job('m', use_cpu=True, cache_bytes=2**30), 1)
    assert '--enforce-eager' in cmd and after(cmd, '--kv-cache-memory-bytes')==str(2**30)
    assert not {'--enforce-eager', '--kv-cache-memory-bytes'} & {*vllm_command(Job('m', cache_bytes=2**30), 1)}

def test_vllm_reports_to_nobody(monkeypatch, tmp_path):
    monkeypatch.setitem(E.engines, 'vllm', E.engines['vllm']._replace(command=lambda j, port: [sys.executable, '-c', 'import os; raise SystemExit("says "+os.environ["VLLM_NO_USAGE_STATS"])'], module='json'))
    monkeypatch.delenv('FTNB_VLLM_PYTHON', raising=False)
    with pytest.raises(UserError, match='says 1'): Engine('vllm', Job('m'), tmp_path/'log')

def test_of_vllms_pages_of_traceback_the_first_error_is_told(monkeypatch, tmp_path):
    lines = ['(APIServer pid=1) ERROR 11-29 02:56:33 [repo_utils.py:126] Error parsing config for adapter: no model_type', *['(VllmWorker-0 pid=3) ERROR 11-29 02:57:34 [multiproc_executor.py:953]   File "worker.py", line 1']*300,
        '(VllmWorker-0 pid=3) ERROR 11-29 02:57:34 [multiproc_executor.py:953] ValueError: Available memory is less than desired', '(EngineCore pid=2) ERROR 11-29 02:57:39 [core.py:1510] Exception: WorkerProc initialization failed', 'RuntimeError: Engine core initialization failed. See root cause above.']
    fake(monkeypatch, f'print({chr(10).join(lines)!r}); raise SystemExit(1)')
    with pytest.raises(UserError, match='ended while it loaded m: ValueError: Available memory is less than desired. Its log'): Engine('llama_cpp', Job('m'), tmp_path/'log')

def test_a_rank_that_vllm_does_not_take_is_one_sentence():
    with pytest.raises(UserError, match='max_lora_rank: 600 .* serve_format: merged'): vllm_command(Job('m', adapters=dict(a='a'), max_lora_rank=600), 1)

def test_no_key_stands_in_a_command():
    for k in E.engines.values(): assert not any('key' in o.lower() for o in k.command(Job('m'), 1) if o.startswith('--'))

def test_the_model_of_transformers_serve_is_positional():
    cmd = transformers_command(Job('/m/merged', use_cpu=True), 9000)
    assert after(cmd, 'serve')=='/m/merged' and after(cmd, '--device')=='cpu' and after(cmd, '--host')=='127.0.0.1'

stubborn = ['sh', '-c', 'trap "" TERM INT; sleep 1000 & sleep 1000 & wait']
def test_stopping_ends_what_the_engine_started_even_if_it_does_not_want_to(tmp_path):
    p = start_watched(stubborn, tmp_path/'log')
    pids = [p.pid, *below(p.pid, 3)]
    stop_watched(p)
    assert gone(pids, 1)

def test_an_engine_ends_with_a_parent_that_was_killed(tmp_path):
    two = ['sh', '-c', 'sleep 1000 & sleep 1000 & wait']
    code = f'import time\nfrom ftnb.engines import start_watched\np = start_watched({two!r}, {str(tmp_path/"log")!r})\nprint(p.pid, flush=True)\ntime.sleep(1000)'
    parent = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    watcher = int(parent.stdout.readline())
    pids = [watcher, *below(watcher, 3)]
    parent.kill(); parent.wait()
    assert gone(pids)

@pytest.mark.skipif(sys.platform!='linux', reason='Linux only')
def test_an_engine_ends_with_its_watcher(tmp_path):
    p = start_watched(['sleep', '1000'], tmp_path/'log')
    child, = below(p.pid, 1)
    p.kill(); p.wait()
    assert gone([child])

def test_ctrl_c_of_the_terminal_reaches_the_parent_only(tmp_path):
    p = start_watched(['sleep', '1000'], tmp_path/'log')
    try: assert os.getpgid(p.pid)!=os.getpgid(0) and os.getpgid(below(p.pid, 1)[0])==os.getpgid(p.pid)
    finally: stop_watched(p)

def fake(monkeypatch, code):
    "An engine that runs some Python; PORT stands for its port"
    monkeypatch.setitem(E.engines, 'llama_cpp', Kind('An engine', lambda j, port: [sys.executable, '-c', code.replace('PORT', str(port))], 'json', '', ''))

def test_an_engine_that_ends_while_it_loads_gives_its_last_lines_and_its_log(monkeypatch, tmp_path):
    fake(monkeypatch, 'raise SystemExit("CUDA out of memory")')
    with pytest.raises(UserError) as e: Engine('llama_cpp', Job('/m/big.gguf'), tmp_path/'log')
    for s in ('ended while it loaded big.gguf', 'CUDA out of memory', 'exit code 1', str(tmp_path/'log')): assert s in str(e.value)

serve_other = '''
import json
from http.server import *
class H(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write(json.dumps({'data': [{'id': 'somebody-else'}]}).encode())
HTTPServer(('127.0.0.1', PORT), H).serve_forever()
'''
def test_a_server_that_lists_another_model_is_not_taken_for_the_engine(monkeypatch, tmp_path):
    fake(monkeypatch, serve_other)
    with pytest.raises(UserError, match='not ready after 1 s'): Engine('llama_cpp', Job('m', 'mine'), tmp_path/'log', timeout=1)
    with Engine('llama_cpp', Job('m', 'somebody-else'), tmp_path/'log') as e: assert e.health()
    assert not e.alive and not e.health()

def test_an_unknown_or_missing_engine_says_what_to_do(monkeypatch):
    with pytest.raises(UserError, match="Did you mean 'llama_cpp'"): E.check_engine('lama_cpp')
    monkeypatch.setenv('FTNB_VLLM_PYTHON', '/nowhere/python')
    with pytest.raises(UserError, match='FTNB_VLLM_PYTHON=/nowhere/python'): E.check_engine('vllm')
    monkeypatch.delenv('FTNB_VLLM_PYTHON')
    monkeypatch.setitem(E.engines, 'vllm', E.engines['vllm']._replace(module='no_such_module'))
    with pytest.raises(UserError, match='vLLM is not installed here: .*FTNB_VLLM_PYTHON'): E.check_engine('vllm')

def test_a_taken_port_is_one_sentence_with_who_has_it_and_a_free_one():
    with listen('127.0.0.1', 0) as s:
        port = s.getsockname()[1]
        with pytest.raises(UserError) as e: listen('127.0.0.1', port)
        assert f'Port {port} on 127.0.0.1 is taken by process {os.getpid()}' in str(e.value)
        other = int(str(e.value).split('; port ')[1].split()[0])
        listen('127.0.0.1', other).close()

def test_a_port_is_free_again_at_once():
    s = listen('127.0.0.1', free_port())
    port = s.getsockname()[1]
    c = socket.create_connection(('127.0.0.1', port)); a, _ = s.accept()
    a.close(); c.close(); s.close()
    listen('127.0.0.1', port).close()

@pytest.mark.parametrize('host', ['0.0.0.0', '::', '192.0.2.7'])
def test_an_address_that_others_reach_needs_a_key(host):
    with pytest.raises(UserError, match=f'host: {host} .* no API key; .* FTNB_API_KEY'): check_host(host)
    check_host(host, 'secret')

def test_this_machine_alone_needs_none():
    for host in ('127.0.0.1', 'localhost', '::1', '127.0.0.5'): assert is_loopback(host); check_host(host)

def test_a_host_that_is_none_is_one_sentence():
    with pytest.raises(UserError, match="'no host' is no address"): is_loopback('no host')
    with pytest.raises(UserError, match='192.0.2.7 is no address of this machine'): listen('192.0.2.7', 0)
