"Secrets and private data in rows: found in many spellings, not seen where there are none, masked, dropped or a reason to stop"
import json, os, random, string, time
from pathlib import Path
import pytest
from ftnb.base import UserError
from ftnb.privacy import find, find_secret, mask, mask_record, place, policy, scan_record, texts

ROOT = Path(__file__).parents[1]
_rng = random.Random(7)
b62, hexa, low36 = string.ascii_letters+string.digits, '0123456789abcdef', string.ascii_lowercase+string.digits
def body(n, chars=b62): return ''.join(_rng.choice(chars) for _ in range(n-2)) + 'a7' # every secret here is made up while the test runs

def jwt(): return '.'.join(['ey'+'J'+body(30), 'ey'+'J'+body(60), body(43)])
def key_block(kind=''): return f'-----BEGIN {kind}PRIVATE'+' KEY-----\n' + '\n'.join(body(64) for _ in range(6)) + f'\n-----END {kind}PRIVATE'+' KEY-----'

# (kind, value, sentence with {} for it)
SECRETS = [
    ('aws_key', 'AKI'+'A'+'Q3EGRIFIC7ZLW2JX', 'Set the access id to {} and try again.'),
    ('aws_key', 'ASI'+'A'+'Y34FZKBOKMUTVV7A', 'temporary: {}'),
    ('aws_key', body(40), 'aws_secret_key = "{}"'),
    ('github_token', 'gh'+'p_'+body(36), 'git clone with {} as the password'),
    ('github_token', 'gh'+'s_'+body(36), 'TOKEN={}'),
    ('github_token', 'github'+'_pat_'+body(22)+'_'+body(59), 'My new token is {}.'),
    ('gitlab_token', 'glp'+'at-'+body(20), 'curl --header "X: {}"'),
    ('hugging_face_token', 'h'+'f_'+body(34), 'login(token="{}")'),
    ('api_key', 's'+'k-proj-'+body(60), 'openai.api = "{}"'),
    ('api_key', 's'+'k-'+body(48), 'I pasted {} into the chat'),
    ('api_key', 's'+'k-ant-api03-'+body(80), 'export KEY={}'),
    ('api_key', 's'+'k-or-v1-'+body(64, hexa), 'router: {}'),
    ('api_key', 'gs'+'k_'+body(52), 'Groq gave me {}'),
    ('api_key', 'nvap'+'i-'+body(64), 'use {} for the endpoint'),
    ('api_key', 'r'+'8_'+body(37), 'replicate {}'),
    ('api_key', 'do'+'p_v1_'+body(64, hexa), 'droplet token {}'),
    ('api_key', 'shp'+'at_'+body(32, hexa), 'the shop uses {}'),
    ('google_key', 'AI'+'za'+body(35), 'maps?key={}&v=3'),
    ('slack_token', 'xo'+'xb-'+'123456789012-123456789012-'+body(24), 'bot = "{}"'),
    ('stripe_key', 's'+'k_live_'+body(24), 'stripe.api = {}'),
    ('stripe_key', 'r'+'k_test_'+body(24), 'restricted {}'),
    ('twilio_key', 'A'+'C'+body(32, hexa), 'account {} sends the text messages'),
    ('sendgrid_key', 'S'+'G.'+body(22)+'.'+body(43), 'mail with {}'),
    ('mailchimp_key', body(32, hexa)+'-'+'us12', 'list: {}'),
    ('telegram_token', '812345678'+':'+body(35), 'bot {} is online'),
    ('npm_token', 'np'+'m_'+body(36), '//registry: _authToken={}'),
    ('pypi_token', 'py'+'pi-'+'AgEIcHlwaS5vcmc'+body(80), 'twine -p {}'),
    ('json_web_token', jwt(), 'Cookie: session={}; path=/'),
    ('access_token', body(40), 'Authorization: Bearer {}'),
    ('private_key', key_block('RSA '), 'The key:\n{}\nKeep it.'),
    ('private_key', key_block(), '{}'),
    ('private_key', key_block('OPENSSH '), 'id_ed25519\n{}\n'),
    ('password', 'hunter'+'2', 'password={}'),
    ('password', 'Tr0ub4'+'dor&3', 'The password is {}, do not tell.'),
    ('password', 'sword'+'fish', "db_password = '{}'"),
    ('password', 'q7!kkL'+'9', '{{"user": "ann", "password": "{}"}}'),
    ('password', 'Blue42'+'Sky!x', 'The password for the guest wifi is {}'),
    ('password', 'k4tz3'+'npf0te', 'Passwort: {}'),
    ('password', '19472'+'2', 'Login ann, pwd: {}'),
    ('access_token', body(32), 'auth_token: "{}"'),
    ('api_key', body(32, hexa), 'API key: {}'),
    ('api_key', body(32), 'WEATHER_API_KEY={}'),
    ('url_password', 'p4ss'+'w0rt', 'postgres://app:{}@db.internal:5432/shop'),
]
PRIVATE = [
    ('email', 'jane.doe'+'@clinic.org', 'Write to {}.'), ('email', 'o.brien+news'+'@mail.example.co.uk', '<{}> wrote:'), ('email', 'j\u00fcrgen'+'@b\u00fccher.de', 'Mail an {}!'),
    ('email', 'JANE_99'+'@EXAMPLE.COM', 'mailto:{}'), ('email', 'x@y.io', 'contact({})'),
    ('phone', '+1 212 555 '+'0187', 'Call {} today.'), ('phone', '+1 (212) 555-'+'0187', 'my number: {}'), ('phone', '(415) 555-'+'2671', 'Reach me at {} after six'),
    ('phone', '415-555-'+'2671', 'Phone 2: {}'), ('phone', '415.555.'+'2671', '{} is the front desk'), ('phone', '1-800-822-'+'7967', 'toll-free {}'),
    ('phone', '4155552'+'671', 'cell: {}'), ('phone', '+44 20 7946 '+'0958', 'London office {}'), ('phone', '020 7946 '+'0958', 'Tel: {}'), ('phone', '+49 30 90'+'1820', 'Berlin {}'),
    ('phone', '030 90'+'1820', 'Telefon: {}'), ('phone', '+33 1 42 68 '+'53 00', 'Paris ({})'), ('phone', '06 12 34 '+'56 78', 'mobile: {}'), ('phone', '+91 98765 '+'43210', 'WhatsApp {}'),
    ('phone', '+81-3-1234-'+'5678', 'Tokyo {}'), ('phone', '+61 2 9374 '+'4000', 'Sydney: {}'), ('phone', '+552123456'+'789', 'Rio {}'), ('phone', '0044 20 7946 '+'0958', 'from abroad {}'),
    ('phone', '555-01'+'42', 'call {} and ask for Bob'), ('phone', '415-555-2671 ext. '+'12', 'office {}'),
    ('card', '4111 1111 1111 '+'1111', 'Pay with {} please'), ('card', '4111-1111-1111-'+'1111', 'card {}'), ('card', '55555555555'+'54444', 'charged {}'), ('card', '3782 822463 '+'10005', 'Amex {}, exp 04/29'),
    ('card', '6011 0009 9013 '+'9424', 'no. {}'), ('card', '30569309025'+'904', 'Diners {}'),
    ('iban', 'DE89 3704 0044 0532 '+'0130 00', 'Please send it to {} by Friday.'), ('iban', 'GB29NWBK6016'+'1331926819', 'IBAN: {}'), ('iban', 'FR14 2004 1010 0505 0001 '+'3M02 606', '{} (BNP)'),
    ('iban', 'nl91 abna 0417 1643 '+'00', 'konto {}'), ('iban', 'CH93-0076-2011-6238-'+'5295-7', 'to {}'),
    ('ssn', '078-05-'+'1120', 'His SSN is {}.'), ('ssn', '457-55-'+'5462', 'applicant {} born 1970'), ('ssn', '4575554'+'62', 'SSN: {}'), ('ssn', '457 55 '+'5462', 'social security number is {}'),
    ('ip_address', '203.0.113.'+'42', 'The request came from {}.'), ('ip_address', '81.2.69.'+'160', 'banned {} yesterday'), ('ip_address', '81.2.69.'+'160', 'http://{}:8080/x'),
    ('ip_address', '2001:db8:85a3::8a2e:370:'+'7334', 'from {} port 22'), ('ip_address', '2a00:1450:4001:81b:0:0:0:'+'200e', 'resolved to {}'), ('ip_address', '2001:db8::'+'1', 'ping {}'),
]
NEAR = '''Your order number is 4155551234 and ships on 2019-05-03.
Order 4111111111111112 was cancelled.
The ISBN is 978-0-306-40615-7.
ISBN 9780306406157, second edition.
1234-5678 = -4444
48/2 = <<48/2=24>>24 clips, then 48+24 = <<48+24=72>>72 clips.
He pays 450,000-2000=$<<450000-2000=448000>>448,000 in all.
Upgrade to version 1.2.3.4 first.
Chrome/120.0.6099.130 on Windows
Firmware 10.4.12.1 fixes it.
See section 3.2.1.14 of the report.
Release v4.18.240.1 is out.
commit 9fceb02d0ae598e95dc970b74767f19372d61af8
md5 d41d8cd98f00b204e9800998ecf8427e
sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
id 550e8400-e29b-41d4-a716-446655440000
Your password is required to sign in.
Choose a password: at least 8 characters.
The password must contain 12-16 letters.
password: 8-character minimum
I forgot my password. It was reset.
A secret is something you keep: never tell.
The secret to a good soup: 3 onions.
password = os.environ["DB_PASSWORD"]
password = getpass.getpass()
self.password = user.password_hash
password="<PASSWORD>"
api_key = "YOUR_API_KEY_HERE_PLEASE"
api_key: ${API_KEY_FROM_VAULT_1}
token = tokenizer.encode(text)[0]
max_tokens: 4096, tokens = 128000
The key: 12 / 4 = 3.
The token is a word piece such as "ing".
The train leaves at 12:30:45 and arrives at 14:05:00.
It takes 10-15 minutes, or 20-25.
Open 9:00-17:00, Mon-Fri.
From 1995-2005 and 2009-2010.
Dates: 12/05/2019, 2020.01.15, 03-04-2021
The area is 1200 x 3400 x 5600 mm.
Pi is 3.14159265358979323846.
0.4111111111111111 of the total
Numbers: 100 200 3000 and 250 300 4000
1, 2, 3, 4, 5, 6, 7, 8, 9, 10
1 2 3 4 5 6 7 8 9 10 11 12
A population of 1 400 000 000 people.
$415-555-2671 is no price.
Call 911 in an emergency.
Part no. 123-45-678 fits.
Bethesda, MD 20892-3655
EAN 4006381333931, SKU 00012345678905
Tracking 1Z999AA10123456784
VIN 1HGCM82633A004352
server at 127.0.0.1:8000, router 192.168.0.1, 10.0.0.7
use 8.8.8.8 as the name server
::1 and fe80::1 are local
std::vector<int> a::b::c
The MAC is 00:1B:44:11:3A:B7.
@app.route and @media, 3 @ 4 each
logo@2x.png and icon@3x.jpg
git clone git@github.com:owner/name.git
Follow @jane_doe for more.
The css class sk-fading-circle-animation-delay-long
a sk-learn pipeline; task-2-of-3-in-the-long-list-of-tasks
hf_model_name_or_path_of_the_run
-----BEGIN PUBLIC KEY----- is not secret
A file that begins with the words PRIVATE KEY.
GB00 is not an account, nor DE12 3456.
AB12 3456 7890 1234 5678
The unix time 1700000000000 in ms, 1700000000 in s
doi:10.1000/182.345.678, arXiv:2305.14314
gene 22q11.2, chromosome 4p16.3, OMIM 300624
serum ferritin (850-4000 ng/mL), 1000-3000 mol/L
2000 Nov;45(6):3-12. PMID 11132098
The ratio was 16:9:4:1 in 2001:2002.
type="password" name="password" placeholder="Password"
"password": "string", "secret": "required"
basic authorization: see the manual
eyJust kidding.
postgres://localhost:5432/shop and http://host:8080/a@b
PINs have 4 digits: 0000 to 9999
lat 52.520008, lon 13.404954
IPv4 has 4 octets such as 255.255.255.255
phone the office before 10 30 and 11 45
MBart50TokenizerFast = MBart50Tokenizer
per_token_cast_to_fp8=per_token_cast_to_fp8, pad_token_id = config.t2u_pad_token_id
# First pass: decided_mask==0, every element
Decimal('+35236450.6'), z +6073641856.9
remote: 'git@github.com', '/user/project' is a remote
https://ann@files.example.org/a is a user of a host'''.splitlines()

