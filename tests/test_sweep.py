"Sweeps: lists become runs that are checked before the first starts, resume, and are compared by what their rows say"
import json, os, subprocess, sys
from pathlib import Path
import pytest

from conftest import short_rows, write_rows
from ftnb.base import UserError
from ftnb.cli import main
from ftnb.grid import expand_sweep, label_of
from ftnb.recipe import make_recipe
from ftnb.runs import Run, begin, end
from ftnb.stages import StageFailed

def in_this_process(seen):
    "Stages without kernels of their own; notes (run, stage) of each"
    def run_stage(run, stage, debug=False):
        from ftnb.evaluate import evaluate
        from ftnb.plan import plan_run
        from ftnb.prepare import prepare
        from ftnb.train import train
        seen.append((run.name, stage))
        begin(run, stage)
        try: rep = dict(prepare=lambda: prepare(run).report, plan=lambda: plan_run(run).report, train=lambda: train(run), evaluate=lambda: evaluate(run))[stage]()
        except UserError as e: end(run, stage, 'refused', str(e)); raise StageFailed(str(e), 3) from None
        end(run, stage, line=rep['line'])
        return run.state[stage]
    return run_stage

@pytest.fixture
def work(tiny, tmp_path, monkeypatch):
    "A workspace with a recipe of a tiny model; what stages ran"
    seen = []
    monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path/'none'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('ftnb.stages.run_stage', in_this_process(seen))
    write_rows('my.jsonl', short_rows(30))
    Path('my.yaml').write_text(f'model_name_or_path: {tiny}\ndataset: my.jsonl\nuse_cpu: true\ndtype: float32\nvalid_size: 2\ntest_size: 6\nmax_steps: 2\nper_device_train_batch_size: 4\nlogging_steps: 1\n'
        'learning_rate: 1e-3\nsave_strategy: "no"\nmax_new_tokens: 4\nlora_r: 4\n')
    return seen

def sweep(*args, capsys=None): return main(['sweep', 'my.yaml', *args])
def page(name='my-sweep'): return json.loads(Path('runs', name, 'reports/sweep.json').read_text())

def test_one_run_that_fails_does_not_stop_the_others_and_the_same_command_again_redoes_only_it(work, capsys):
    over = ['--over', 'lora_target_modules=all-linear,[q_prj],[v_proj]']
    code = sweep(*over)
    labels = [label_of(dict(lora_target_modules=v)) for v in ('all-linear', ['q_prj'], ['v_proj'])]
    out, rep = capsys.readouterr().out, page()
    assert code==3
    assert [s for s in work if s[1]=='prepare']==[(f'my-{labels[0]}', 'prepare')] # once, where its inputs are the same
    assert [s for s in work if s[1]=='evaluate']==[(f'my-{l}', 'evaluate') for l in (labels[0], labels[2])]
    assert list(rep['failed'])==[labels[1]] and "'q_prj' is no layer" in rep['failed'][labels[1]]['line'] and "'q_prj' is no layer" in out
    assert [r['run'] for r in rep['runs']][-1]==labels[1] and all(r['score'] is not None and r['peak'] and r['weights'] for r in rep['runs'][:2])
    assert out.index('3 runs, 6 steps of training')<out.index('3 train') # the plan stands first
    html = Path('runs/my-sweep/reports/sweep.html').read_text()
    assert all(l in html for l in labels) and '<svg' in html and html.count('<circle')==2
    work.clear()
    assert sweep(*over)==3 and {n for n,_ in work}<={f'my-{labels[1]}'}
    assert not [p for p in Path('runs').iterdir() if p.name.endswith('-2')]

def test_a_longer_list_adds_runs_and_keeps_those_that_are_there(work):
    Path('my.yaml').write_text(Path('my.yaml').read_text()+'sweep: {lora_r: [2]}\n')
    assert sweep('--to', 'plan')==0
    before = list(work)
    assert sweep('--over', 'lora_r=2,8', '--to', 'plan')==0
    assert before==[('my-r2', 'prepare'), ('my-r2', 'plan')] and work[2:]==[('my-r8', 'plan')]
    assert Run('runs/my-r8').done('prepare') and Path('runs/my-r8/data/train.jsonl').samefile('runs/my-r2/data/train.jsonl')

def test_a_wrong_value_anywhere_in_the_grid_is_said_with_its_combination_before_anything_is_written(work, capsys):
    for bad, said in ((['lora_r=8,0', 'seed=1,2'], 'sweep, lora_r=0, seed=1: lora_r: 0 is below 1.'), (['lora_r=8,many'], "sweep: lora_r: lora_r: 'many' is not a whole number"), (['peft=lora,prefix', 'packing=true'], 'packing: true does not go with peft: prefix'),
        (['lorar=8'], "Did you mean 'lora_r'"), (['lora_r'], 'name=value,value'), (['output_dir=a,b'], 'output_dir is the same for all'), (['learning_rate=1e-4,-1'], 'must be above 0')):
        assert sweep(*[x for b in bad for x in ('--over', b)])==2
        err = capsys.readouterr().err
        assert said in err and len(err.strip().splitlines())==1, err
    assert sweep()==2 and 'nothing to sweep' in capsys.readouterr().err
    assert sweep('--over', 'lora_r=1,2', '--random', '3')==2 and 'draw 1 to 2' in capsys.readouterr().err
    assert sweep('--over', 'lora_r=1,2', '--by', 'rougel')==2 and "Did you mean 'rougeL'" in capsys.readouterr().err
    assert not Path('runs').exists() and not work

