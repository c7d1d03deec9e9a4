"Metrics and intervals against the libraries called directly, published definitions, and simulations with a known truth"
import ast, json, math, random, re, string, subprocess, sys, time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ftnb.base import UserError
from ftnb.bootstrap import Scores, compare, paired_bootstrap, ratio_bootstrap, resamples, verdict
from ftnb.metrics import (check_pairs, corpus_scores, field_table, find_object, is_json_set, json_scores, lcs_length, length_stats,
                          mean_scores, perplexity, read_object, rouge_reads, rouge_scorer, same_value, squad_tokens, text_scores, token_f1)

WORDS = 'The quick Runner running runs, a an the fox! it\'s größe 42 3.5 «да» 日本 \n x-y U.S. jumped'.split(' ')

def texts(n, seed, most=25):
    rng = random.Random(seed)
    return [' '.join(rng.choices(WORDS, k=rng.randrange(most))) for _ in range(n)]

# Text

def test_rows_equal_the_libraries():
    sacrebleu, scorer = pytest.importorskip('sacrebleu'), pytest.importorskip('rouge_score.rouge_scorer')
    rouge = scorer.RougeScorer(['rouge1', 'rouge2', 'rougeL'], use_stemmer=True)
    preds, refs = texts(80, 1), texts(80, 2)
    for p, r, o in zip(preds, refs, text_scores(preds, refs)):
        assert o['bleu']==sacrebleu.sentence_bleu(p, [r], use_effective_order=True).score
        assert o['chrf']==sacrebleu.sentence_chrf(p, [r]).score
        if rouge_reads(r): assert {k: o[k] for k in ('rouge1', 'rouge2', 'rougeL')}=={k: v.fmeasure for k, v in rouge.score(r, p).items()}
        assert (o['n_chars'], o['n_words'], o['exact_match'])==(len(p), len(p.split()), float(p.strip()==r.strip()))

def test_rouge_is_that_of_a_hand_count():
    o = rouge_scorer()('the cats ran home', 'the cat ran far home') # stemmed: cats = cat
    assert o['rouge1']==pytest.approx(2*4/(4+5)) and o['rouge2']==pytest.approx(2*2/(3+4)) and o['rougeL']==pytest.approx(2*4/(4+5))

def test_bleu_of_a_short_row_uses_effective_order():
    o, = text_scores(['two words'], ['two words'])
    assert o['bleu']==pytest.approx(100) and o['chrf']==pytest.approx(100)

def test_lcs_equals_the_table():
    def table(a, b):
        row = [0]*(len(b)+1)
        for x in a:
            old, row = row, [0]
            for j, y in enumerate(b): row.append(old[j]+1 if x==y else max(old[j+1], row[j]))
        return row[-1]
    rng = random.Random(3)
    for _ in range(300):
        a, b = (rng.choices('abcde', k=rng.randrange(90)) for _ in range(2))
        assert lcs_length(a, b)==lcs_length(b, a)==table(a, b)

def official_f1(gold, pred):
    "SQuAD's compute_f1, written out as its definition: precision and recall of the bag of normalised tokens"
    def tokens(s):
        s = ''.join(c for c in s.lower() if c not in set(string.punctuation))
        return ' '.join(re.sub(re.compile(r'\b(a|an|the)\b', re.UNICODE), ' ', s).split()).split()
    gold, pred = tokens(gold), tokens(pred)
    same = sum((Counter(gold)&Counter(pred)).values())
    if not gold or not pred: return int(gold==pred)
    if not same: return 0
    p, r = same/len(pred), same/len(gold)
    return 2*p*r/(p+r)

@pytest.mark.parametrize('pred,ref,want', [
    ('Saint Bernadette Soubirous', 'Saint Bernadette Soubirous', 1), ('the Saint Bernadette.', 'Saint Bernadette Soubirous', .8),
    ('a golden statue of the Virgin Mary', 'golden statue', 4/7), ('Paris', 'Rome', 0), ('An apple', 'apple!', 1),
    ('', '', 1), ('...', 'the', 1), ('', 'x', 0), ('x', '', 0), ('theatre', 'atre', 0), ('no no', 'no', 2/3)])
