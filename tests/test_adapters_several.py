"Several adapters on one base: switched without a reload, mixed in a batch, combined, deleted, saved, and refused with a sentence"
import json, math, re, shutil
from pathlib import Path

import pytest
from conftest import write_rows
from ftnb.base import UserError
from ftnb.recipe import make_recipe
from ftnb.several import _taken, new_name, ways

torch = pytest.importorskip('torch')

def make_adapter(tiny, folder, name, seed, r=4, kind='lora', **more):
    "An adapter with random weights, saved as PEFT saves it"
    import peft
    from transformers import AutoModelForCausalLM
    torch.manual_seed(seed)
    kinds = dict(lora=lambda: peft.LoraConfig(r=r, lora_alpha=8, init_lora_weights=False, task_type='CAUSAL_LM', **{**dict(target_modules=['q_proj', 'v_proj', 'down_proj']), **more}),
        ia3=lambda: peft.IA3Config(target_modules=['k_proj', 'v_proj', 'down_proj'], feedforward_modules=['down_proj'], init_ia3_weights=False, task_type='CAUSAL_LM'), prompt=lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type='CAUSAL_LM'))
    m = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), kinds[kind]())
    m.save_pretrained(folder/name)
    return folder/name

@pytest.fixture(scope='module')
def made_of(tiny, tmp_path_factory):
    "Folders of adapters by name: a, b, c of rank 4, wide of rank 8, rs with rsLoRA, dora, other (layers), ia, ib (IA3), pr, pq (prompts)"
    d = tmp_path_factory.mktemp('adapters')
    out = {n: make_adapter(tiny, d, n, i) for i,n in enumerate('abc')}
    out['wide'] = make_adapter(tiny, d, 'wide', 5, r=8)
    out['rs'] = make_adapter(tiny, d, 'rs', 6, use_rslora=True)
    out['dora'] = make_adapter(tiny, d, 'dora', 7, use_dora=True)
    out['other'] = make_adapter(tiny, d, 'other', 8, target_modules=['k_proj'])
    for i,(n,k) in enumerate(dict(ia='ia3', ib='ia3', pr='prompt', pq='prompt').items(), 9): out[n] = make_adapter(tiny, d, n, i, kind=k)
    return out

def empty(tiny, **more):
    from ftnb.shelf import Adapters
    return Adapters(make_recipe(dict(model_name_or_path=tiny, dtype='float32', use_cpu=True, **more)))

@pytest.fixture(scope='module')
def stocked(tiny, made_of):
    "A shelf that no test changes"
    s = empty(tiny)
    for n,p in made_of.items(): s.add(n, p)
    return s

@pytest.fixture
def shelf(tiny, made_of):
    s = empty(tiny)
    for n in ('a', 'b', 'wide'): s.add(n, made_of[n])
    return s

IDS = [[1, 40, 77, 300], [1, 5, 9], [1, 500, 2000, 77, 31, 8], [1, 12]]
@torch.inference_mode()
def logits(model, ids=IDS[0]): return model(torch.tensor([ids])).logits[0]

def alone(tiny, folder, ids=IDS[0]):
    "Logits of a base and one adapter, loaded by PEFT alone"
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder).eval(), ids)

def delta(shelf, name):
    "What a LoRA adapter adds to each layer's weight"
    tree = shelf._trees['LORA']
    return {n: m.get_delta_weight(name) for n,m in tree.named_modules() if hasattr(m, 'get_delta_weight') and name in m.lora_A}

def same(a, b): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

# ---- switching

def test_every_adapter_answers_as_it_would_alone_and_the_base_as_if_there_were_none(tiny, made_of, stocked):
    from transformers import AutoModelForCausalLM
    base = logits(AutoModelForCausalLM.from_pretrained(tiny))
    seen = []
    for n in made_of:
        with stocked.using(n) as m: got = logits(m)
        same(got[-len(IDS[0]):], alone(tiny, made_of[n])[-len(IDS[0]):])
        assert all((got[-1]-o).abs().max()>1e-3 for o in seen), n
        seen.append(got[-1])
        with stocked.using('base') as m: assert torch.equal(logits(m), base)