def test_what_does_not_fit_is_said_before_the_first_training_and_left_out(work, capsys, monkeypatch):
    import ftnb.sweep as S
    real = S.plan
    def plan(r, *a, **k):
        p = real(r, *a, **k)
        if (r.recipe if isinstance(r, Run) else r).lora_r==64: p.report.update(verdict='does not fit', memory=dict(need=[9e12]*3))
        return p
    monkeypatch.setattr(S, 'plan', plan)
    assert sweep('--over', 'lora_r=2,64', '--to', 'train')==3
    assert [s for s in work if s[1]=='train']==[('my-r2', 'train')]
    out = capsys.readouterr().out
    assert out.index('1 of them can not run')<out.index('3 train') and page()['failed']['r64']['status']=='does not fit'

def test_data_that_stage_1_refuses_is_refused_once_for_all_that_share_it(work):
    Path('my.jsonl').write_text('{"prompt": "x", "completion": ""}\n')
    assert sweep('--over', 'lora_r=2,8')==3
    assert work==[('my-r2', 'prepare')] and list(page()['failed'])==['r2', 'r8']

def test_who_stops_a_run_stops_the_sweep_with_a_page_and_the_next_call_goes_on(work, monkeypatch):
    import ftnb.stages as T
    real, asked = T.run_stage, []
    def stopping(run, stage, debug=False):
        if stage=='train' and run.name=='my-r8' and not asked:
            asked.append(1)
            begin(run, stage); end(run, stage, 'stopped', 'by Ctrl-C')
            raise StageFailed('Training was stopped at step 1 of 2.', 130)
        return real(run, stage, debug)
    monkeypatch.setattr(T, 'run_stage', stopping)
    assert sweep('--over', 'lora_r=2,8,16', '--to', 'train')==130
    assert not Run('runs/my-r16').state.get('train') and page()['failed']['r8']['status']=='stopped'
    work.clear()
    assert sweep('--over', 'lora_r=2,8,16', '--to', 'train')==0
    assert [s for s in work if s[1]=='train']==[('my-r8', 'train'), ('my-r16', 'train')]

def test_other_values_outside_the_lists_keep_the_finished_runs(work):
    assert sweep('--over', 'lora_r=2,8', '--to', 'train')==0
    assert sweep('--over', 'lora_r=2,8', '--to', 'train', '-p', 'max_steps=1')==0
    assert sorted(p.name for p in Path('runs').iterdir())==['my-r2', 'my-r2-2', 'my-r8', 'my-r8-2', 'my-sweep']
    assert Run('runs/my-r2').report('train')['steps']==2 and {Path(r['folder']).name for r in page()['runs']}=={'my-r2-2', 'my-r8-2'}

def test_the_plan_alone_writes_nothing_and_json_is_json(work, capsys):
    assert sweep('--over', 'lora_r=2,8', '--plan', '--json')==0
    assert set(json.loads(capsys.readouterr().out)['plans'])=={'r2', 'r8'} and not Path('runs').exists()
    assert sweep('--over', 'lora_r=2,8', '--to', 'plan', '--json')==0
    got = json.loads(capsys.readouterr().out)
    assert [r['run'] for r in got['runs']]==['r2', 'r8'] and got['best'] is None

def test_ls_lists_the_sweep_the_compare_panel_opens_its_runs_and_show_shows_one(work, capsys):
    pytest.importorskip('ipywidgets')
    from ftnb.compare_panel import compare_panel
    assert sweep('--over', 'lora_r=2,8', '--to', 'plan')==0
    capsys.readouterr()
    assert main(['ls', '--json'])==0
    g, = json.loads(capsys.readouterr().out)['groups']
    assert (g['group'], g['kind'], g['over'], g['runs'])==('my-sweep', 'sweep', 'lora_r', 2)
    assert [r.name for r in compare_panel('my-sweep').runs]==['my-r2', 'my-r8']
    assert main(['show', 'my-r8'])==0 and 'took over stage 1 of my-r2' in capsys.readouterr().out

def test_labels_are_unique_safe_and_made_of_the_values_alone():
    import re
    r = make_recipe(dict(sweep=dict(learning_rate=[1e-4, 1.00001e-4, .0002], dataset=['a/b.jsonl', 'c/b.jsonl', 'C/B.jsonl'], lora_target_modules=['all-linear', ['q_proj'], ['q_proj', 'v_proj'], 'Q_PROJ'], system_prompt=[None, 'Be brief / ..', 'Be brief ..'])))
    got = list(expand_sweep(r))
    assert len({l.lower() for l in got})==len(got)==108
    assert all(re.fullmatch(r'[a-z0-9][a-z0-9.+_-]*', l) and len(l)<=90 for l in got)
    one = make_recipe(dict(sweep=dict(lora_r=[8])))
    assert list(expand_sweep(one))[0] in expand_sweep(make_recipe(dict(sweep=dict(lora_r=[64, 8])))) 

@pytest.mark.soak
def test_a_sweep_of_the_real_model_in_kernels_of_their_own_resumes_after_a_kill(tmp_path):
    (tmp_path/'settings.ini').write_text('[ftnb]\nruns = runs\n')
    cmd = [sys.executable, '-c', 'from ftnb.cli import main; main()', 'sweep', 'demo', '--over', 'lora_r=2,8', '--json', *[x for k,v in dict(max_train_samples=8, max_steps=2, per_device_train_batch_size=2, max_eval_samples=3, max_new_tokens=6, use_cpu='true').items() for x in ('-p', f'{k}={v}')]]
    env = {**os.environ, 'HF_HUB_OFFLINE': '1'}
    p = subprocess.Popen(cmd, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for l in p.stderr:
        if 'demo-r8' in l: p.kill(); break
    p.wait()
    again = subprocess.run(cmd, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert again.returncode==0, again.stderr
    assert again.stderr.count('unchanged, skipped')>=4
    got = json.loads(again.stdout)
    assert {r['status'] for r in got['runs']}=={'evaluated'} and got['metric']=='field_accuracy'
