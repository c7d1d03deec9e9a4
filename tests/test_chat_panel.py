"Chat: base and tuned stream, each with its own past; stopped at once; what goes wrong is a sentence; a server ends with its panel or its kernel"
import json, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest

pytest.importorskip('ipywidgets')
import psutil
from ftnb.base import UserError, write_json
from ftnb.candidates import candidates
from ftnb.chat_panel import chat_panel
from ftnb.client import Client, ask
from ftnb.recipe import make_recipe
from ftnb.run_server import RunServer
from ftnb.runs import Run

def until(f, seconds=20):
    "Wait for something to be so"
    end = time.time()+seconds
    while not (v := f()):
        assert time.time()<end, 'it never was'
        time.sleep(.02)
    return v

class StandIn:
    "A real HTTP server that speaks the protocol: the tuned model repeats the question in capitals, the base in small letters; some words make it fail"
    def __init__(self, names=('demo', 'base'), key=None, pause=.01):
        self.asked, self.hung_up, me = [], threading.Event(), self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'
            def log_message(self, *_): pass
            def answer(self, status, d):
                raw = json.dumps(d).encode()
                self.send_response(status); self.send_header('Content-Length', str(len(raw))); self.end_headers(); self.wfile.write(raw)
            def no(self, status, text, code=None): self.answer(status, dict(error=dict(message=text, code=code)))
            def do_GET(self):
                if key and self.headers.get('Authorization')!=f'Bearer {key}': return self.no(401, 'The API key is missing or wrong.')
                self.answer(200, dict(data=[dict(id=n) for n in names]))
            def piece(self, d): raw = f'data: {d if isinstance(d, str) else json.dumps(d)}\n\n'.encode(); self.wfile.write(f'{len(raw):x}\r\n'.encode()+raw+b'\r\n'); self.wfile.flush()
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
                me.asked.append(body)
                q = body['messages'][-1]['content']
                tuned = body['model']!='base'
                if 'too long' in q and tuned: return self.no(400, 'The prompt has 900 tokens, and demo takes 512 for prompt and answer together.', 'context_length_exceeded')
                self.send_response(200); self.send_header('Content-Type', 'text/event-stream'); self.send_header('Transfer-Encoding', 'chunked'); self.end_headers()
                words, n = q.split(' '), 10_000 if 'for ever' in q else 1
                try:
                    for w in words*n:
                        self.piece(dict(choices=[dict(delta=dict(content=(w.upper() if tuned else w.lower())+' '))]))
                        time.sleep(pause)
                    if 'break off' in q and tuned: self.connection.shutdown(2); return
                    self.piece(dict(choices=[dict(delta={}, finish_reason='stop')]))
                    self.piece(dict(choices=[], usage=dict(completion_tokens=len(words))))
                    self.piece('[DONE]'); self.wfile.write(b'0\r\n\r\n')
                except OSError: me.hung_up.set()
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.http.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.http.server_port}'
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=.05), daemon=True).start()
    def __enter__(self): return self
    def __exit__(self, *_): self.http.shutdown(); self.http.server_close()

def test_both_answer_at_once_and_each_goes_on_with_its_own_past(tmp_path):
    with StandIn() as s:
        p = chat_panel(s.url+'/v1', system='Be kind.', start=tmp_path)
        for q in ('Hello You', 'And Now'): p.send(q).wait(20)
        assert p.names==['base', 'demo']
        first, second = ({b['model']: b for b in s.asked[i:i+2]} for i in (0, 2))
        assert first['base']['messages']==first['demo']['messages']==[dict(role='system', content='Be kind.'), dict(role='user', content='Hello You')]
        assert [m['content'] for m in second['demo']['messages']]==['Be kind.', 'Hello You', 'HELLO YOU ', 'And Now']
        assert [m['content'] for m in second['base']['messages']]==['Be kind.', 'Hello You', 'hello you ', 'And Now']
        assert first['demo']['temperature']==0 and first['demo']['max_tokens']==256
        assert 'base: 2 tokens' in p.status.value and 'tokens/s' in p.static_html()