def planted():
    for kind,value,sentence in SECRETS+PRIVATE:
        if '{{' in sentence: yield kind, value, sentence.format(value)
        else: yield kind, value, sentence.replace('{}', value)

def test_the_sets_are_large_enough_to_mean_something(): assert len(SECRETS)+len(PRIVATE)>=85 and len(NEAR)>=75 and len({k for k,*_ in SECRETS})>=18

@pytest.mark.parametrize('kind, value, text', [pytest.param(*o, id=f'{i}-{o[0]}') for i,o in enumerate(planted())])
def test_a_planted_value_is_found_whole_with_its_kind(kind, value, text):
    at = text.index(value)
    assert [(f.kind, f.start, f.end) for f in find(text)]==[(kind, at, at+len(value))]

@pytest.mark.parametrize('text', NEAR)
def test_what_only_looks_like_one_is_left_alone(text): assert find(text)==[]

def test_the_fast_way_finds_what_the_slow_way_finds():
    for *_,text in planted():
        for t in (text, f'\u201cSo\u201d, {text}', f'{text}\n{text}', text.replace(' ', '\u00a0')): assert find(t)==find(t, fast=False)
    for t in NEAR: assert find(t)==find(t, fast=False)
    for _ in range(60): # planted values between near misses
        t = ' '.join(_rng.sample(NEAR, 3)+[_rng.choice(list(planted()))[2]]+_rng.sample(NEAR, 2))
        assert find(t)==find(t, fast=False)