def test_switching_loads_nothing_and_copies_nothing_of_the_base(stocked):
    def places(m): return {p.data_ptr() for p in m.parameters()}
    base = places(stocked.base)
    before = {k: places(t) for k,t in stocked._trees.items()}
    for n in (*stocked.names, 'a'): stocked.use(n)
    assert len(stocked._trees)==3 and all(base<=v for v in before.values())
    assert {k: places(t) for k,t in stocked._trees.items()}==before
    stocked.off()

def test_the_weights_of_the_base_are_the_same_bits_after_everything(tiny, shelf, made_of):
    was = {k: v.clone() for k,v in shelf.base.state_dict().items()}
    shelf.add('ia', made_of['ia']).combine('x', dict(a=1, b=1), 'ties').use('x').use(['a', 'b']).delete('a')
    shelf.answers(['hello'], 'ia', max_new_tokens=2)
    assert all(torch.equal(v, was[k]) for k,v in shelf.base.state_dict().items())

def test_several_active_adapters_add_up(shelf):
    shelf.combine('sum', dict(a=1, wide=1), 'cat')
    with shelf.using(['a', 'wide']) as m: two = logits(m)
    with shelf.using('sum') as m: same(two, logits(m))
    with shelf.using('a') as m: assert (two-logits(m)).abs().max()>1e-3

def test_a_while_of_another_adapter_leaves_the_active_one_as_it_was(shelf):
    shelf.use('b')
    with pytest.raises(RuntimeError):
        with shelf.using('a'): raise RuntimeError
    assert shelf.active==['b'] and [o['active'] for o in shelf.list()]==['', 'yes', '']

# ---- mixed batches

def test_each_row_of_a_mixed_batch_is_answered_as_its_adapter_answers_alone(stocked):
    who = ['a', 'base', 'b', 'wide', 'a', 'rs']
    ids = [IDS[i%4] for i in range(6)]
    said = stocked.answers(ids, who, max_new_tokens=6)
    assert said==[stocked.answers([p], w, max_new_tokens=6)[0] for p,w in zip(ids, who)]
    assert len({*stocked.answers([IDS[0]]*4, ['a', 'base', 'b', 'wide'], max_new_tokens=6)})==4

def test_a_mixed_batch_of_lora_is_one_pass(stocked, monkeypatch):
    calls = []
    tree = stocked._trees['LORA']
    old = tree.generate
    monkeypatch.setattr(tree, 'generate', lambda *a, **k: (calls.append(k.get('adapter_names')), old(*a, **k))[1])
    stocked.answers([IDS[0]]*3, ['a', 'base', 'b'], max_new_tokens=2)
    assert [sorted(c) for c in calls]==[['__base__', 'a', 'b']]

def test_rows_of_other_methods_are_answered_one_after_the_other_in_the_order_asked(stocked):
    who = ['ia', 'a', 'pr', 'dora', 'base', 'ib']
    assert stocked.answers([IDS[0]]*6, who, max_new_tokens=4)==[stocked.answers([IDS[0]], w, max_new_tokens=4)[0] for w in who]

# ---- combining

def test_linear_with_weights_one_and_zero_is_the_single_adapter(shelf):
    shelf.combine('x', dict(a=1, b=0))
    for k,d in delta(shelf, 'x').items(): same(d, delta(shelf, 'a')[k])

def test_cat_of_different_ranks_is_the_weighted_sum_of_both(shelf):
    shelf.combine('x', dict(a=.7, wide=-.5), 'cat')
    assert shelf.infos['x']['rank']==12
    for k,d in delta(shelf, 'x').items(): same(d, .7*delta(shelf, 'a')[k]-.5*delta(shelf, 'wide')[k])

def test_svd_at_full_rank_is_the_sum_and_below_it_is_near(shelf):
    shelf.combine('full', dict(a=1, wide=1), 'svd', rank=12).combine('less', dict(a=1, wide=1), 'svd')
    a, w, f, l = (delta(shelf, n) for n in ('a', 'wide', 'full', 'less'))
    for k in a:
        same(f[k], a[k]+w[k])
        assert 0<(l[k]-f[k]).norm()<.7*f[k].norm()
    assert shelf.infos['less']['rank']==8