def test_stop_hangs_up_at_once_and_keeps_what_was_said(tmp_path):
    with StandIn() as s:
        p = chat_panel(s.url, start=tmp_path).send('on and on for ever')
        until(lambda: p.turns and p.turns[0]['replies']['demo'].tokens>3)
        assert not p.stop_button.disabled and p.send_button.disabled
        p.send('another')
        assert len(p.turns)==1 # nobody is asked while answers come
        p.stop(); p.wait(10)
        a = p.turns[0]['replies']['demo']
        assert a.finish=='stopped' and a.text.startswith('ON AND ON') and 'stopped' in p.shown['live'].value
        assert s.hung_up.wait(10) and not p.send_button.disabled
        assert p.rows()[1]['messages'][-1]['content']==a.text

@pytest.mark.parametrize('question, said', [('this is too long', 'The prompt has 900 tokens'), ('please break off', 'stopped answering')])
def test_what_goes_wrong_with_one_model_is_a_sentence_and_leaves_the_other_alone(tmp_path, question, said):
    with StandIn() as s:
        p = chat_panel(s.url, start=tmp_path).send(question).wait(20)
        a = p.turns[0]['replies']
        assert said in a['demo'].error and said in p.shown['live'].value and a['base'].finish=='stop' and not a['base'].error
        p.send('again').wait(20)
        assert [m['content'] for m in s.asked[-1 if s.asked[-1]['model']=='demo' else -2]['messages']]==['again']
        assert [f.name for f in p.save(tmp_path)]==['chats.jsonl']

def test_a_server_that_went_is_a_sentence_and_the_question_is_not_lost(tmp_path):
    with StandIn() as s: p = chat_panel(s.url, start=tmp_path).send('one').wait(20)
    p.send('two').wait(20)
    assert 'No server answers at' in p.status.value and p.prompt.value=='two' and len(p.turns)==1

def test_the_key_comes_from_the_environment(tmp_path, monkeypatch):
    with StandIn(key='secret') as s:
        monkeypatch.delenv('FTNB_API_KEY', raising=False)
        p = chat_panel(s.url, start=tmp_path).send('hi').wait(20)
        assert 'FTNB_API_KEY' in p.status.value and not p.turns
        monkeypatch.setenv('FTNB_API_KEY', 'secret')
        assert Client(s.url).names()==['demo', 'base']

def test_markup_in_questions_answers_and_system_is_text(tmp_path):
    with StandIn() as s:
        p = chat_panel(s.url, system='<script>a</script>', start=tmp_path).send('<img src=x onerror=y>').wait(20)
        assert '<img' not in p.static_html() and '<script>' not in p.static_html() and '&lt;img' in p.shown['live'].value

def test_enter_sends_whichever_of_key_and_letters_comes_first(tmp_path):
    with StandIn() as s:
        p = chat_panel(s.url, start=tmp_path)
        p._enter(p.prompt, dict(event='submit'), [])
        p.prompt.value = 'letters after the key'
        until(lambda: len(s.asked)==2)
        p.wait(20)
        p.prompt.value = 'letters before it'
        time.sleep(.4)
        assert len(s.asked)==2 # leaving the box is not Enter
        p._enter(p.prompt, dict(event='submit'), [])
        until(lambda: len(s.asked)==4)
        p.wait(20)
        assert [t['prompt'] for t in p.turns]==['letters after the key', 'letters before it'] and p.prompt.value==''

def test_a_saved_talk_can_be_rated(tmp_path):
    with StandIn() as s:
        p = chat_panel(s.url, system='Short.', start=tmp_path).send('Hello You').wait(20)
        p.save()
        p.clear()
        p.send('Good Bye').wait(20)
        p.save()
    rows = [json.loads(l) for l in (tmp_path/'chats.jsonl').read_text().splitlines()]
    assert [(r['model'], len(r['messages'])) for r in rows]==[('base', 3), ('demo', 3)]*2
    cs = candidates(str(tmp_path/'chat_pairs.jsonl'))
    assert [c['answers'] for c in cs]==[dict(base='hello you ', tuned='HELLO YOU '), dict(base='good bye ', tuned='GOOD BYE ')]