@pytest.mark.parametrize('gate', ['credentials._may', 'private._marks'])
def test_a_gate_that_loses_findings_is_noticed(gate, monkeypatch):
    monkeypatch.setattr(f'ftnb.{gate}', lambda text: {} if 'may' in gate else dict(digits=False, iban=False, at=False, ip=False))
    assert sum(find(t)!=find(t, fast=False) for *_,t in planted())>20

@pytest.mark.parametrize('name', ['gsm8k_train_messages', 'medquad_alpaca'])
def test_the_fast_way_loses_nothing_on_real_rows(name):
    path = next((p for p in [Path(os.environ.get('FTNB_REAL_DATA') or 'none')/f'{name}.jsonl'] if p.exists()), None)
    if path is None: pytest.skip('the real data is not here')
    rows = _rng.sample(path.read_text().strip().split(chr(10)), 1000)
    for _,t in (o for r in rows for o in texts(json.loads(r))): assert find(t)==find(t, fast=False)

def test_masked_text_is_readable_and_clean():
    text = '\n'.join(t for *_,t in planted())
    out = mask(text, find(text))
    assert not [v for _,v,_ in planted() if len(v)>9 and v in out]
    assert find(out)==[]
    t = f'Ann, {PRIVATE[0][1]} or {PRIVATE[5][1]}, uses {SECRETS[0][1]}.'
    assert mask(t, find(t))=='Ann, <EMAIL> or <PHONE>, uses <AWS_KEY>.'