def test_rslora_does_not_make_a_combination_too_strong(shelf, made_of):
    shelf.add('rs', made_of['rs'])
    for i,how in enumerate(('cat', 'svd', 'linear')):
        shelf.combine(f'x{i}', dict(rs=1, a=0) if how=='linear' else dict(rs=1, a=1), how, rank=8)
        want = delta(shelf, 'rs') if how=='linear' else {k: v+delta(shelf, 'a')[k] for k,v in delta(shelf, 'rs').items()}
        for k,d in delta(shelf, f'x{i}').items(): same(d, want[k])

@pytest.mark.parametrize('how', ways)
def test_every_way_gives_an_adapter_that_answers_saves_and_loads(how, tiny, shelf, tmp_path):
    shelf.combine('x', dict(a=1, b=.5), how, density=.5)
    with shelf.using('x') as m: was = logits(m)
    with shelf.using('a') as m: assert (was-logits(m)).abs().max()>1e-4
    shelf.save(tmp_path, 'x')
    same(alone(tiny, tmp_path/'x'), was)
    assert json.loads((tmp_path/'x/combination.json').read_text())['of']==dict(a=1, b=.5)

def test_what_is_dropped_at_random_is_the_same_for_the_same_seed(shelf):
    state = torch.get_rng_state()
    for n,s in (('x', 1), ('y', 1), ('z', 2)): shelf.combine(n, dict(a=1, b=1), 'dare_linear', seed=s)
    x, y, z = (delta(shelf, n) for n in 'xyz')
    assert all(torch.equal(x[k], y[k]) for k in x) and any((x[k]-z[k]).abs().max()>1e-4 for k in x)
    assert torch.equal(torch.get_rng_state(), state)

def test_vectors_of_ia3_are_added(tiny, made_of):
    s = empty(tiny).add('ia', made_of['ia']).add('ib', made_of['ib']).combine('x', dict(ia=.5, ib=.5))
    with s.using('x') as m: x = logits(m)
    with s.using('ia') as m: assert (x-logits(m)).abs().max()>1e-4
    with pytest.raises(UserError, match='only vectors'): s.combine('y', dict(ia=1, ib=1), 'ties')

# ---- saving and deleting

def test_all_adapters_saved_and_loaded_in_fresh_objects_answer_the_same(tiny, made_of, stocked, tmp_path):
    stocked.save(tmp_path)
    fresh = empty(tiny)
    for n in stocked.names: fresh.add(n, tmp_path/n)
    for n in stocked.names:
        with stocked.using(n) as a, fresh.using(n) as b: assert torch.equal(logits(a), logits(b)), n
    with pytest.raises(UserError, match='is there already'): stocked.save(tmp_path, 'a')

def test_deleting_the_active_adapter_says_what_answers_now(shelf):
    shelf.use('a')
    assert shelf.delete('b')=='b is deleted; a is active.'
    assert shelf.delete('a')=='a was active and is deleted; none is active, the base answers.'
    with shelf.using('base') as m: base = logits(m)
    assert torch.equal(logits(shelf.model), base)
    shelf.use('wide')
    assert (logits(shelf.model)-base).abs().max()>1e-3 and shelf.names==['wide']
    assert shelf.delete('wide')=='wide was active and is deleted; none is active, the base answers.' and not shelf._trees

def test_deleting_one_of_several_active_keeps_the_others(tiny, made_of, shelf):
    shelf.use(['a', 'b'])
    assert shelf.delete('a')=='a was active and is deleted; b is active.'
    same(logits(shelf.model), alone(tiny, made_of['b']))

def test_a_deleted_name_is_free_again(tiny, made_of, shelf):
    shelf.delete('a')
    shelf.add('a', made_of['c'])
    with shelf.using('a') as m: same(logits(m), alone(tiny, made_of['c']))

# ---- what is refused

