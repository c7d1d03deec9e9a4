"Near duplicates and leaks: what is found, what is left alone, and that the work stays bounded"
import importlib.util, random, time
from pathlib import Path
import pytest
from ftnb.near import NearDuplicates, find_leaks, join_pairs, longest, near_groups, near_pairs, terms

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location('bench_near', ROOT/'bench/near.py')
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

@pytest.fixture(scope='module')
def questions(): return bench.questions(bench.DEMO)

def wordy(n, seed=0, size=25):
    "Texts of random words, no two alike"
    rng = random.Random(seed)
    return [' '.join(f'w{rng.randrange(3000)}' for _ in range(size)) for _ in range(n)]

def test_known_duplicates_are_found_and_little_else_is(questions):
    got = bench.quality(questions, len(questions))
    print({k:v for k,v in got.items() if k!='kinds'})
    assert got['recall_known']>=.9 and got['recall_over_threshold']>=.98
    assert got['precision']>=.95 and got['precision_known']>=.95

@pytest.mark.parametrize('kind', ['case', 'punctuation', 'a clause moved', 'one word', 'a number changed'])
def test_each_small_edit_is_found_on_its_own(questions, kind):
    rng, index = random.Random(1), NearDuplicates().fit(questions)
    long = [q for q in questions if len(terms(q))>=25][:100]
    for i,q in enumerate(long): index.add(i, q)
    hit = sum(any(j==i for j,_ in index.query(bench.EDITS[kind](q, rng))) for i,q in enumerate(long))
    assert hit>=95

def test_the_questions_of_the_demo_are_all_different(questions): assert near_groups(questions)==[]

def test_templates_do_not_make_two_subjects_the_same():
    subjects = [f'{a} {b} of the {c}' for a in ('acute', 'chronic', 'inherited') for b in ('palsy', 'fever', 'atrophy', 'anaemia') for c in ('liver', 'left knee', 'heart', 'inner ear')]
    asks = ('What research or clinical trials are being done today for the people who suffer from {}?', 'How is it found out by a doctor in the first weeks whether somebody has {} or not?')
    rows = [a.format(s) for s in subjects for a in asks]
    random.Random(0).shuffle(rows)
    assert near_groups(rows)==[]
    assert len(near_groups(rows, common=1))>0

def test_one_subject_in_two_templates_is_not_a_duplicate():
    name = 'hereditary angiopathy with nephropathy and aneurysms and muscle cramps and late onset and a slow course in the first ten years'
    asks = ('How many people in the world are affected by {} today?', 'Which of the treatments are recommended for a child with {} now?')
    others = [a.format(f'{w} syndrome') for w in wordy(50, size=2) for a in asks]
    assert near_groups([*others, *(a.format(name) for a in asks)])==[]

@pytest.mark.parametrize('a, b', [('What is 5 + 3?', 'What is 5 - 3?'), ('What is 5+3?', 'What is 5+4?'), ('Translate: dog', 'Translate: cat'), ('😀', '👍'), ('半分はいくつですか', '全部はいくつですか')])
def test_short_questions_that_differ_in_one_sign_stay_apart(a, b): assert near_groups([a, b])==[]

@pytest.mark.parametrize('a, b', [('What is 5+3?', 'what is 5 + 3'), ('Hi!', 'hi'), ('', ''), ('What is it', 'What is it?\n')])
def test_short_questions_with_the_same_words_are_the_same(a, b): assert near_groups([a, b])==[[0, 1]]

def test_scripts_without_spaces_are_compared_sign_by_sign():
    a = '私の新しいやかんは先週買ったばかりなのにもうお湯が沸かなくなりました。どうすればいいですか'
    assert near_groups([a, a.replace('先週', '先月'), '配送が遅れています。荷物は今どこにありますか、教えてください'])==[[0, 1]]

def test_the_same_texts_give_the_same_pairs_each_time(questions):
    texts, _ = bench.known_set(questions, 100)
    assert list(near_pairs(texts, seed=3))==list(near_pairs(texts, seed=3))

def test_two_thousand_variants_of_one_question_take_no_quadratic_time():
    base = wordy(1, size=60)[0]
    rows = [f'{base} number {i} please' for i in range(2000)]
    t = time.perf_counter()
    index = NearDuplicates(common=1)
    near = [index.add(i, r) for i,r in enumerate(rows)]
    assert all(near[1:]) and max(map(len, near))<=8 and len(index._ids)<=10
    assert time.perf_counter()-t<10

def test_copies_of_one_text_name_the_first_and_take_no_room():
    index, t = NearDuplicates(), wordy(1)[0]
    assert [index.add(i, t.upper() if i%2 else t) for i in range(500)]==[[]]+[[(0, 1.)]]*499
    assert index._ids==[0]

def test_a_book_among_the_rows_is_compared_by_a_part_of_its_shingles():
    book = ' '.join(wordy(400, size=25))
    index = NearDuplicates()
    index.add('book', book)
    assert len(index._hashes)==longest
    assert index.query(book.replace('w1', 'w2', 30))[0][0]=='book'
    assert index.query(' '.join(wordy(400, seed=9)))==[]

def test_an_index_grows_by_a_fixed_amount_per_row():
    index = NearDuplicates()
    for i,t in enumerate(wordy(500)): index.add(i, t)
    assert len(index._hashes)<=500*23 and len(index._starts)==501

def test_leaks_name_the_held_row_and_the_row_it_stands_in(questions):
    rng = random.Random(0)
    train, other = list(enumerate(questions[:300])), questions[300:]
    leaked = [(f'v{i}', bench.EDITS['case'](q, rng)+' Thanks') for i,q in train[:20]]
    got = list(find_leaks([*((f'h{i}', q) for i,q in enumerate(other)), *leaked], iter(train)))
    assert [(a, b) for a,b,_ in got]==[(f'v{i}', i) for i in range(20)]
    assert all(.6<=s<=1 for _,_,s in got)

def test_every_copy_of_a_leaked_question_is_reported():
    q = wordy(1)[0]
    assert [a for a,_,_ in find_leaks([(1, q), (2, q), (3, q+' please')], [('t', q)])]==[1, 2, 3]

def test_training_rows_are_found_by_a_file_of_evaluation_prompts(questions):
    prompts = [(f'prompt {i}', q.lower()) for i,q in enumerate(questions[10:15])]
    assert [a for a,_,_ in find_leaks(enumerate(questions), prompts)]==[10, 11, 12, 13, 14]

def test_an_index_that_stands_already_serves_for_leaks():
    index = NearDuplicates()
    index.add('row 7', q := wordy(1)[0])
    assert list(find_leaks([('held', q)], index))==[('held', 'row 7', 1.)]

def test_chains_of_pairs_become_one_group(): assert join_pairs([(5, 6), (0, 1), (1, 4), (4, 2)])==[[0, 1, 2, 4], [5, 6]]

def test_half_a_surrogate_pair_does_not_stop_the_search(): assert near_groups(['\ud800 '+'a b c d e f g h i j k', 'x'])==[]