def test_squad_f1_of_known_examples(pred, ref, want): assert token_f1(pred, ref)==pytest.approx(want)

def test_squad_f1_equals_the_official_definition():
    for p, r in zip(texts(200, 4), texts(200, 5)): assert token_f1(p, r)==pytest.approx(official_f1(r, p))
    assert squad_tokens('The U.S. and an a-the') == ['us', 'and', 'athe']

def test_rouge_is_absent_where_it_can_not_see():
    ru = text_scores(['привет мир', 'hello'], ['привет мир', 'hello'])
    assert [o['rouge1'] for o in ru]==[None, 1] and [o['token_f1'] for o in ru]==[1, 1]
    assert [rouge_reads(o) for o in ('größe', 'Übermäßig', 'né en Pologne', 'мир 5', 'Hé', '', '!')]==[True]*3+[False]+[True]*3
    res = corpus_scores(['привет', 'hello'], ['привет', 'hello'])
    assert (res['rouge1'], res['rouge_rows'])==(1, 1)

def test_any_text_gets_a_score():
    odd = ['', ' ', '\n\n', '\x00', '\ud800', '🙂'*50, 'é', 'e\u0301', '<skipped>', '&quot;', 'ß'*3000, '«»', '\u202eabc', '%s {0}']
    for o in text_scores(odd, odd[::-1])+text_scores(odd, odd): assert all(v is None or math.isfinite(v) for v in o.values())
    assert all(o['exact_match']==1 for o in text_scores(odd, odd))

def test_a_model_that_repeats_itself_is_scored_soon():
    long = 'loop over and '*15_000
    assert text_scores([long], ['loop over'])[0]['rougeL']<.01

def test_white_space_around_an_answer_is_no_mistake():
    assert [o['exact_match'] for o in text_scores(['\nParis ', 'Pa ris', 'paris'], ['Paris']*3)]==[1, 0, 0]

def test_columns_that_do_not_fit():
    for f in (text_scores, corpus_scores, json_scores, field_table, check_pairs):
        with pytest.raises(UserError, match='3 predictions and 2 references'): f(['{}']*3, ['{}']*2)
        with pytest.raises(UserError, match='0 predictions'): f([], [])
        with pytest.raises(UserError, match='reference of row 1'): f(['{}', '{}'], ['{}', None])
        with pytest.raises(UserError, match='list'): f('{}', ['{}', '{}'])

# The set

def test_corpus_equals_sacrebleu():
    sacrebleu = pytest.importorskip('sacrebleu')
    preds, refs = texts(60, 6), texts(60, 7)
    res, rows = corpus_scores(preds, refs), text_scores(preds, refs)
    assert res['bleu']==sacrebleu.corpus_bleu(preds, [refs]).score and res['chrf']==sacrebleu.corpus_chrf(preds, [refs]).score
    assert res['token_f1']==pytest.approx(np.mean([o['token_f1'] for o in rows]))
    assert sacrebleu.__version__ in res['bleu_signature'] and 'nrefs:1' in res['chrf_signature'] and 'eff:no' in res['bleu_signature']
    assert res['length_ratio']==pytest.approx(res['pred_words']['mean']/res['ref_words']['mean'])
    assert corpus_scores(preds, refs, rows=rows)==res and json.loads(json.dumps(res, allow_nan=False))==res
    assert corpus_scores(['a'], [''])['length_ratio'] is None

def test_lengths():
    words = [1, 2, 3, 4, 100]
    res = length_stats([' '.join(['w']*n) for n in words])
    assert res==dict(n=5, empty=0, mean=22, median=3, p90=pytest.approx(np.percentile(words, 90)), max=100)
    with pytest.raises(UserError, match='0 texts'): length_stats([])

def test_means_leave_out_what_was_not_measured(): assert mean_scores([dict(a=None, b=None), dict(a=2, b=None)])==dict(a=2, b=None)

