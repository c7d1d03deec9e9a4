"The quality report: each number by hand on a small set, each fault seen, text of the data never executed, memory bounded"
import html, json, random, re
import pytest
from ftnb.describe import Describe, QualityReport, clusters, distinct
from ftnb.language import find_language, language_shares
from ftnb.measures import Balance, Capped, Conflicts, NearRows, Sample, answer_form, length_report, sides
from ftnb.records import normalise, shape_of

def rec(q, a, system=None): return dict(messages=[*([dict(role='system', content=system)] if system else []), dict(role='user', content=q), dict(role='assistant', content=a)])
def wordy(n, seed=0, size=25):
    rng = random.Random(seed)
    return [' '.join(f'w{rng.randrange(3000)}' for _ in range(size)) for _ in range(n)]

def described(pairs, epochs=1, tokens=100, trained=10, **kw):
    d = Describe(epochs, **kw)
    for q,a in pairs: d.add(rec(q, a), 'train', tokens, trained)
    return d.report()

def warnings(r, verdict='warn'): return {o['check'] for o in r['notes'] if o['verdict']==verdict}
def good(n=200): return [(q+'?', a+'.') for q,a in zip(wordy(n), wordy(n, 1))]

def test_a_set_without_faults_gets_no_warning():
    assert not warnings(described(good()))

def test_the_demo_is_described_right(demo_rows):
    d = Describe(3)
    for s,rows in demo_rows.items():
        for r in rows: d.add(normalise(r, shape_of(r)), s, 200, 30)
    r = d.report()
    assert r['splits']=={s: len(rows) for s,rows in demo_rows.items()} and r['tokens']['n']==len(demo_rows['train'])
    answers = [json.loads(o['messages'][-1]['content']) for o in demo_rows['train']]
    classes = {c['field']: c for c in r['classes']}
    assert set(classes)==set(answers[0])
    share = lambda k,v: round(sum(a[k]==v for a in answers)/len(answers), 4)
    assert classes['severity']['shares']=={v: share('severity', v) for v in ('medium', 'low', 'high')}
    assert r['format']['forms']=={'JSON': 1.} and r['near']['extra_rows']==0 and r['language']['shares']['en']>.95

def test_the_report_is_json_and_shows_the_same_after_a_round_trip():
    r = described(good(50))
    back = json.loads(json.dumps(r))
    assert repr(QualityReport(back))==repr(QualityReport(r)) and QualityReport(back)._repr_html_()==QualityReport(r)._repr_html_()
    assert len(QualityReport(back).plot().axes)==4

@pytest.mark.parametrize('n, epochs, seen', [(50, 1, {'rows'}), (500, 10, {'epochs'}), (500, 3, set()), (1200, 10, set())])
def test_few_rows_with_many_epochs_are_warned_about(n, epochs, seen): assert warnings(described(good(n), epochs))==seen

def test_near_duplicates_are_counted_and_an_example_shown():
    ps = good()
    r = described([*ps, *((q+' please', a) for q,a in ps[:10])])
    assert warnings(r)=={'near'} and r['near']['groups']==10 and r['near']['extra_rows']==10 and r['near']['examples'][0]['rows']==[1, 201]

def test_one_question_with_two_answers_is_a_conflict_unless_the_system_message_differs():
    ps = good()
    assert 'conflicts' in warnings(described([*ps, *((q, 'Something else.') for q,_ in ps[:5])]))
    c = Conflicts()
    for i,s in enumerate(('Answer in English.', 'Answer in German.')): c.add(i, s, 'What is it?', f'answer {i}')
    assert c.rows==0

def test_a_second_language_is_noted_and_crossed_answers_are_warned_about():
    en = [(f'Where is my parcel with the number {i}, please tell me?', 'It will arrive on Monday before noon, we are sorry.') for i in range(95)]
    de = [(f'Where is my parcel with the number {i}, please tell me?', 'Es kommt am Montag vor dem Mittag an, es tut uns leid.') for i in range(95, 100)]
    r = described(en+de)
    assert r['language']['shares']=={'en': .95, 'de': .05} and r['language']['crossed']==5
    assert 'language' in warnings(r) and 'language' in warnings(r, 'note')

@pytest.mark.parametrize('text, lang', [('¿Dónde está mi paquete? Lo espero desde hace una semana.', 'es'), ('我的包裹在哪里?我已经等了一个星期了', 'zh'), ('Где моя посылка? Я жду её уже целую неделю.', 'ru'),
    ('Où est mon colis ? Je l’attends depuis une semaine.', 'fr'), ('ok', ''), ('```python\nprint("hello to all of you")\n```', ''), ('\ud800'*30, '')])
def test_languages_are_told_and_what_is_too_short_is_left_out(text, lang): assert find_language(text)==lang

def test_a_row_that_is_all_json_takes_the_language_of_its_question():
    assert language_shares([('Wo ist mein Paket geblieben, das ich bestellt habe?', '{"a": 1}')])['shares']=={'de': 1.}

def test_one_broken_json_answer_is_seen():
    ps = [(q, json.dumps(dict(a=i, b=a))) for i,(q,a) in enumerate(good())]
    assert not warnings(described(ps))
    assert warnings(described([*ps, (wordy(1, 5)[0], '{"a": 1, "b":')]))=={'format'}

def test_other_keys_in_some_json_answers_are_seen():
    ps = good()
    assert 'format' in warnings(described([(q, json.dumps(dict(a=a) if i%10 else dict(c=a))) for i,(q,a) in enumerate(ps)]))