def test_an_unknown_model_is_named_with_the_nearest(tmp_path):
    with StandIn() as s:
        with pytest.raises(UserError, match="Did you mean 'demo'"): list(ask(Client(s.url), 'hi', 'deno'))
        assert dict(ask(Client(s.url), 'Hi', 'demo'))=={'demo': 'HI '}

# a server that a panel starts

FAKE = '''import json, os, sys, time
sys.path.insert(0, {tests!r})
from test_chat_panel import StandIn
from ftnb.base import write_json
s = StandIn(key=os.environ['FTNB_API_KEY'])
write_json(sys.argv[2], dict(url=s.url+'/v1', names=['demo', 'base']))
time.sleep(600)'''

@pytest.fixture
def trained(tmp_path, monkeypatch):
    "A run that looks trained, and a server for it that is quick"
    monkeypatch.setattr(RunServer, 'command', [sys.executable, '-c', FAKE.format(tests=str(Path(__file__).parent))])
    run = Run(tmp_path/'demo', make_recipe(dict(system_prompt='Be brief.', max_new_tokens=7))).save()
    (run.folder/'adapter').mkdir()
    return run

def test_panels_of_a_run_share_a_server_that_ends_with_the_last(trained):
    a, b = (chat_panel(trained) for _ in 'ab')
    assert a.system.value=='Be brief.' and a.max_tokens.value==7
    for p in (a, b):
        p.send('Hi').wait(60)
        assert p.turns, p.status.value
        assert p.turns[0]['replies']['demo'].text=='HI '
    from ftnb.run_server import _servers
    (s,) = _servers.values()
    pid = s.process.pid
    a.close()
    assert s.alive
    b.close()
    assert not s.alive and not _servers
    until(lambda: not psutil.pid_exists(pid))

def test_a_server_ends_with_a_kernel_that_is_killed(trained):
    code = f"""import sys, os, time
from ftnb.run_server import RunServer, hold
from ftnb.runs import Run
RunServer.command = {RunServer.command!r}
s = hold(Run({str(trained.folder)!r}), 1)
s.wait()
print(s.url, s.process.pid, flush=True)
time.sleep(600)"""
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    try: url, pid = p.stdout.readline().split()
    finally: p.kill(); p.wait()
    until(lambda: not psutil.pid_exists(int(pid)))
    with pytest.raises(UserError, match='No server answers'): Client(url, 'x').names()

def test_a_run_that_can_not_be_served_says_why(tmp_path):
    run = Run(tmp_path/'demo', make_recipe({})).save()
    p = chat_panel(run).send('Hi').wait(120)
    assert 'ftnb run demo --to export' in p.status.value and p.prompt.value=='Hi'
    p.close()

# the function, on the models themselves

@pytest.fixture(scope='module')
def pair(tiny, tmp_path_factory):
    "A run of a tiny model with an adapter that changes its answers, loaded"
    import torch
    from conftest import Made
    from ftnb.generate import load
    from ftnb.load import load_model
    from ftnb.tune import make_trainable
    run = Made(tiny, tmp_path_factory.mktemp('pair'))(peft='lora', lora_r=4, system_prompt='Be brief.', max_new_tokens=12)
    model = make_trainable(load_model(run.recipe, dtype=torch.float32), run.recipe)
    torch.manual_seed(1)
    for n,p in model.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.5)
    model.save_pretrained(run.path('adapter'))
    return load(run)

