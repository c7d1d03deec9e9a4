"The gateway before a stand-in of an engine: keys, names, streams, clients that leave, engines that fail, and what is written down"
import asyncio, json, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import httpx, pytest, uvicorn
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from ftnb.gateway import Gateway, Model
from ftnb.meter import Meter, Turn
from ftnb.ports import listen

SECRET = 'the patient said so'
http = httpx.Client(verify=False, timeout=20) # no certificates are read for each request

@contextmanager
def running(app):
    "An ASGI application on a port of its own; its address"
    sock = listen('127.0.0.1', 0)
    s = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1))
    t = threading.Thread(target=s.run, kwargs=dict(sockets=[sock]), daemon=True)
    t.start()
    while not s.started: time.sleep(.01)
    try: yield f'http://127.0.0.1:{sock.getsockname()[1]}'
    finally: s.should_exit = True; t.join(5)

def event(**d): return f'data: {json.dumps(dict(model="/path/of/it", **d))}\n\n'.encode()
def word(t): return event(choices=[dict(delta=dict(content=t), index=0)])

class Stand:
    "A stand-in of an engine: answers as the first message says, notes what it was asked and who left"
    def __init__(self): self.asked, self.left, self.go = [], [], threading.Event()
    async def slow(self, what):
        try:
            while not self.go.is_set(): await asyncio.sleep(.02)
        except asyncio.CancelledError: self.left.append(what); raise
    async def chat(self, request):
        body = await request.json()
        self.asked.append((body, request.headers.get('authorization')))
        how = body['messages'][0]['content']
        if how=='broken': return JSONResponse(dict(detail='no such thing'), 422)
        if how=='too long': return JSONResponse(dict(error=dict(message="This model's maximum context length is 64 tokens. However, you requested more.", type='BadRequestError', code=400)), 400)
        if not body.get('stream'):
            gone = asyncio.ensure_future(request.receive())
            while how=='wait' and not self.go.is_set() and not gone.done(): await asyncio.sleep(.02)
            if gone.done(): self.left.append('whole')
            gone.cancel()
            return JSONResponse(dict(model='/path/of/it', choices=[dict(message=dict(role='assistant', content=SECRET), finish_reason='stop', index=0)], usage=dict(prompt_tokens=7, completion_tokens=4)))
        async def said():
            if how=='wait at once': await self.slow('before')
            yield event(choices=[dict(delta=dict(role='assistant'), index=0)])+word('a')
            if how=='wait': await self.slow('middle')
            if how=='error': yield b'data: {"error": "out of memory"}\n\n'; return
            if how=='die': raise RuntimeError('the engine dies')
            b = word('b\u00e9')
            yield b[:len(b)//2]; yield b[len(b)//2:]
            yield event(choices=[], usage=dict(prompt_tokens=7, completion_tokens=4))+b'data: [DONE]\n\n'
        return StreamingResponse(said(), media_type='text/event-stream')

class Seen:
    "A gateway before a stand-in"
    def __init__(self, url, stand, log, gw): self.url, self.stand, self.log, self.gw = url, stand, log, gw
    def ask(self, how='x', key='right', **more):
        return http.post(f'{self.url}/v1/chat/completions', json=dict(dict(model='demo', messages=[dict(role='user', content=how)]), **more), headers={'Authorization': f'Bearer {key}'})
    def stream(self, how, **more):
        return http.stream('POST', f'{self.url}/v1/chat/completions', json=dict(model='demo', messages=[dict(role='user', content=how)], stream=True, **more), headers={'Authorization': 'Bearer right'})
    def lines(self, n=1):
        "The log, once it has `n` lines"
        for _ in range(200):
            ls = self.log.read_text().splitlines() if self.log.exists() else []
            if len(ls)>=n: return [json.loads(l) for l in ls]
            time.sleep(.02)
        raise AssertionError(f'{len(ls)} of {n} lines')

@contextmanager
def front(folder, **more):
    stand, log = Stand(), folder/'requests.jsonl'
    with running(Starlette(routes=[Route('/v1/chat/completions', stand.chat, methods=['POST'])])) as up:
        models = dict(demo=Model(up, 'inner', {'Authorization': 'Bearer of-the-engine'}, dict(lora=[dict(id=0, scale=1.)]), dict(temperature=0., max_tokens=9), 64), base=Model(up, 'inner', {}, dict(lora=[dict(id=0, scale=0.)])))
        gw = Gateway(**{**dict(models=models, key='right', log=log, memory=lambda: 123.), **more})
        with running(gw.app) as url: yield Seen(url, stand, log, gw)
        stand.go.set()

@pytest.fixture
def seen(tmp_path):
    with front(tmp_path) as s: yield s

def test_a_request_reaches_the_engine_with_its_name_its_key_and_the_usual_values(seen):
    r = seen.ask()
    assert r.json()['model']=='demo' and r.json()['choices'][0]['message']['content']==SECRET
    (body, key), = seen.stand.asked
    assert key=='Bearer of-the-engine' and body['model']=='inner' and body['lora']==[dict(id=0, scale=1.)] and (body['temperature'], body['max_tokens'])==(0, 9)
    seen.ask(temperature=.7, max_completion_tokens=3, model='base')
    body, _ = seen.stand.asked[1]
    assert body['temperature']==.7 and body['lora']==[dict(id=0, scale=0.)]
    seen.ask(max_completion_tokens=3)
    assert 'max_tokens' not in seen.stand.asked[2][0]

class ClosesKept(BaseHTTPRequestHandler):
    "An engine that answers a connection's first request and closes it on the next, as llama.cpp may"
    protocol_version, used = 'HTTP/1.1', False
    def log_message(self, *_): pass
    def do_POST(self):
        self.rfile.read(int(self.headers['Content-Length']))
        if self.used: self.close_connection = True; return
        self.used = True
        body = json.dumps(dict(choices=[dict(message=dict(content='x'), index=0)])).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

def test_an_engine_that_closes_a_kept_connection_costs_no_answer(tmp_path):
    with ThreadingHTTPServer(('127.0.0.1', 0), ClosesKept) as up:
        threading.Thread(target=up.serve_forever, daemon=True).start()
        with running(Gateway(dict(demo=Model(f'http://127.0.0.1:{up.server_port}', 'inner', {}, {}, {}, 64))).app) as url:
            assert [http.post(f'{url}/v1/chat/completions', json=dict(messages=[dict(role='user', content='x')])).status_code for _ in range(3)]==[200]*3
        up.shutdown()

@pytest.mark.parametrize('key', ['wrong', 'rig', 'right ish', 'r\u00efght'.encode().decode('latin1')])
def test_a_wrong_key_gets_nothing(seen, key):
    for f in (lambda h: http.post(f'{seen.url}/v1/chat/completions', json=dict(messages=[]), headers=h), lambda h: http.get(f'{seen.url}/v1/models', headers=h), lambda h: http.get(f'{seen.url}/metrics', headers=h)):
        for head in ({'Authorization': f'Bearer {key}'.encode('latin1')}, {}):
            r = f(head)
            assert r.status_code==401 and r.json()['error']['code']=='invalid_api_key'
    assert not seen.stand.asked and http.get(f'{seen.url}/health').json()==dict(status='ok')

def test_an_unknown_model_is_404_with_the_nearest_name(seen):
    r = seen.ask(model='dem')
    assert r.status_code==404 and r.json()['error']['code']=='model_not_found' and "Did you mean 'demo'?" in r.json()['error']['message']

@pytest.mark.parametrize('body', [b'', b'[1]', b'{"model": "demo"', b'['*200_000, b'{"messages": "Hi"}', b'{"messages": []}', b'{"messages": [3]}', b'{"model": {"a": 1}, "messages": [{"role": "user"}]}'])
def test_a_body_that_is_no_request_is_refused_in_openais_form(seen, body):
    r = http.post(f'{seen.url}/v1/chat/completions', content=body, headers={'Authorization': 'Bearer right'})
    assert r.status_code in (400, 404) and r.json()['error']['type']=='invalid_request_error' and not seen.stand.asked

def test_a_body_over_the_limit_is_refused_before_all_of_it_is_read(tmp_path):
    sent = []
    def parts():
        for i in range(200):
            sent.append(i)
            yield b'x'*2**20
    with front(tmp_path, max_body=2**20) as f:
        r = http.post(f.url+'/v1/chat/completions', content=b' '*(2**20+1), headers=dict(Authorization='Bearer right'))
        assert r.status_code==413 and r.json()['error']['message']=='The body of the request has over 1,048,576 bytes, the most that is taken here.'
        try: http.post(f.url+'/v1/chat/completions', content=parts(), headers=dict(Authorization='Bearer right'))
        except httpx.HTTPError: pass # the server may hang up while the client still sends
        assert len(sent)<200 and f.ask().status_code==200

def test_what_is_not_here_says_what_is(seen):
    r = http.get(f'{seen.url}/v2', headers={'Authorization': 'Bearer right'})
    assert r.status_code==404 and '/v1/chat/completions' in r.json()['error']['message']
    r = http.get(f'{seen.url}/v1/chat/completions')
    assert r.status_code==405 and 'there are POST /v1/chat/completions' in r.json()['error']['message']

def test_an_engines_refusal_keeps_its_status_and_words(seen):
    r = seen.ask('broken')
    assert (r.status_code, r.json()['error']['message'])==(422, 'no such thing')
    r = seen.ask('too long')
    assert (r.status_code, r.json()['error']['code'])==(400, 'context_length_exceeded') and 'the 64 tokens that demo takes' in r.json()['error']['message']

def test_a_stream_comes_piece_by_piece_under_the_public_name(seen):
    with seen.stream('wait') as r:
        it, got = r.iter_lines(), []
        while not got or '"a"' not in got[-1]: got.append(next(it))
        assert not seen.stand.go.is_set() # the engine has not said more
        seen.stand.go.set()
        got += it
    events = [l[6:] for l in got if l]
    assert events[-1]=='[DONE]' and '/path' not in ''.join(events)
    ds = [json.loads(e) for e in events[:-1]]
    assert [d['choices'][0]['delta'].get('content') for d in ds]==[None, 'a', 'b\u00e9'] and {d['model'] for d in ds}=={'demo'}
    l, = seen.lines()
    assert (l['status'], l['stream'], l['prompt_tokens'], l['completion_tokens'])==(200, True, 7, 4) and 0<l['first_token_seconds']<=l['seconds']

def test_the_count_of_tokens_is_streamed_to_who_asks_for_it(seen):
    with seen.stream('x', stream_options=dict(include_usage=True)) as r: assert '"completion_tokens": 4' in r.read().decode()
    with seen.stream('x') as r: assert 'completion_tokens' not in r.read().decode()

@pytest.mark.parametrize('how,what', [('wait', 'middle'), ('wait at once', 'before')])
def test_a_client_that_leaves_a_stream_stops_the_engine_and_leaves_a_line(seen, capfd, caplog, how, what):
    if what=='middle':
        with seen.stream(how) as r: next(r.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout): http.post(f'{seen.url}/v1/chat/completions', json=dict(messages=[dict(role='user', content=how)], stream=True), headers={'Authorization': 'Bearer right'}, timeout=.5)
    l, = seen.lines()
    assert l['status']==499 and l['completion_tokens']==(1 if what=='middle' else None)
    for _ in range(100):
        if seen.stand.left: break
        time.sleep(.02)
    assert seen.stand.left==[what]
    assert seen.ask().status_code==200 and 'Traceback' not in capfd.readouterr().err+caplog.text

def test_a_client_that_leaves_while_a_whole_answer_is_made_stops_the_engine(seen, capfd):
    with pytest.raises(httpx.ReadTimeout): http.post(f'{seen.url}/v1/chat/completions', json=dict(messages=[dict(role='user', content='wait')]), headers={'Authorization': 'Bearer right'}, timeout=.5)
    l, = seen.lines()
    time.sleep(.2)
    assert l['status']==499 and seen.stand.left==['whole'] and 'Traceback' not in capfd.readouterr().err

def test_an_error_in_the_middle_of_a_stream_is_passed_on_and_noted(seen):
    with seen.stream('error') as r: last = [l for l in r.iter_lines() if l][-1]
    assert json.loads(last[6:])['error']['message']=='out of memory'
    assert seen.lines()[0]['error']=='engine' and seen.lines()[0]['status']==500

def test_an_engine_that_dies_in_the_middle_of_a_stream_is_an_error_not_a_short_answer(seen):
    with seen.stream('die') as r: last = [l for l in r.iter_lines() if l][-1]
    assert 'stopped answering' in json.loads(last[6:])['error']['message'] and seen.lines()[0]['status']==502

def test_an_engine_that_is_gone_is_502_and_bad_health(tmp_path):
    from ftnb.ports import free_port
    with front(tmp_path, models=dict(demo=Model(f'http://127.0.0.1:{free_port()}', 'x')), wrong=lambda: 'the engine ended') as s:
        assert s.ask().status_code==502 and s.lines()[0]['error']=='engine'
        r = http.get(f'{s.url}/health')
        assert r.status_code==503 and r.json()['error']=='the engine ended'

def test_neither_prompt_nor_answer_is_written_down(seen):
    for stream in (False, True): seen.ask(SECRET, stream=stream)
    seen.lines(2)
    m = http.get(f'{seen.url}/metrics', headers={'Authorization': 'Bearer right'}).text
    assert SECRET not in seen.log.read_text() and SECRET not in m and 'right' not in m

def test_no_request_is_lost_where_the_log_turns_and_the_oldest_lines_go(tmp_path):
    log = tmp_path/'requests.jsonl'
    m = Meter(log)
    m.log.maxBytes = 4000
    def some(n):
        ts = [Turn('/v1/chat/completions', m) for _ in range(n)]
        with ThreadPoolExecutor(8) as pool: list(pool.map(Turn.end, ts))
        return {t.id for t in ts}
    kept = lambda: [json.loads(l)['id'] for f in sorted(tmp_path.iterdir()) for l in f.read_text().splitlines()]
    ids = some(50)
    assert len(list(tmp_path.iterdir()))>2 and sorted(kept())==sorted(ids) and all(f.stat().st_size<=4000 for f in tmp_path.iterdir())
    log.unlink() # by a person, or another server of the run that turned it
    more = some(1)
    assert more<={*kept()}
    some(200)
    assert sorted(f.name for f in tmp_path.iterdir())==['requests.jsonl', *(f'requests.jsonl.{i}' for i in (1, 2, 3))]

def test_a_full_disk_costs_lines_of_the_log_and_no_answer(tmp_path, capfd):
    with front(tmp_path, log='/dev/full') as s:
        assert s.ask().json()['choices'][0]['message']['content']==SECRET
        assert 'ftnb_log_lines_lost_total 1.0' in http.get(f'{s.url}/metrics', headers={'Authorization': 'Bearer right'}).text
    assert 'Traceback' not in capfd.readouterr().err

def test_the_figures_for_a_monitor_add_up(seen):
    seen.ask(); seen.ask('x', stream=True); seen.ask(model='none'); seen.lines(3)
    m = {(s.name, *sorted(s.labels.values())): s.value for f in text_string_to_metric_families(http.get(f'{seen.url}/metrics', headers={'Authorization': 'Bearer right'}).text) for s in f.samples}
    assert m['ftnb_requests_total', '200', 'demo']==2 and m['ftnb_requests_total', '', '404']==1
    assert m['ftnb_tokens_total', 'completion', 'demo']==8 and m['ftnb_tokens_total', 'demo', 'prompt']==14
    assert m['ftnb_request_seconds_count', 'demo']==2 and m['ftnb_first_token_seconds_count', 'demo']==1 and m['ftnb_engine_memory_bytes',]==123 and m['ftnb_requests_running',]==0

def test_a_prompt_is_counted_for_an_engine_that_does_not_look_and_the_answer_is_held_within_the_rest(tmp_path):
    stand = Stand()
    with running(Starlette(routes=[Route('/v1/chat/completions', stand.chat, methods=['POST'])])) as up:
        count = lambda body: len(body['messages'][0]['content'])
        with front(tmp_path, models=dict(demo=Model(up, 'x', context=10, count=count))) as s:
            r = s.ask('a'*10)
            assert r.status_code==400 and 'has 10 tokens, and demo takes 10' in r.json()['error']['message'] and not stand.asked
            s.ask('a'*9, max_tokens=500); s.ask('a'*4); s.ask('a'*4, max_completion_tokens=2)
            assert [(b.get('max_tokens'), b.get('max_completion_tokens')) for b,_ in stand.asked]==[(1, None), (6, None), (None, 2)]

def test_a_page_of_another_site_can_not_ask_by_a_name_of_its_own(tmp_path):
    with front(tmp_path, key=None, hosts=['127.0.0.1', 'localhost']) as s:
        assert http.get(f'{s.url}/v1/models').status_code==200
        assert http.get(f'{s.url}/v1/models', headers={'Host': 'evil.example'}).status_code==400
