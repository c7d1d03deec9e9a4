"The run panel: starts, watches, stops and resumes runs, also those of other kernels; whatever happens to the folder is a sentence"
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest

pytest.importorskip('ipywidgets')
from conftest import short_rows, write_rows
from ftnb.base import write_json
from ftnb.fields import Recipe
from ftnb.follow import Follow
from ftnb.form import Form
from ftnb.process import doing, launch, log_tail, process_of
from ftnb.recipe import make_recipe
from ftnb.run_panel import run_panel
from ftnb.runs import Run

@pytest.fixture
def work(tmp_path):
    "A workspace"
    (tmp_path/'settings.ini').write_text('[ftnb]\nruns = runs\n')
    return tmp_path

@pytest.fixture
def sleeper():
    "A process that stands for a stage's kernel"
    p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(120)'])
    yield p
    p.kill(); p.wait()

def until(done, seconds=120, step=.1):
    "Wait for something that has to come"
    t = time.time()
    while not done():
        assert time.time()-t<seconds, 'it did not come'
        time.sleep(step)

def state(run, **stages): write_json(run.path('state.json'), stages)
def steps(run, a, b, total=100):
    "Log lines, a second apart"
    with run.path('events.jsonl').open('a') as f:
        for i in range(a, b): f.write(json.dumps(dict(t=time.time()+i, event='log', step=i, max_steps=total, loss=3/i, learning_rate=1e-4, grad_norm=1., tokens_per_second=500., peak_ram=2**30))+'\n')
def values(p): return [w.value for w in p.shown.values()]

# a real training, over four processes