# JSON

REF = '{"name": "Ada", "born": {"year": 1815, "city": "London"}, "alive": false, "score": 1}'

@pytest.mark.parametrize('pred,valid,inside,accuracy,whole,extra', [
    (REF, 1, 1, 1, 1, 0),
    (f'\n {REF}\t', 1, 1, 1, 1, 0),
    ('{"score": 1.0, "alive": false, "born": {"city": "London", "year": 1815}, "name": "Ada"}', 1, 1, 1, 1, 0),
    (REF.replace('1815', '1816'), 1, 1, .75, 0, 0), # nested
    (REF.replace('false', '"false"'), 1, 1, .75, 0, 0), (REF.replace('false', '0'), 1, 1, .75, 0, 0),
    (REF.replace('"score": 1', '"score": true'), 1, 1, .75, 0, 0), (REF.replace('"score": 1', '"score": "1"'), 1, 1, .75, 0, 0),
    (REF.replace('"name"', '"Name"'), 1, 1, .75, 0, 1), # one missing, one extra
    (REF[:-1]+', "note": null}', 1, 1, 1, 0, 1),
    (REF.replace('"Ada"', 'null'), 1, 1, .75, 0, 0), ('{}', 1, 1, 0, 0, 0),
    (f'[{REF}]', 0, 1, 0, 0, None), # list
    (f'{REF} I hope this helps.', 0, 1, 0, 0, None), (f'Here: {REF}', 0, 1, 0, 0, None), (f'```json\n{REF}\n```', 0, 1, 0, 0, None),
    ('{"name": "Ada", "name": "Bob"}', 0, 0, 0, 0, None), # duplicate keys
    (REF.replace('"score": 1', '"score": NaN'), 0, 0, 0, 0, None), (REF.replace('"score": 1', '"score": -Infinity'), 0, 0, 0, 0, None),
    (REF[:-10], 0, 0, 0, 0, None), (REF.replace('"', "'"), 0, 0, 0, 0, None), ('', 0, 0, 0, 0, None), ('null', 0, 0, 0, 0, None),
    ('{"name": "A\nda"}', 0, 0, 0, 0, None), # raw newline in a text
    ('{"a":'*50_000, 0, 0, 0, 0, None), ('['*100_000, 0, 0, 0, 0, None), ('{"score": '+'9'*5000+'}', 0, 0, 0, 0, None)])
def test_json_answers(pred, valid, inside, accuracy, whole, extra):
    o, = json_scores([pred], [REF])
    assert o==dict(valid_json=valid, json_inside=inside, field_accuracy=accuracy, whole_answer=whole, extra_keys=extra)

def test_field_table_counts_rows_that_have_the_field():
    refs = ['{"a": 1, "b": 2}', '{"a": 1}', '{"a": true, "c": []}']
    t = field_table(['{"a": 1, "b": 3}', 'no', '{"a": 1, "c": []}'], refs)
    assert [tuple(o.values()) for o in t]==[('a', 3, 1, 1, .3333), ('b', 1, 0, 0, 0), ('c', 1, 1, 0, 1)]
    assert '<b>' not in field_table(['{}'], ['{"<b>": 1}'])._repr_html_()

def test_field_accuracy_and_table_agree():
    rng = random.Random(8)
    refs = [json.dumps({k: rng.randrange(3) for k in 'abc'}) for _ in range(50)]
    preds = [rng.choice([json.dumps({k: rng.randrange(3) for k in 'abcd'}), 'prose']) for _ in range(50)]
    t = field_table(preds, refs)
    mean = np.mean([o['field_accuracy'] for o in json_scores(preds, refs)])
    assert mean==pytest.approx(sum(o['right'] for o in t)/sum(o['n'] for o in t))

def test_json_sets():
    assert is_json_set([REF, '{}']) and not any(map(is_json_set, ([], [REF, 'x'], ['[]'], ['{"a": NaN}'], [None], ['{"a": 1, "a": 1}'])))
    with pytest.raises(UserError, match='reference of row 2'): json_scores(['']*3, [REF, REF, 'Rome'])