def test_no_finding_ever_shows_the_value():
    for kind,value,text in planted():
        rec = dict(text=text)
        said = repr(find(text))+repr(scan_record(rec))+str(find_secret(rec))+str(policy(rec, 'drop', 'drop')[1:])
        with pytest.raises(UserError) as e: policy(rec, 'stop', 'stop', where='a.jsonl, line 3')
        assert value not in said+str(e.value) and str(e.value).startswith('a.jsonl, line 3: a')

GH, MAIL = SECRETS[3][1], PRIVATE[0][1]
def chat(q='hi', a='hello', **k): return dict(messages=[dict(role='user', content=q), dict(role='assistant', content=a, **k)])
def call(args): return [dict(id='1', type='function', function=dict(name='send', arguments=args))]
@pytest.mark.parametrize('rec, where', [
    (dict(text=f'x {GH}'), 'the text'), (chat(q=GH), 'the question'), (chat(a=GH), 'the answer'),
    (dict(messages=[dict(role='system', content=GH), *chat()['messages']]), 'the system message'),
    (dict(messages=[dict(role='tool', name='f', content=GH), *chat()['messages']]), 'the tool message'),
    (chat(tool_calls=call(json.dumps(dict(to=GH)))), 'a tool call'), (chat(tool_calls=call(dict(to=dict(deep=[GH])))), 'a tool call'),
    (chat(reasoning_content=GH), 'the answer'), (dict(prompt=GH, completion='x'), 'the question'), (dict(prompt='x', completion=GH), 'the answer'),
    (dict(prompt='x', chosen=GH, rejected='y'), 'the chosen answer'), (dict(prompt='x', chosen='y', rejected=GH), 'the rejected answer'),
    (dict(chosen=chat()['messages'], rejected=chat(a=GH)['messages']), 'the rejected answer'),
    (dict(prompt=[dict(role='user', content=GH)], chosen=[dict(role='assistant', content='a')], rejected=[]), 'the question'),
    (dict(tools=[dict(type='function', function=dict(description=GH))], **chat()), 'the tools')])