@pytest.mark.parametrize('text, form', [(' {"a": 1}', 'JSON'), ('[1, 2]', 'JSON'), ('[see below] yes', 'prose'), ('{a}', 'broken JSON'), ('```sql\nselect', 'code block'), ('<b>x</b>', 'tag'), ('## Title', 'heading'),
    ('1. one', 'list'), ('- one', 'list'), ('-5', 'prose'), ('', 'prose'), ('['*100_000, 'prose')])
def test_the_form_of_an_answer(text, form): assert answer_form(text)[0]==form

def test_an_unbalanced_class_is_named_with_its_share():
    r = described([(q, 'no' if i%10 else 'yes') for i,(q,_) in enumerate(good())])
    assert 'classes' in warnings(r) and r['classes'][0]['majority']==.9 and r['classes'][0]['shares']=={'no': .9, 'yes': .1}

def test_answers_that_all_differ_are_no_classes():
    assert described(good(40))['classes']==[] and described(good(300))['classes']==[]

def test_lengths_are_exact():
    lens = [random.Random(0).randrange(1, 3000) for _ in range(1)]+list(range(1, 1001))
    r = length_report(lens)
    assert r['percentiles'][50]==sorted(lens)[500] and r['percentiles'][100]==max(lens)
    assert all(abs(v-sum(n<=k for n in lens)/len(lens))<1e-4 for k,v in r['kept'].items()) and list(r['kept'].values())[-1]==1
    assert sum(r['histogram']['counts'])==len(lens)

@pytest.mark.parametrize('lens', [[0], [1], [5]*100, [1]*99+[10**6]])
def test_odd_lengths_are_described_too(lens):
    r = length_report(lens)
    assert sum(r['histogram']['counts'])==len(lens) and r['percentiles'][100]==max(lens)

def test_repeated_openings_and_templates_are_seen():
    ps = [(f'Please name the capital of the country {w} for me now', f'Of course, here is it: {w}.') for w in wordy(100, size=2)]
    r = described(ps+good(100))
    assert r['openings']['answers'][0]==dict(what='Of course, here is', rows=100, share=.5) and 'variety' in warnings(r, 'note')
    assert r['clusters'][0]['rows']==100

def test_repeated_text_has_few_different_runs_of_words():
    same, other = distinct(['a b c d e f g']*100), distinct(wordy(100))
    assert same[2]<.05<.9<other[2] and distinct([])[1]==0 and clusters([])==[]

def test_nothing_in_the_data_is_executed_when_it_is_shown():
    evil = '<img src=x onerror=alert(1)><script>alert(2)</script>'
    ps = [(f'{evil} {q} & "quotes"', evil) for q,_ in good(30)]
    page = QualityReport(described([*ps, *((q+' please', 'no '+evil) for q,_ in ps), *((q, evil+'x') for q,_ in ps)]))._repr_html_()
    assert '<script' not in page and '<img' not in page and html.escape(evil)[:20] in page
    assert set(re.findall(r'<(\w+)', page))<={'table', 'caption', 'thead', 'tbody', 'tr', 'th', 'td'}

@pytest.mark.parametrize('row', [dict(text='Plain text. '*10), dict(prompt='Hello there', chosen='Hi', rejected='No'), dict(prompt=[dict(role='user', content='Hello')], completion=[dict(role='assistant', content='Hi')], label=True),
    dict(messages=[dict(role='user', content='Call'), dict(role='assistant', content='', tool_calls=[dict(function=dict(name='f', arguments={}))])]), rec('\ud800', '\udfff'), rec('', ''), rec('$a$', '$\\frac$')])
def test_every_shape_of_row_can_be_described(row):
    d = Describe()
    for _ in range(3): d.add(row, 'train', 3, 1)
    q = QualityReport(d.report())
    assert repr(q) and q._repr_html_() and q.plot()

def test_a_report_without_rows_says_so():
    assert warnings(Describe().report())=={'rows'} and repr(QualityReport(Describe().report())) and QualityReport(Describe().report()).plot()

def test_held_out_rows_are_counted_only():
    d = Describe()
    for i,(q,a) in enumerate(good(30)): d.add(rec(q, a), 'train' if i<20 else 'test', 10, 5)
    assert d.report()['splits']==dict(train=20, valid=0, test=10) and d.report()['tokens']['n']==20

def test_sides_of_a_preference_row_are_prompt_and_chosen():
    m = lambda r,t: dict(role=r, content=t)
    assert sides(dict(prompt=[m('system', 's'), m('user', 'q')], chosen=[m('assistant', 'a')], rejected=[m('assistant', 'b')]))==('s', 'q', 'a')
    assert sides(dict(chosen=[m('user', 'q'), m('assistant', 'a')], rejected=[m('user', 'q'), m('assistant', 'b')]))==('', 'q', 'a')

def test_what_is_kept_of_a_long_stream_is_bounded():
    s, c, b = Sample(100), Capped(100), Balance()
    for i in range(20_000): s.add(i); c.add(i); c.add('often'); b.add(f'answer {i}', {f'key {i}': i})
    assert len(s.items)==100 and 8_000<sum(s.items)/100<12_000
    assert len(c.count)<=200 and c.top(1)[0]==dict(what='often', rows=20_000, share=.5)
    assert len(b.counts)<=50 and b.counts['']is None

def test_near_rows_of_a_stream_are_the_same_wherever_the_head_ends():
    ps = [q for q,_ in good(100)]
    rows = [*ps, *(q+' please' for q in ps[:10])]
    got = []
    for head in (5, 50, 1000):
        n = NearRows(head=head)
        for i,t in enumerate(rows): n.add(i, t)
        got.append(n.groups())
    assert got[0]==got[1]==got[2]==[[i, 100+i] for i in range(10)]

def test_the_same_rows_give_the_same_report():
    assert described(good(300), sample=50)==described(good(300), sample=50)