def test_find_object_takes_no_half_of_a_cut_answer():
    assert find_object('{"born": {"year": 1815}, "na', ['born', 'name']) is None
    assert find_object('x {"year": 1}')==dict(year=1) and find_object('{') is None
    assert read_object('{"a": 1}{"a": 2}') is None
    start = time.time()
    assert find_object('{"a":'*300_000, ['a']) is None and time.time()-start<10

def test_values_are_equal_as_json_means_them():
    assert same_value([{'a': None}], [{'a': None}]) and same_value(dict(a=1, b=[2.]), dict(b=[2], a=1.))
    for a, b in (('a', 'A'), ([1], [1, 2]), ([], [1]), ({}, dict(a=1)), (dict(a=1), dict(a=1, b=2)), (0, None), (dict(a=1), dict(b=1))):
        assert not same_value(a, b) and not same_value(b, a)

def test_a_reference_without_fields():
    res = json_scores(['{}', 'no', '{"a": 1}', 'see {"b": 1}'], ['{}']*4)
    assert [(o['field_accuracy'], o['whole_answer'], o['json_inside']) for o in res]==[(1, 1, 1), (0, 0, 0), (1, 0, 1), (0, 0, 1)]

# Perplexity

def test_perplexity():
    rng = np.random.default_rng(9)
    n = rng.integers(1, 40, size=30)
    loss = rng.uniform(0, 5, size=30)*n
    assert perplexity(loss, n)==pytest.approx(np.exp(loss.sum()/n.sum()))==perplexity(loss.sum(), n.sum())
    assert perplexity(np.float32(0), np.int64(3))==1 and perplexity(5000., 1)==math.inf and perplexity([math.inf], [1])==math.inf
    assert perplexity([4*math.log(7), 0], [4, 0])==pytest.approx(7)
    for bad in ((0, 0), ([], []), ([1.], [math.nan]), ([math.nan], [1]), ([1., 1.], [1]), ([1.], [-1])):
        with pytest.raises(UserError): perplexity(*bad)

# Intervals

def test_interval_is_that_of_a_plain_loop():
    rng = np.random.default_rng(10)
    a, b = rng.normal(size=(2, 30))
    draws = [np.mean((b-a)[idx]) for block in resamples(30, 500, 4) for idx in block]
    res = paired_bootstrap(a, b, n_boot=500, seed=4, level=.9)
    assert (res['low'], res['high'])==pytest.approx(tuple(np.percentile(draws, [5, 95])))
    assert (res['mean_a'], res['mean_b'], res['diff'], res['n'])==pytest.approx((a.mean(), b.mean(), b.mean()-a.mean(), 30))
    assert len(draws)==500 and list(res)==['mean_a', 'mean_b', 'diff', 'low', 'high', 'n']

def coverage(draw, truth, level, sims=200):
    "Share of simulated experiments whose interval holds the truth"
    res = [paired_bootstrap(*draw(np.random.default_rng(s)), n_boot=400, seed=s, level=level) for s in range(sims)]
    return sum(o['low']<=truth<=o['high'] for o in res)/sims

def test_intervals_hold_the_truth_as_often_as_they_say():
    def normal(rng):
        a = rng.normal(size=80)
        return a, a+.3+rng.normal(size=80)
    def binary(rng): return rng.uniform(size=100)<.3, rng.uniform(size=100)<.5
    assert .89<=coverage(normal, .3, .95)<=.995 and .89<=coverage(binary, .2, .95)<=.995
    assert .70<=coverage(normal, .3, .8)<=.87

def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(11)
    hard = rng.normal(scale=10, size=100)
    res = paired_bootstrap(hard, hard+1+rng.normal(scale=.5, size=100))
    assert 0<res['low']<1<res['high'] or .8<res['low']<res['high']<1.2
    assert res['high']-res['low']<.3