def test_a_key_is_found_and_masked_in_every_part_of_a_record(rec, where):
    before = json.dumps(rec)
    (path, f), = scan_record(rec)
    assert place(rec, path)==where and find_secret(rec)==f'a GitHub token in {where}'
    assert policy(rec)[1]==f'a GitHub token in {where}'
    out, why, n = policy(rec, secrets='mask')
    assert why is None and n==dict(github_token=1) and json.dumps(rec)==before
    assert json.dumps(out)==before.replace(GH, '<GITHUB_TOKEN>')

def test_the_name_of_an_argument_tells_what_its_value_is():
    rec = chat(tool_calls=call(dict(password='sword'+'fish', phone='020 7946 '+'0958', card=int('4111'*1+'1'*12), count=12, note='fine')))
    assert [f.kind for _,f in scan_record(rec)]==['password', 'phone', 'card']
    assert mask_record(rec, scan_record(rec))['messages'][1]['tool_calls'][0]['function']['arguments']==dict(password='<PASSWORD>', phone='<PHONE>', card='<CARD>', count=12, note='fine')

def test_json_arguments_stay_json_when_masked():
    args = json.dumps(dict(user=MAIL, password='k4tz3'+'npf0te', n=3))
    rec = chat(tool_calls=call(args))
    out = mask_record(rec, scan_record(rec))
    assert json.loads(out['messages'][1]['tool_calls'][0]['function']['arguments'])==dict(user='<EMAIL>', password='<PASSWORD>', n=3)

def test_each_choice_does_what_it_says():
    rec = chat(q=f'I am {MAIL}', a=f'use {GH}')
    assert policy(rec)==(rec, 'a GitHub token in the answer', dict(email=1, github_token=1))
    out, why, _ = policy(rec, 'mask', 'report')
    assert why is None and out['messages'][0]==rec['messages'][0] and out['messages'][1]['content']=='use <GITHUB_TOKEN>'
    assert policy(rec, 'mask', 'mask')[0]==chat(q='I am <EMAIL>', a='use <GITHUB_TOKEN>')
    assert policy(rec, 'mask', 'drop')[1]=='an e-mail address in the question'
    with pytest.raises(UserError, match='^d.jsonl, line 9: an e-mail address in the question; take it out, or set private_data: mask or drop.$'): policy(rec, 'drop', 'stop', where='d.jsonl, line 9')
    with pytest.raises(UserError, match="private_data: 'reprot' is not known.*Did you mean 'report'"): policy(rec, 'drop', 'reprot')
    clean = chat()
    assert policy(clean, 'stop', 'stop')==(clean, None, {}) and policy(clean)[0] is clean

