"What is measured of a served run: the accounting with answers of known times, and one tiny model behind the real server"
import json, os, shutil
import psutil, pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
import ftnb.bench_serve as B
from conftest import make_tiny, short_rows, write_rows
from ftnb.base import UserError, write_json
from ftnb.bench_serve import bench_serve, percentile, run_load, sum_loads, sweep_of
from ftnb.recipe import make_recipe
from ftnb.runs import Run
from ftnb.serve import Answer

def answer(first=.1, seconds=1.1, tokens=11): return Answer('x', first, seconds, 5, tokens, 'stop')

def test_no_answer_is_faster_than_the_percentile_says_of_it():
    xs = [.5, .1, .3, .2, .4]
    assert [percentile(xs, p) for p in (1, 50, 95, 100)]==[.1, .3, .5, .5] and percentile([], 50) is None and percentile([.7], 95)==.7

def test_speed_of_all_is_tokens_over_the_time_of_the_whole_load_and_of_one_without_its_prompt():
    l = B.Load([answer(), answer(.6, 2.6, 21)], 2.)
    s = sum_loads([l])
    assert s['all']==32/2 and s['one']==pytest.approx(10) and s['first_p95']==.6 and s['requests']==2 and s['answer_tokens']==16

def test_one_slow_repeat_does_not_move_the_median():
    fast, slow = B.Load([answer()], 1.), B.Load([answer(2, 30)], 30.)
    s = sum_loads([fast, slow, fast])
    assert s['all']==11 and s['one']==pytest.approx(10) and s['all_low']<1

def test_a_request_that_failed_is_counted_and_gives_no_time():
    def ask(p):
        if p%2: raise UserError('context')
        return answer()
    l = run_load(ask, range(6), 2)
    assert (len(l.answers), l.errors)==(3, 3) and sum_loads([l])['requests']==3

def test_never_more_clients_than_asked_for_and_every_prompt_once():
    import threading
    here, most, seen, lock, gate = [0], [0], [], threading.Lock(), threading.Barrier(3)
    def ask(p):
        with lock:
            here[0] += 1
            most[0] = max(most[0], here[0])
            seen.append(p)
        if p<3: gate.wait(10)
        with lock: here[0] -= 1
        return answer()
    run_load(ask, range(9), 3)
    assert most[0]==3 and sorted(seen)==[*range(9)]

class NoServer:
    url, names, key, engines = 'http://none', ['x'], None, []
    def memory(self): return dict(ram=7)

def test_the_first_requests_are_not_counted_and_no_prompt_comes_from_a_cache(monkeypatch):
    asked = []
    def timed(url, body, key):
        asked.append(body)
        return answer(first=9 if len(asked)<=2 else .1)
    monkeypatch.setattr(B, 'timed', timed)
    rows = list(B._measure(NoServer(), [dict(messages=t) for t in 'abc'], [1, 2], 2, 8, dict(temperature=0, cache_prompt=False)))
    assert [(r['clients'], r['requests'], r['first_p95'], r['memory']) for r in rows]==[(1, 6, .1, 7), (2, 8, .1, 7)] and len(asked)==2+6+8
    assert all(b['cache_prompt'] is False and b['max_tokens']==8 for b in asked)

def test_every_format_is_measured_and_the_rest_is_changed_one_at_a_time():
    s = sweep_of(['q8_0', 'f16'], (1, 4), threads=(1, 2), n_batch=(64,), context=(512,))
    assert [(o['format'], o['settings'], o['clients']) for o in s]==[('q8_0', {}, [1, 4]), ('f16', {}, [1, 4]), ('q8_0', {'n_threads': 1}, [4]), ('q8_0', {'n_threads': 2}, [4]), ('q8_0', {'n_batch': 64}, [4]), ('q8_0', {'max_model_len': 512}, [4])]

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run with a tiny GGUF file and what a certificate says of it"
    from ftnb.converter import convert
    from ftnb.prepare import prepare
    d = tmp_path_factory.mktemp('bench')
    base = make_tiny(d/'base')
    run = Run(d/'demo', make_recipe(dict(model_name_or_path=base, dataset=write_rows(d/'rows.jsonl', short_rows(12)), use_cpu=True, n_threads=1, n_parallel=2, valid_size=1, test_size=3))).save()
    prepare(run)
    run.path('gguf').mkdir()
    convert(base, run.path('gguf/demo-f16.gguf'), 'f16')
    shutil.copytree(base, run.path('merged'))
    write_json(run.path('state.json'), dict(train=dict(status='done')))
    run.save_report('certificate', dict(ok=True, measure='ROUGE-L', formats=[dict(format='f16', kl=.0004, top1=1., score=.25, verdict='ok')]))
    return run

def test_a_served_file_is_measured_beside_its_certificate_and_nothing_is_left_running(run):
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    b = bench_serve(run, clients=(1, 2), n_batch=(32,), repeats=1, prompts=3, max_tokens=4)
    rows, rep = b.report['rows'], run.report('bench_serve')
    assert [(r['clients'], r['n_batch'], r['context'], r['errors']) for r in rows]==[(1, None, 512, 0), (2, None, 512, 0), (2, 32, 512, 0)]
    size = run.path('gguf/demo-f16.gguf').stat().st_size
    assert all(r['size']==size<r['memory'] and 0<r['first_p50']<=r['first_p95'] and r['all']>0 and (r['kl'], r['score'])==(.0004, .25) and 1<=r['answer_tokens']<=4 for r in rows)
    assert rep==json.loads(json.dumps(b.report)) and [e['clients'] for e in run.events('serve')]==[1, 2, 2] and all(e['first_p50']>0 and e['memory']>size for e in run.events('serve'))
    assert '25 %' in repr(b) and 'KL to the trained model' in run.path('reports/bench_serve.svg').read_text() and 'aria-label' in b._repr_html_()
    assert 'times' not in ''.join(json.dumps(e) for e in run.events('serve')) and not run.path('requests.jsonl').exists() # no prompts
    assert {p.pid for p in psutil.Process().children(recursive=True)}<=before

@pytest.mark.parametrize('kw,why', [(dict(formats=['q8_0']), 'ftnb export demo --formats q8_0'), (dict(formats=['q8']), "Did you mean 'q8_0'"), (dict(clients=(0, 4)), 'from 1 up'), (dict(prompts=0), 'prompts: 0 is below 1'), (dict(serve_engine='transformers', n_batch=(8,)), 'n_batch is a number of llama.cpp')])
def test_what_can_not_be_measured_is_said_before_a_server_starts(run, kw, why):
    with pytest.raises(UserError, match=why): bench_serve(run, **kw)