WRONG = [(lambda s: s.use('bb'), "There is no adapter 'bb'; there are a, b, wide."), (lambda s: s.use('wid'), "Did you mean 'wide'?"), (lambda s: s.use(['a', 'wyde']), "Did you mean 'wide'?"), (lambda s: s.use([]), 'off() lets the base answer'),
    (lambda s: s.delete('wyde'), "Did you mean 'wide'?"), (lambda s: s.combine('x', dict(a=1, wyde=1), 'cat'), "Did you mean 'wide'?"), (lambda s: s.combine('a', dict(a=1, b=1)), "There is an adapter 'a' already"),
    (lambda s: s.combine('x', dict(a=1, wide=1), 'ties'), 'ties needs adapters of the same rank, and these have a 4, wide 8; cat and svd take different ranks'), (lambda s: s.combine('x', dict(a=1, b=1), 'tyes'), "Did you mean 'ties'?"),
    (lambda s: s.combine('x.y', dict(a=1, b=1)), "'x.y' is no name for an adapter"), (lambda s: s.combine('train', dict(a=1, b=1)), 'train_1'), (lambda s: s.save('/nowhere', 'wyde'), "Did you mean 'wide'?"),
    (lambda s: s.answers([[1]], ['wyde']), "Did you mean 'wide'?"), (lambda s: s.answers([[1], [2]], ['a']), '1 names for 2 prompts'), (lambda s: s.add('a', '.'), 'already')]
@pytest.mark.parametrize('do, said', WRONG, ids=range(len(WRONG)))
def test_a_wrong_name_is_one_sentence_and_changes_nothing(stocked_three, do, said):
    s = stocked_three
    with pytest.raises(UserError) as e: do(s)
    assert said in str(e.value) and '\n' not in str(e.value)
    assert s.names==['a', 'b', 'wide'] and s.active==['a'] and len(s._trees['LORA'].peft_config)==3

@pytest.fixture(scope='module')
def stocked_three(tiny, made_of):
    s = empty(tiny)
    for n in ('a', 'b', 'wide'): s.add(n, made_of[n])
    return s.use('a')

def test_methods_that_do_not_go_together_are_refused(stocked):
    for do,said in ((lambda: stocked.use(['a', 'ia']), 'different methods can not be active at once: a (lora), ia (ia3)'), (lambda: stocked.use(['pr', 'pq']), 'Only one adapter of this method'),
        (lambda: stocked.combine('x', dict(a=1, ia=1)), 'different methods can not be combined'), (lambda: stocked.combine('x', dict(a=1, other=1)), 'different layers'), (lambda: stocked.combine('x', dict(a=1, dora=1)), 'magnitudes')):
        with pytest.raises(UserError) as e: do()
        assert said in str(e.value)

def test_an_adapter_of_another_base_is_refused_before_it_is_loaded(tiny, made_of, shelf, tmp_path, monkeypatch):
    from conftest import make_tiny
    import peft
    big, twin = make_tiny(tmp_path/'big', hidden_size=64), tmp_path/'twin'
    other = make_adapter(big, tmp_path, 'big-one', 1)
    shutil.copytree(tiny, twin)
    moved = make_adapter(str(twin), tmp_path, 'moved', 2)
    strange = make_adapter(make_tiny(tmp_path/'like', initializer_range=.03), tmp_path, 'strange', 3)
    monkeypatch.setattr(peft.PeftModel, 'load_adapter', lambda *a, **k: pytest.fail('it was loaded'))
    for n,f,said in (('big-one', other, '_features 64, and that of this base 32'), ('strange', strange, 'load it on its own base, or pass any_base=True')):
        with pytest.raises(UserError) as e: shelf.add(n, f)
        assert said in str(e.value) and n in str(e.value)
    monkeypatch.undo()
    shelf.add('moved', moved).add('strange', strange, any_base=True) # the same weights in another folder, and one that is trusted
    assert shelf.names[-2:]==['moved', 'strange']

def test_no_name_that_a_torch_module_has_is_allowed():
    for c in (torch.nn.ModuleDict(), torch.nn.ParameterDict()):
        for n in dir(c):
            if re.fullmatch(r'[A-Za-z]\w*', n):
                with pytest.raises(UserError): new_name(n)

