"A stand-in for the hub's HTTP API, as far as huggingface_hub uses it to push: repositories, what goes by LFS, uploads, commits"
import base64, hashlib, json, threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

class Hub(ThreadingHTTPServer):
    "Repositories in memory; `repos[name]` has `private` and `files`, `asked` what was asked in which order"
    daemon_threads = True
    def __init__(self, token='hf_'+'right'*7):
        self.token, self.repos, self.blobs, self.asked, self.damage = token, {}, {}, [], False
        super().__init__(('127.0.0.1', 0), _Handler)
    @property
    def url(self): return f'http://127.0.0.1:{self.server_port}'

class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *_): pass
    def answer(self, value=None, code=200, **headers):
        body = json.dumps(value).encode() if value is not None else b''
        self.send_response(code)
        for k,v in {'Content-Type': 'application/json', 'Content-Length': str(len(body)), **headers}.items(): self.send_header(k, v)
        self.end_headers()
        self.wfile.write(body)

    def go(self):
        hub, path = self.server, urlsplit(self.path).path
        n = int(self.headers.get('Content-Length') or 0)
        if self.headers.get('Transfer-Encoding')=='chunked':
            body = b''
            while size := int(self.rfile.readline(), 16): body, _ = body+self.rfile.read(size), self.rfile.readline()
            self.rfile.readline()
        else: body = self.rfile.read(n)
        hub.asked.append((self.command, path))
        if path.startswith('/blob/'): # a signed address: no token
            assert 'Authorization' not in self.headers
            hub.blobs[path[6:]] = body if not hub.damage else body[:-1]+b'?'
            return self.answer({})
        if self.headers.get('Authorization')!=f'Bearer {hub.token}': return self.answer(dict(error='Invalid credentials in Authorization header'), 401, **{'X-Error-Message': 'Invalid credentials in Authorization header'})
        part = path.strip('/').split('/')
        if path=='/api/validate-yaml': return self.answer(dict(errors=[], warnings=[]))
        if path=='/api/repos/create':
            o = json.loads(body)
            name = f'{o["organization"]}/{o["name"]}'
            old = name in hub.repos
            if not old: hub.repos[name] = dict(private=o.get('visibility')=='private', files={}, lfs=set(), commits=[])
            return self.answer(dict(url=f'{hub.url}/{name}'), 409 if old else 200)
        if path.endswith('.git/info/lfs/objects/batch'):
            def one(x): return dict(oid=x['oid'], size=x['size'], **({} if x['oid'] in hub.blobs else dict(actions=dict(upload=dict(href=f'{hub.url}/blob/{x["oid"]}')))))
            return self.answer(dict(transfer='basic', objects=[one(x) for x in json.loads(body)['objects']]))
        if part[:2]!=['api', 'models']: return self.answer(dict(error='?'), 404)
        name, rest = '/'.join(part[2:4]), part[4:]
        repo = hub.repos.get(name)
        if repo is None: return self.answer(dict(error='Repository not found'), 404, **{'X-Error-Code': 'RepoNotFound'})
        head = repo['commits'][-1] if repo['commits'] else '0'*40
        if not rest or rest==['revision', 'main']: return self.answer(dict(id=name, modelId=name, sha=head, private=repo['private'], siblings=[dict(rfilename=k) for k in repo['files']], tags=[]))
        if rest[0]=='preupload':
            def mode(f): return 'lfs' if f['path'].endswith(('.safetensors', '.gguf')) or f['path']=='tokenizer.json' else 'regular'
            return self.answer(dict(files=[dict(path=f['path'], uploadMode=mode(f), shouldIgnore=False, oid=None) for f in json.loads(body)['files']]))
        if rest[0]=='commit':
            for l in body.splitlines():
                o = json.loads(l)
                if o['key']=='file': repo['files'][o['value']['path']] = base64.b64decode(o['value']['content'])
                if o['key']=='lfsFile':
                    repo['files'][o['value']['path']] = hub.blobs[o['value']['oid']]
                    repo['lfs'].add(o['value']['path'])
            repo['commits'].append(hashlib.sha1(body, usedforsecurity=False).hexdigest())
            return self.answer(dict(success=True, commitOid=repo['commits'][-1], commitUrl=f'{hub.url}/{name}/commit/{repo["commits"][-1]}'))
        if rest[0]=='paths-info':
            from urllib.parse import parse_qs
            ask = json.loads(body)['paths'] if body[:1]==b'{' else parse_qs(body.decode())['paths']
            def info(p):
                b = repo['files'][p]
                lfs = dict(lfs=dict(oid=hashlib.sha256(b).hexdigest(), size=len(b), pointerSize=130)) if p in repo['lfs'] else {}
                return dict(type='file', path=p, size=len(b), oid=hashlib.sha1(f'blob {len(b)}\0'.encode()+b, usedforsecurity=False).hexdigest(), **lfs)
            return self.answer([info(p) for p in ask if p in repo['files']])
        self.answer(dict(error='?'), 404)
    do_GET = do_POST = do_PUT = do_HEAD = go

@contextmanager
def hub_standin():
    "A running stand-in; it ends with the block"
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try: yield hub
    finally:
        hub.shutdown()
        hub.server_close()