OTHER = '''
import sys, time
from ftnb.run_panel import run_panel
p, t = run_panel('run', sys.argv[1]), time.time()
while p.facts.get('step', (0, 0))[0]<3 and time.time()-t<120: p.refresh(); time.sleep(.02)
p.stop_button.click()
print(p.shown['said'].value)
print('heavy:', sorted(set(sys.modules) & {'torch', 'transformers', 'datasets', 'pandas'}))
'''
def test_a_training_is_stopped_from_another_kernel_and_resumed_to_the_same_loss(tiny, work, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    r = make_recipe(dict(model_name_or_path=tiny, dataset=write_rows(work/'rows.jsonl', short_rows(26)), dtype='float32', use_cpu=True, valid_size=2, test_size=0, eval_strategy='no', save_strategy='no',
        max_steps=40, per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-3, lr_scheduler_type='constant', report_to='none', lora_r=4, lora_dropout=.1))
    a = run_panel(Form(r), work)
    other = subprocess.Popen([sys.executable, '-c', OTHER, str(work)], stdout=subprocess.PIPE, text=True)
    a.begin('train', 'train')
    pid = process_of(a.run)['pid']
    a.start_button.click()
    assert f'process {pid}' in a.shown['said'].value and 'is being run' in a.shown['said'].value
    with pytest.raises(ValueError, match=f'not started twice.*process {pid}'): launch(a.run)
    said, _ = other.communicate(timeout=150)
    assert 'train stops after this step, with a checkpoint' in said and 'heavy: []' in said
    until(lambda: not doing(a.run).alive)
    print('seconds from the stop button to the end of the process:', round(process_of(a.run)['ended']-process_of(a.run)['asked'][0], 1))
    until(lambda: not a.doing.alive, 20) # its own thread sees it
    asked, logged = process_of(a.run)['asked'][0], a.run.events('log')
    assert sum(e['t']>asked for e in logged)<=2 and 3<=logged[-1]['step']<40
    ck = f'checkpoint-{logged[-1]["step"]}'
    assert a.doing.status=='stopped' and a.run.path('checkpoints', ck, 'trainer_state.json').exists() and f'Resume goes on from {ck}.' in a.text()
    new = run_panel(start=work) # as after a restart of the kernel
    new.refresh(); a.refresh()
    assert new.run.name==a.run.name=='run' and new.text()==a.text() and new.static_html()==a.static_html()
    new.resume_button.click()
    assert new.doing.alive
    until(lambda: not doing(new.run).alive)
    rep = new.run.report('train')
    assert (rep['steps'], rep['resumed_from'])==(40, ck) and doing(new.run).status=='done'

    import torch
    from ftnb.prepare import prepare
    from ftnb.train import train
    torch.set_num_threads(1)
    whole = Run(work/'whole', r).save()
    prepare(whole)
    same = train(whole)
    assert abs(same['train_loss']-rep['train_loss'])<1e-5 and same['train_loss']<same['first_loss']

# what becomes of a process

def test_a_killed_process_ended_without_a_word_and_can_be_started_again(work):
    run = Run(work/'runs/a', Recipe(dataset='none.jsonl')).save()
    p = run_panel(run, work)
    p.begin('prepare', 'prepare')
    assert p.doing.status=='starting'
    os.kill(process_of(run)['pid'], signal.SIGKILL)
    until(lambda: not doing(run).alive)
    p.refresh()
    assert p.doing.status=='lost' and 'ended without a word' in p.text() and 'Resume runs it again' in p.text() and not p.resume_button.disabled

def test_a_command_that_fails_at_once_shows_what_it_said(work):
    run = Run(work/'runs/a', Recipe()).save()
    p = run_panel(run, work)
    (work/'settings.ini').write_text('[ftnb]\nruns = runs\nlearnig_rate = 1\n')
    p.begin('plan', 'plan')
    until(lambda: not doing(run).alive)
    p.refresh()
    assert p.doing.status=='failed' and "unknown key 'learnig_rate'" in p.text() and process_of(run)['code']==2
    assert 'unknown key' in p.shown['log'].value

def test_a_broken_recipe_is_refused_before_anything_starts(work):
    run = Run(work/'runs/a', Recipe()).save()
    p = run_panel(run, work)
    run.path('recipe.yaml').write_text('learnig_rate: <b>1\n')
    p.start_button.click()
    assert "unknown key &#x27;learnig_rate&#x27;. Did you mean" in p.shown['said'].value and not run.path('process.json').exists()
    assert 'unknown key' in run_panel('a', work).shown['said'].value

@pytest.mark.parametrize('later', [0, .1, .3]) # while the kernel imports, or computes
def test_another_stage_is_interrupted_at_once(work, later):
    run = Run(work/'runs/a', Recipe(dataset='demo')).save()
    p = run_panel(run, work)
    old = signal.signal(signal.SIGINT, signal.SIG_IGN) # as a notebook's kernel may have it, and its children after it
    p.one['prepare'].click()
    signal.signal(signal.SIGINT, old)
    until(lambda: doing(run).status=='running', step=.02)
    time.sleep(later)
    p.stop_button.click()
    until(lambda: not doing(run).alive)
    p.refresh()
    assert (p.doing.status, p.doing.stage)==('stopped', 'prepare') and log_tail(run)[-1]=='ftnb: stopped' and process_of(run)['code']==130

def test_of_two_starts_at_the_same_moment_one_is_refused(work):
    run = Run(work/'runs/a', Recipe(dataset='demo')).save()
    code = f'from ftnb.process import launch\nfrom ftnb.runs import Run\nrun = Run({str(run.folder)!r}); input()\ntry: print("started", launch(run, "prepare", "prepare"))\nexcept ValueError as e: print(e)'
    ps = [subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for p in ps: p.stdin.write('\n'); p.stdin.flush()
    said = sorted(p.communicate(timeout=60)[0] for p in ps)
    assert 'a is not started twice' in said[0] and said[1]==f'started {process_of(run)["pid"]}\n'
    os.kill(process_of(run)['pid'], signal.SIGKILL)

def test_a_number_that_another_process_got_is_not_the_run(work):
    run = Run(work/'runs/a', Recipe()).save()
    state(run, train=dict(status='running', pid=os.getpid(), started=time.time()-10**8))
    assert doing(run).status=='lost'

def test_asked_three_times_a_stage_that_does_not_listen_is_killed(work):
    code = 'import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print("up", flush=True); time.sleep(120)'
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE) as k:
        k.stdout.readline()
        run = Run(work/'runs/a', Recipe()).save()
        state(run, train=dict(status='running', pid=k.pid, started=time.time()))
        p = run_panel(run, work)
        for said in ('with a checkpoint', 'is interrupted', 'was killed'):
            p.stop()
            assert said in p.shown['said'].value
        assert k.wait(20)==-signal.SIGKILL
    assert run.path('STOP').exists() and doing(run).status=='stopped'

# watching

def test_two_panels_on_one_run_follow_it_without_a_click_and_end_with_it(work, sleeper):
    run = Run(work/'runs/a', Recipe()).save()
    state(run, train=dict(status='running', pid=sleeper.pid, started=time.time()))
    run.log('train_begin', step=0, max_steps=100)
    a, b = run_panel('a', work), run_panel(run, work)
    for p in (a, b): p.every = .05
    assert a._thread.is_alive() and b._thread.is_alive()
    steps(run, 1, 31)
    until(lambda: all('step 30 of 100' in p.shown['progress'].value and '<svg' in p.shown['curves'].value and 'GiB' in p.shown['memory'].value for p in (a, b)))
    threads = a._thread, b._thread
    b.close()
    b_saw = values(b)
    sleeper.kill(); sleeper.wait()
    until(lambda: 'ended without a word' in a.shown['status'].value)
    for t in threads: t.join(20); assert not t.is_alive()
    assert a.stop_button.disabled and not a.resume_button.disabled and values(b)==b_saw

def test_what_did_not_change_is_not_sent_again(work, sleeper):
    run = Run(work/'runs/a', Recipe()).save()
    state(run, train=dict(status='running', pid=sleeper.pid, started=time.time()))
    run.log('train_begin', step=0, max_steps=100)
    steps(run, 1, 9)
    p, sent = run_panel(run, work), []
    p._over.set()
    for k,w in p.shown.items(): w.observe(lambda c, k=k: sent.append(k), names='value')
    for _ in range(3): p.refresh()
    assert not sent
    steps(run, 9, 10)
    p.refresh()
    assert set(sent)=={'progress', 'curves'}

def test_a_million_events_are_read_once(tmp_path):
    path, n = tmp_path/'events.jsonl', 10**6
    with path.open('w') as f:
        f.write('{"t": 0, "event": "train_begin", "step": 0, "max_steps": 1000000}\n')
        f.writelines(f'{{"t": {i}, "event": "log", "step": {i}, "max_steps": {n}, "loss": {9/i:.4f}}}\n' for i in range(1, n+1))
    f = Follow(path)
    while f.read(): pass
    whole = path.stat().st_size
    assert f.bytes==whole and f.offset==whole
    with path.open('a') as g: g.write('{"t": 1000001, "event": "eval", "step": 1000000, "eval_loss": 1}\n')
    for _ in range(100): f.read()
    assert f.bytes==path.stat().st_size and len(f.events)<1200
    kept = [e['step'] for e in f.events if e['event']=='log']
    assert kept[-1]==n and max(b-a for a,b in zip(kept, kept[1:]))<3000

# bad folders

def test_a_folder_deleted_under_a_panel_is_a_sentence(work, sleeper):
    run = Run(work/'runs/a', Recipe()).save()
    state(run, train=dict(status='running', pid=sleeper.pid, started=time.time()))
    p = run_panel(run, work)
    shutil.rmtree(run.folder)
    for press in (p.refresh_button, p.stop_button, p.resume_button, p.start_button): press.click()
    assert 'The folder of a is gone' in p.text() and 'is gone' in p.shown['status'].value and 'gone' in p.shown['said'].value
    assert not run.folder.exists() and 'no runs' in run_panel(start=work).text()

@pytest.mark.parametrize('name, text', [('state.json', '{"train": '), ('state.json', '[1]'), ('process.json', 'x'), ('events.jsonl', '\x00\xff{}\n{"event": "log", "step": "1", "t": 0}\n{"t": 1, "event": "train_begin", "step": 0, "max_steps": null}\n'),
    ('reports/plan.json', '{"memory": {"need": [1]}, "device_bytes": "many"}'), ('reports/plan.json', 'no'), ('state.json', '{"train": {"status": "running", "pid": "x", "started": "y"}}')])
def test_a_broken_file_in_the_folder_is_no_traceback(work, name, text):
    run = Run(work/'runs/a', Recipe()).save()
    steps(run, 1, 3)
    run.path(name).parent.mkdir(exist_ok=True)
    run.path(name).write_text(text)
    p = run_panel(run, work)
    assert 'a' in p.text() and p.static_html() and 'Traceback' not in p.text()

def test_markup_in_names_answers_and_logs_stays_text(work):
    bad = '<img src=x onerror=alert(1)>'
    run = Run(work/'runs'/bad, Recipe()).save()
    state(run, train=dict(status='failed', started=1, ended=2, seconds=1, line=f'failed: {bad}'))
    run.log('out_of_memory', step=1, text=bad)
    run.path('run.log').write_text(f'ftnb: {bad}\n')
    p = run_panel(start=work)
    p.stop()
    assert p.run.name==bad and bad in p.text()
    assert '<img' not in p.static_html() and not any('<img' in v for v in values(p)) and p.static_html().count('&lt;img')>=4

def test_a_form_with_a_problem_is_not_started(work):
    f = Form()
    p = run_panel(f, work)
    f.kids['lora_r'].value = '64x'
    p.start_button.click()
    assert 'lora_r' in p.shown['said'].value and 'not a whole number' in p.shown['said'].value and not (work/'runs').exists()

def test_a_run_from_a_terminal_is_known_between_its_stages_and_not_started_twice(work, monkeypatch):
    "`ftnb run` notes itself in the folder; what it was asked and how it ended stay there"
    from ftnb.process import owned
    run = Run(work/'runs/r', make_recipe(dict(dataset='demo'))).save()
    with owned(run):
        assert doing(run).alive and doing(run).status=='starting'
        with pytest.raises(ValueError, match='not started twice'): launch(run)
    assert not doing(run).alive and process_of(run)['code']==0
    other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
    try:
        write_json(run.path('process.json'), dict(pid=other.pid, at=time.time(), first='prepare', last='export'))
        with pytest.raises(ValueError, match=f'process {other.pid} runs it'):
            with owned(run): pass
    finally: other.kill(); other.wait()
    with pytest.raises(KeyboardInterrupt):
        with owned(run): raise KeyboardInterrupt
    assert process_of(run)['code']==130