def test_what_is_streamed_is_what_chat_answers_and_both_get_the_same_prompt(pair, monkeypatch):
    from ftnb import side_by_side as sb
    seen, real = [], sb.stream
    monkeypatch.setattr(sb, 'stream', lambda model, tok, ids, *a: (seen.append(ids), real(model, tok, ids, *a))[1])
    said, history = {}, {}
    for who,text in sb.chat(pair, 'What is 2 times 5?', history=history): said.setdefault(who, []).append(text)
    assert {w: t[-1] for w,t in said.items()}=={w: pair.chat('What is 2 times 5?', w) for w in ('base', 'tuned')} and said['base'][-1]!=said['tuned'][-1]
    assert seen[0]==seen[1] and 'Be brief.' in pair.tok.decode(seen[0]) and len(said['tuned'])>3
    list(sb.chat(pair, 'And 3?', 'tuned', history))
    assert [m['role'] for m in history['tuned']]==['system', 'user', 'assistant', 'user', 'assistant'] and len(history['base'])==3

def test_a_stream_that_is_closed_stops_the_model_and_keeps_what_was_said(pair):
    from ftnb.side_by_side import chat
    steps, history = [], {}
    hook = pair.base.register_forward_hook(lambda *_: steps.append(1))
    try:
        talk = chat(pair, 'What is 2 times 5?', 'base', history)
        while not (text := next(talk)[1]): pass
        talk.close()
        n = len(steps)
        time.sleep(.3)
        assert n==len(steps)<12 and history['base'][-1]==dict(role='assistant', content=text)
    finally: hook.remove()

def test_a_conversation_that_is_too_long_is_a_sentence(pair):
    from ftnb.side_by_side import chat
    with pytest.raises(UserError, match='the model takes 512'): list(chat(pair, 'word '*600))

def test_ftnb_chat_asks_a_server_and_goes_on_after_a_mistake(capsys, monkeypatch):
    from ftnb.cli import main
    with StandIn() as s:
        assert main(['chat', s.url, 'Hello', 'You'])==0
        assert capsys.readouterr().out=='base: hello you \ndemo: HELLO YOU \n'
        assert main(['chat', s.url, '--which', 'tuned', '--json', 'Hi'])==0
        assert json.loads(capsys.readouterr().out)==dict(prompt='Hi', demo='HI ')
        monkeypatch.setattr('ftnb.client.bases', ('none',))
        assert main(['chat', s.url, '--which', 'base', 'Hi'])==2 and 'is called base; --adapter asks one by its name: ' in capsys.readouterr().err # never another's answer as the base's
        monkeypatch.undo()
        lines = iter(['this is too long', 'Hi', ''])
        monkeypatch.setattr('builtins.input', lambda _: next(lines))
        assert main(['chat', s.url])==0
        got = capsys.readouterr()
        assert 'takes 512' in got.err and 'demo: HI' in got.out

@pytest.mark.soak
def test_base_and_tuned_of_a_run_answer_from_llama_cpp(pair, tmp_path):
    from ftnb.converter import convert, convert_lora
    run = pair.run
    write_json(run.path('state.json'), {**run.state, 'train': dict(status='done')})
    pair.tok.save_pretrained(run.path('adapter'))
    convert(run.recipe.model_name_or_path, run.path('gguf', 'base.gguf'))
    convert_lora(run.path('adapter'), run.recipe.model_name_or_path, run.path('gguf', f'{run.name}-lora.gguf'))
    p = chat_panel(run, start=tmp_path)
    try:
        for q in ('What is 2 times 5?', 'And 3?'):
            p.send(q).wait(180)
            assert p.turns, p.status.value
            a = p.turns[-1]['replies']
            assert [*a]==['base', run.name] and all(o.text and o.tokens>1 and not o.error for o in a.values()), p.status.value
        assert p.turns[0]['replies']['base'].text!=p.turns[0]['replies'][run.name].text
        p.prompt.value = ''
        p.send('word '*3000).wait(60)
        assert all('512' in o.error for o in p.turns[-1]['replies'].values())
    finally: p.close()