# ---- a group of tasks, and the command line

@pytest.fixture(scope='module')
def group(tiny, made_of, tmp_path_factory):
    "A group of two tasks whose runs are prepared and have adapters, as after stage 3"
    from ftnb.prepare import prepare
    from ftnb.runs import Run, begin, end
    from ftnb.tasks import gather, open_tasks
    d = tmp_path_factory.mktemp('group')
    rows = {t: [dict(prompt=f'{t} number {i}, what is it?', completion=f(i)) for i in range(30)] for t,f in dict(codes=lambda i: f'CODE-{i}', tickets=lambda i: json.dumps(dict(n=i))).items()}
    tasks = {t: dict(dataset=write_rows(d/f'{t}.jsonl', r)) for t,r in rows.items()}
    g = Run(d/'runs/desk', make_recipe(dict(model_name_or_path=tiny, dtype='float32', use_cpu=True, lora_r=4, test_size=4, valid_size=2, max_new_tokens=4, tasks=tasks))).save()
    (d/'settings.ini').write_text('[ftnb]\nruns = runs\n')
    runs = open_tasks(g, say=lambda *_: None)
    for (t,run),a in zip(runs.items(), 'ab'):
        begin(run, 'prepare'); prepare(run); end(run, 'prepare')
        begin(run, 'train'); shutil.copytree(made_of[a], run.path('adapter')); end(run, 'train')
    assert gather(g, runs)==['codes', 'tickets'] and gather(g, runs)==[]
    return g

def command(group, *args, **env):
    "(exit code, output, error output) of a command in the group's workspace"
    import contextlib, io, os
    from ftnb.cli import main
    out, err, was = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(group.folder.parent.parent)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main([*args])
    finally: os.chdir(was)
    return code, out.getvalue(), err.getvalue()

def test_a_task_is_an_ordinary_run_with_what_stands_outside_and_inside(group):
    from ftnb.runs import Run
    run = Run(group.folder.with_name('desk-codes'))
    assert (run.recipe.adapter_name, run.recipe.lora_r, run.recipe.tasks, Path(run.recipe.dataset).name)==('codes', 4, None, 'codes.jsonl') and run.done('train')

def test_a_task_is_not_made_out_of_a_run_that_is_something_else(tmp_path):
    from ftnb.runs import Run
    from ftnb.tasks import open_tasks
    Run(tmp_path/'desk-codes', make_recipe(dict(dataset='demo'))).save()
    with pytest.raises(UserError, match='is a run already, and not one of the task codes'): open_tasks(Run(tmp_path/'desk', make_recipe(dict(tasks=dict(codes=dict(dataset='demo'))))), say=lambda *_: None)

def test_a_mistake_in_one_task_is_said_before_anything_is_written(tmp_path, monkeypatch):
    from ftnb.opening import open_run
    monkeypatch.chdir(tmp_path)
    Path('desk.yaml').write_text('tasks:\n  codes: {dataset: demo, lora_r: 0}\n')
    with pytest.raises(UserError, match='tasks: codes: .*lora_r'): open_run('desk.yaml')
    assert [p.name for p in tmp_path.iterdir()]==['desk.yaml']

def test_the_table_of_a_group_is_made_in_a_process_of_its_own_and_only_once(group):
    from ftnb.tasks import compare_tasks
    rep, made = compare_tasks(group)
    assert made and rep['tasks']==['codes', 'tickets'] and list(rep['scores'])==['base', 'codes', 'tickets'] and rep['metric']==dict(codes='exact_match', tickets='field_accuracy') and rep['n']==dict(codes=4, tickets=4)
    assert {o['task'] for o in rep['answers']}=={'codes', 'tickets'} and set(rep['answers'][0])=={'task', 'prompt', 'reference', 'base', 'codes', 'tickets'}
    assert 'codes (exact_match, 4 rows)' in group.path('reports/tasks.html').read_text()
    assert not compare_tasks(group)[1]