def test_the_seed_decides():
    a, b = np.random.default_rng(12).normal(size=(2, 50))
    assert paired_bootstrap(a, b)==paired_bootstrap(list(a), list(b)) and paired_bootstrap(a, b, seed=1)!=paired_bootstrap(a, b, seed=2)
    wider, narrower = (paired_bootstrap(a, b, level=x) for x in (.99, .5))
    assert wider['low']<narrower['low']<narrower['high']<wider['high']

def test_many_rows_stay_in_blocks():
    blocks = [o.size for o in resamples(50_000, 200, 0)]
    assert sum(blocks)==50_000*200 and max(blocks)<=4_000_000
    rows = np.concatenate(list(resamples(10, 5000, 0)))
    assert rows.min()==0 and rows.max()==9 and abs(rows.mean()-4.5)<.05

@pytest.mark.parametrize('a,b', [([], []), ([1], [1, 2]), ([1, math.nan], [1, 1]), ([1, 1], [1, None]), ([math.inf], [1])])
def test_no_interval_without_numbers(a, b):
    with pytest.raises(UserError): paired_bootstrap(a, b)

def test_level_and_resamples_are_checked():
    for kw in (dict(level=95), dict(level=0), dict(n_boot=0)):
        with pytest.raises(UserError, match='try'): paired_bootstrap([1, 2], [1, 2], **kw)

def test_ratio_of_perplexities():
    rng = np.random.default_rng(13)
    n = rng.integers(1, 60, size=150)
    base, tuned = ([(x, k) for x, k in zip(n*rng.normal(m, .3, size=150), n)] for m in (2, 1.6))
    res = ratio_bootstrap(base, tuned)
    assert res['base']==pytest.approx(perplexity(*zip(*base))) and res['tuned']==pytest.approx(perplexity(*zip(*tuned)))
    assert res['ratio']==pytest.approx(res['tuned']/res['base']) and res['low']<res['ratio']<res['high']<1
    assert verdict(res['low'], res['high'], lower=True, same=1.)=='better'
    back = ratio_bootstrap(tuned, base)
    assert (back['low'], back['high'])==pytest.approx((1/res['high'], 1/res['low']))
    draws = []
    lb, lt, k = (np.array(o) for o in ([x for x, _ in base], [x for x, _ in tuned], n))
    for block in resamples(150, 2000, 0): draws += [math.exp((lt[i].sum()-lb[i].sum())/k[i].sum()) for i in block]
    assert (res['low'], res['high'])==pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), rel=1e-3)

def test_ratio_needs_the_same_tokens():
    same = ratio_bootstrap([(3., 2), (0, 0)], [(3., 2), (0, 0)])
    assert (same['ratio'], same['low'], same['high'], same['n'])==(1, 1, 1, 1)
    for base, tuned in (([], []), ([(1., 2)], [(1., 3)]), ([(1., 2)], [(1., 2)]*2), ([(math.nan, 2)], [(1., 2)]), ([(0., 0)], [(0., 0)])):
        with pytest.raises(UserError): ratio_bootstrap(base, tuned)

# Better, worse or unclear

def rows(n=40, **cols): return [{k: v[i] if hasattr(v, '__len__') else v for k, v in cols.items()} for i in range(n)]

def test_words_follow_the_interval_and_the_direction():
    noise = np.random.default_rng(14).normal(scale=.1, size=40)
    base = rows(chrf=50., loss=2., perplexity=9., extra_keys=1., n_words=10., token_f1=.5, bleu=noise)
    tuned = rows(chrf=60+noise, loss=1+noise, perplexity=10+noise, extra_keys=0., n_words=5+noise, token_f1=.5, bleu=noise[::-1])
    res = compare(base, tuned)
    assert {o['metric']: o['better'] for o in res}==dict(
        chrf='better', loss='better', perplexity='worse', extra_keys='better', n_words=None, token_f1='unclear', bleu='unclear')
    for o in res:
        assert o['low']<=o['difference']<=o['high'] and o['difference']==pytest.approx(o['tuned']-o['base']) and o['n']==40
        assert list(o)==['metric', 'base', 'tuned', 'difference', 'low', 'high', 'n', 'better']
    assert {o['metric']: o['better'] for o in compare(tuned, base)}['chrf']=='worse'