@pytest.mark.parametrize('piece', ['a', '1', '-', '=', '1-', '1 ', 'a@', '@', 'a.', '1.', ':', '2001:', 'password', 'password is ', '://a:', 'sk-', 'ey'+'J', 'A1', 'DE89 ', '"', '\u00e9', '\u0661', '(', '+1 ', 'x@x.',
    '-----BEGIN '+'PRIVATE KEY-----', 'aws key ', 'bearer ', '555-1234 ', '+1 301 435 3848 ', 'a@b.org ', 'call 555-1234 ', 'password=a1b2c3d4 '])
def test_a_huge_row_of_one_sign_takes_seconds_not_hours(piece):
    t = time.process_time()
    t0 = piece*(200_000//len(piece))
    mask(t0, find(t0))
    assert time.process_time()-t<8

def test_odd_text_is_no_trouble():
    for t in ('', ' ', '\ud800 password: x', '\x00'*50, '\u202e@', '\u0661'*20, '1'*5000, '+'*100, '\ufeff'+MAIL, '1.2.3.\u0661', '\u0661.2.3.4 from 81.2.69.\u0661\u0660', '4111 1111 1111 111\u0661', '2001:db8::\u0661'): find(t), find(t, fast=False)

def test_the_policies_of_a_recipe_reach_the_rows(tmp_path, tiny):
    from conftest import short_rows, write_rows
    from ftnb.prepare import prepare
    from ftnb.recipe import make_recipe
    from ftnb.runs import Run
    mail, key = 'jo'+'@acme.io', 'ghp'+'_'+body(36)
    data = write_rows(tmp_path/'a.jsonl', [*short_rows(60), dict(prompt=f'I am {mail} and wait', completion='yes'), dict(prompt='Which key?', completion=key)])
    def go(**kw):
        run = Run(tmp_path/'run', make_recipe(dict(dataset=data, model_name_or_path=tiny, **kw)))
        return prepare(run).report, ''.join(p.read_text() for p in run.path('data').glob('*.jsonl'))+''.join(p.read_text() for p in run.path('reports').glob('*.*'))
    rep, text = go()
    gates = {g['gate']: g for g in rep['gates']}
    assert gates['no_secrets']['verdict']=='fixed' and gates['no_private_data']['verdict']=='warn' and 'email 1' in gates['no_private_data']['text']
    assert key not in text and mail in text
    rep, text = go(secrets='mask', private_data='mask')
    assert key not in text and mail not in text and '<GITHUB_TOKEN>' in text and '<EMAIL>' in text and rep['aside']==0
    rep, text = go(private_data='drop')
    assert mail not in text and [a['reason'] for a in rep['set_aside']]==['an e-mail address in the question', 'a GitHub token in the answer']
    with pytest.raises(UserError, match='a.jsonl, line 61: an e-mail address in the question; take it out'): go(private_data='stop')

def test_a_secret_in_a_row_set_aside_for_another_fault_is_not_kept(tmp_path, tiny):
    from conftest import short_rows, write_rows
    from ftnb.prepare import prepare
    from ftnb.recipe import make_recipe
    from ftnb.runs import Run
    key = 'ghp'+'_'+body(36)
    data = write_rows(tmp_path/'a.jsonl', [*short_rows(60), dict(prompt=f'My key is {key}', completion=''), dict(prompt='A question', completion='')])
    run = Run(tmp_path/'run', make_recipe(dict(dataset=data, model_name_or_path=tiny)))
    assert prepare(run).report['aside']==2
    text = run.path('data', 'set_aside.jsonl').read_text()
    assert key not in text and 'A question' in text