def test_the_command_line_lists_combines_scores_saves_and_deletes(group):
    code, out, err = command(group, 'adapters', 'desk')
    assert code==0 and 'codes' in out and 'desk-tickets' in out, err
    code, out, err = command(group, 'adapters', 'desk', '--combine', 'ties', 'cat', '--of', 'codes=1', 'tickets=0.5', '--density', '0.2', '0.8', '--rows', '2', '--save', 'two')
    assert code==0 and [l.split()[0] for l in out.splitlines() if l.startswith(('ties', 'cat', 'alone', 'base'))]==['base', 'alone', 'alone', 'ties', 'ties', 'cat'] and 'saved two' in out, err
    assert 'codes 1, tickets 0.5' in command(group, 'adapters', 'desk')[1]
    linear = next(l for l in command(group, 'adapters', 'desk', '--combine', 'linear', '--rows', '2')[1].splitlines() if l.startswith('linear'))
    assert linear.startswith('linear  codes=1 tickets=1 ') and '0.5' not in linear, 'a combination is no part of the next one, and linear has no density'
    code, out, err = command(group, 'chat', 'desk', '--adapter', 'two', '--which', 'tuned', '--json', 'hello')
    assert code==0 and set(json.loads(out))=={'prompt', 'two'}, err
    assert set(json.loads(command(group, 'chat', 'desk', '--json', 'hello')[1]))=={'prompt', 'base', 'codes', 'tickets', 'two'}
    code, out, err = command(group, 'adapters', 'desk', '--delete', 'two')
    assert code==0 and 'two' not in out and not group.path('adapters/two').exists()

@pytest.mark.parametrize('args, said', [(('--delete', 'code'), "Did you mean 'codes'?"), (('--combine', 'tie', '--save', 'x'), "Did you mean 'ties'?"), (('--combine', 'ties', '--of', 'codse=1'), "Did you mean 'codes'?"), (('--combine', 'ties', '--save', 'codes'), 'already'),
    (('--save', 'x'), 'add --combine'), (('--combine', 'ties', '--density', '2'), 'above 0, at most 1'), (('--add', 'codes=desk-codes'), 'already'), (('--add', 'x=desk-code'), "Did you mean 'desk-codes'?"), (('--add', 'x=desk'), 'holds several adapters')])
def test_a_wrong_name_on_the_command_line_is_one_sentence(group, args, said):
    code, out, err = command(group, 'adapters', 'desk', *args)
    assert code==2 and said in err and err.startswith('ftnb: ') and err.count('\n')==1, err

def test_a_grid_scores_every_cell_and_leaves_no_trace(group):
    from ftnb.domains import combinations
    from ftnb.shelf import Adapters
    s = Adapters(group)
    t = s.grid(combinations(['codes', 'tickets'], ('linear', 'ties'), density=(.2, .8)), rows=2)
    assert [o['how'] for o in t]==['base', 'alone', 'alone', 'linear', 'ties', 'ties'] and [o['density'] for o in t][-2:]==[.2, .8]
    assert s.names==['codes', 'tickets'] and s.active==[]
    with pytest.raises(UserError, match="Did you mean 'codes'"): s.grid([dict(how='ties', weights=dict(code=1, tickets=1))])

@pytest.mark.soak
def test_three_adapters_answer_in_their_domain_and_not_in_the_format_of_the_others(tmp_path):
    import sys
    sys.path.insert(0, str(Path(__file__).parents[1]/'bench'))
    import adapters as bench
    from ftnb.domains import matrix
    from ftnb.shelf import Adapters
    data, shelf = bench.make_data(tmp_path), Adapters(make_recipe(dict(model_name_or_path='smollm2-135m')))
    runs = bench.train(tmp_path, data)
    bench.enough(shelf, runs, data)
    s = matrix(shelf, runs)['scores']
    assert all(s[t][t]>=.9 and s['base'][t]<=.1 for t in bench.TEXTS)
    assert all(s[w][t]<=.1 for w in bench.TEXTS for t in bench.TEXTS if w!=t)
    with pytest.raises(UserError, match='Did you mean'): shelf.use('ticket')