def test_an_interval_that_touches_no_difference_is_unclear():
    assert [verdict(*o) for o in ((0, 1), (-1, 0), (0, 0), (-1, 1), (1e-9, 1), (-1, -1e-9))]==['unclear']*4+['better', 'worse']
    assert [verdict(*o, lower=True, same=1.) for o in ((.5, 1), (.5, .9), (1.1, 2))]==['unclear', 'better', 'worse']

def test_a_comparison_hands_on_its_settings():
    a, b = np.random.default_rng(17).normal(size=(2, 30))
    kw = dict(n_boot=100, seed=5, level=.8)
    o, want = compare(rows(30, m=a), rows(30, m=b), **kw)[0], paired_bootstrap(a, b, **kw)
    assert (o['base'], o['tuned'], o['difference'], o['low'], o['high'], o['n'])==tuple(want.values())

def test_no_difference_is_unclear():
    base = text_scores(texts(20, 15), texts(20, 16))
    assert {o['better'] for o in compare(base, base)}=={'unclear', None} and all(o['low']==o['high']==0 for o in compare(base, base))

def test_clearly_different_rows_exclude_zero():
    refs = [f'{{"a": {i}}}' for i in range(30)]
    res = {o['metric']: o for o in compare(json_scores(['I do not know']*30, refs), json_scores(refs, refs))}
    assert res['valid_json']['better']==res['whole_answer']['better']=='better' and res['field_accuracy']['low']>0
    assert 'extra_keys' not in res # no row in which the base model gave keys

def test_few_changed_rows_are_unclear():
    for changed, want in ((4, 'unclear'), (5, 'unclear'), (6, 'better'), (20, 'better')):
        assert compare(rows(100, exact_match=0.), rows(100, exact_match=[float(i<changed) for i in range(100)]))[0]['better']==want
    assert compare([dict(bleu=1)], [dict(bleu=99)])[0]['better']=='unclear'

def test_chance_is_seldom_called_a_difference():
    def words(s):
        rng = np.random.default_rng(s)
        return compare(rows(60, m=rng.uniform(size=60)<.1), rows(60, m=rng.uniform(size=60)<.1), n_boot=300, seed=s)[0]['better']
    assert sum(words(s)!='unclear' for s in range(200))<=20

def test_only_shared_numbers_are_compared():
    res = compare([dict(id='x', a=1, b=2, c=None), dict(id='y', a=1, c=3)], [dict(id='x', a=2, b=2, c=4), dict(id='y', a=2, b=1, c=5)])
    assert {o['metric']: o['n'] for o in res}==dict(a=2, c=1)
    with pytest.raises(UserError, match='2 rows of the base model and 1'): compare([{}, {}], [{}])
    with pytest.raises(UserError, match='0 rows'): compare([], [])
    with pytest.raises(UserError, match='^a: Row 0'): compare([dict(a=math.nan)], [dict(a=1.)])

def test_a_comparison_shows_itself():
    res = compare(rows(a=1/3), rows(a=2/3))
    assert isinstance(res, Scores) and len(res)==1 and '95 % interval' in repr(res)
    assert '0.3333' in repr(res) and 'better' in res._repr_html_()
    assert 'a' not in repr(Scores([], cols=['b'])) and json.loads(json.dumps(res.rows, allow_nan=False))==res.rows

# The floor

@pytest.mark.parametrize('name', ['metrics', 'bootstrap'])
def test_heavy_libraries_are_imported_late(name):
    import ftnb
    heavy = 'torch transformers datasets pandas numpy sacrebleu rouge_score nltk'.split()
    code = f'import sys, ftnb.{name}; print([o for o in {heavy} if o in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()=='[]'
    tree = ast.parse((Path(ftnb.__file__).parent/f'{name}.py').read_text())
    assert {o.module for o in tree.body if isinstance(o, ast.ImportFrom) and o.level}=={'base'}
