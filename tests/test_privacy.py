"Private data and secrets: what is planted is found, what only looks like it is not, and no value reaches a message"
import os, string
from pathlib import Path
import pytest
from ftnb.base import UserError
from ftnb.privacy import find, find_secret, iban, luhn, mask, mask_record, policy, scan_record

DATA = Path(os.environ.get('FTNB_REAL_DATA') or 'none') # a folder with gsm8k_train_messages.jsonl and medquad_alpaca.jsonl
def fake(n, letters=string.ascii_letters+string.digits, seed=7):
    "`n` letters that look drawn by chance; built here so that no scanner takes this file for a leak"
    out, x = '', seed
    for _ in range(n):
        x = (x*1103515245+12345)%2**31
        out += letters[(x>>16)%len(letters)]
    return out
hexa, digits, upper = '0123456789abcdef', string.digits, string.ascii_uppercase+string.digits
def with_check(body): return next(body+c for c in digits if luhn(body+c))
def grouped(s, *n):
    out = []
    for k in n: out, s = out+[s[:k]], s[k:]
    return out
def account(cc, bban):
    "An account number with the right checksum"
    return next(a for i in range(2, 99) if iban(a := f'{cc}{i:02}{bban}'))

card4, cardm, carda = with_check('4'+'539148803436'+'46'), with_check('5425233430109'+'90'), with_check('37828224631'+'000')
pem = '-----BEGIN {}PRIVATE'+' KEY-----\n'+fake(64)+'\n'+fake(64)+'\n-----END {}PRIVATE'+' KEY-----'
PLANTED = [ # (kind, value, the words around it)
    ('email', 'ann.lee'+'@acme.io', 'Write to {} today.'), ('email', 'j_o+hn-7'+'@mail.uni-bonn.de', 'cc: <{}>, thanks'), ('email', 'BOB'+'@ACME.CO.UK', 'My address is {}, I think.'),
    ('email', 'x1'+'@sub.domain.travel', '"{}"'), ('email', '2020'+'@nei.nih.gov', 'E-mail: {}\nWebsite: none'),
    ('phone', '+44 20 7946 '+'0958', 'Ring me on {} after six.'), ('phone', '+49 30 '+'901820', 'Berlin: {}.'), ('phone', '+33 1 42 68 53 '+'00', 'Le numéro est le {}, merci.'),
    ('phone', '+49 (0)89 636-'+'48018', 'Tel {} works'), ('phone', '+91 98765 '+'43210', 'whatsapp {}'), ('phone', '+81 3-3224-'+'5000', 'Tokyo is {}'), ('phone', '+14155'+'552671', 'dial {} now'),
    ('phone', '+1 (415) 555-'+'2671', 'Our number: {}, ask for Jo.'), ('phone', '+61 2 9374 '+'4000', 'Sydney office {}; closed on Monday'), ('phone', '+55 11 2395-'+'8400', 'São Paulo {}'),
    ('phone', '+41 44 668 '+'1800', 'CH {}, 12 people work there'),
    ('phone', '(415) 555-'+'2671', 'Call {} for help.'), ('phone', '415-555-'+'2671', 'I live at 12 Elm St, {}.'), ('phone', '415.555.'+'2671', 'fax {}'), ('phone', '1-800-422-'+'6237', 'toll free {} (day and night)'),
    ('phone', '415 555-'+'2671', 'Reach us at {}'), ('phone', '4155'+'552671', 'my cell is {}'), ('phone', '020 7946 '+'0958', 'phone {} in London'), ('phone', '030/90'+'1820', 'Telefon: {} (Berlin)'),
    ('phone', '0049 30 '+'901820', 'call {}'),
    ('card', card4, 'I paid with {} yesterday'), ('card', ' '.join(grouped(card4, 4, 4, 4, 4)), 'Card: {}, 12/27'), ('card', '-'.join(grouped(card4, 4, 4, 4, 4)), 'number {}.'), ('card', cardm, 'MasterCard {}'),
    ('card', ' '.join(grouped(carda, 4, 6, 5)), 'Amex {} cvv 1234'), ('card', with_check('6011'+'00099013942'), 'discover: {}'),
    ('iban', account('DE', '370400440532013000'), 'Pay to {}.'), ('iban', ' '.join(grouped(account('DE', '370400440532013000'), 4, 4, 4, 4, 4, 2)), 'IBAN {}, please'),
    ('iban', ' '.join(grouped(account('GB', 'WEST12345698765432'), 4, 4, 4, 4, 4, 2)), '{} is my account'), ('iban', account('FR', '2004101005'+'0500013M02606'), 'virement vers {} THANK YOU'),
    ('iban', account('NL', 'ABNA0417164300'), 'iban: {}'), ('iban', '-'.join(grouped(account('CH', '00762011623852957'), 4, 4, 4, 4, 4, 1)), 'to {} today'),
    ('ssn', '536-90-'+'4399', 'My SSN is {}.'), ('ssn', '219-09-'+'9990', 'She wrote {} on the form'), ('ssn', '536 90 '+'4399', 'social security number {}'), ('ssn', '53690'+'4399', 'SSN: {}'),
    ('ip', '84.200.69.80', 'He came from {} at night'), ('ip', '8.8.4.4', 'ping {} first'), ('ip', '203.5.113.77', '[{}] GET /'), ('ip', '2001:4860:4860::8888', 'It resolves to {}, said the log'),
    ('ip', '2a00:1450:4001:0830:0000:0000:0000:200e', 'IPv6 {} answered'), ('ip', '9.9.9.9', 'the IP {} is open'),
    ('aws_key', 'AKIA'+fake(16, upper), 'export AWS_ACCESS_KEY_ID={}'), ('aws_secret_key', fake(40), "aws_secret_access_key = '{}'"),
    ('github_token', 'ghp_'+fake(36), 'git clone with {} as password'), ('github_token', 'github_pat_'+fake(22)+'_'+fake(59), 'token {}.'), ('github_token', 'ghs_'+fake(40), '`{}`'),
    ('hf_token', 'hf_'+fake(34), 'login(token="{}")'), ('api_key', 'sk-'+'proj-'+fake(48)+'_'+fake(20), 'OPENAI_API_KEY={}'), ('api_key', 'sk-'+fake(48), 'use {} here'),
    ('api_key', 'sk-'+'ant-api03-'+fake(93), 'key: {}'), ('api_key', 'sk-'+'or-v1-'+fake(64, hexa), 'router {}'), ('google_key', 'AIza'+fake(35), 'maps?key={}&v=3'),
    ('slack_token', 'xox'+'b-'+fake(12, digits)+'-'+fake(13, digits)+'-'+fake(24), 'bot {}'), ('slack_token', 'https://hooks.slack.com/'+'services/T'+fake(8, upper)+'/B'+fake(8, upper)+'/'+fake(24), 'post to {} please'),
    ('stripe_key', 'sk'+'_live_'+fake(24), 'charge with {}'), ('sendgrid_key', 'SG'+'.'+fake(22)+'.'+fake(43), 'mail {} sent'), ('gitlab_token', 'glpat'+'-'+fake(20), 'CI uses {}'),
    ('npm_token', 'npm'+'_'+fake(36), '//registry/:_authToken={}'), ('pypi_token', 'pypi-'+'AgEIcHlwaS5vcmc'+fake(90), 'twine -p {}'), ('twilio_key', 'SK'+fake(32, hexa), 'twilio {}'),
    ('mailchimp_key', fake(32, hexa)+'-us'+'12', 'chimp {}'), ('discord_token', 'MT'+fake(22)+'.'+fake(6)+'.'+fake(27), 'client.run("{}")'), ('telegram_token', fake(10, '123456789')+':AA'+fake(33), 'bot {} started'),
    ('azure_key', 'AccountKey='+fake(86)+'==', 'AccountName=me;{};'), ('vendor_key', 'gsk'+'_'+fake(52), 'groq {}'), ('vendor_key', 'dapi'+fake(32, hexa), 'databricks {}'), ('vendor_key', 'shpat'+'_'+fake(32, hexa), 'shop {}'),
    ('jwt', 'eyJ'+fake(33)+'.eyJ'+fake(40)+'.'+fake(43), 'Cookie: session={};'), ('token', fake(40), 'Authorization: Bearer {}'),
    ('private_key', pem.format('RSA ', 'RSA '), 'Here it is:\n{}\nKeep it.'), ('private_key', pem.format('', ''), '{}'), ('private_key', pem.format('OPENSSH ', 'OPENSSH '), 'ssh\n{}'),
    ('private_key', pem.format('RSA ', 'RSA ').replace('-----\n', '-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,0A1B\n\n', 1), 'k\n{}'),
    ('private_key', pem.format('EC ', 'EC ').replace('\n', '\\n'), '{{"key": "{}"}}'), ('private_key', pem.format('', '').split('\n-----END')[0], 'cut off: {}'),
    ('password', 'aB3'+'dEf9', 'mysql --password={} db'), ('password', fake(16), 'GET /v1?api_key={}&q=1'), ('password', 'Sommer'+'#24', 'Password is: {}'), ('password', 'x9'+'Kq', '"pwd":"{}"'),
    ('phone', '07911 12'+'3456', 'you can reach me on {}'), ('phone', '98765 '+'43210', 'mobile: {}'), ('ip', '84.200.69.80', 'see http://{}/x'), ('password', fake(32, hexa), 'x-api-key: {}'), ('password', fake(20), 'token: {}'),
    ('password', 'abc'+'123!', 'pass: {} ok'), ('card', '.'.join(grouped(card4, 4, 4, 4, 4)), 'it is {}'),
    ('password', 'tr0ub4'+'dor&3', 'password={}'), ('password', 'hunter'+'2x', 'The password is {}.'), ('password', 'S3cr'+'et!9', 'DB_PASSWORD: {}'), ('password', 'qwe'+'99', "pwd = '{}'"), ('password', 'p@ss-'+'Wd1', '{{"password": "{}"}}'),
    ('password', fake(24), 'api_key = "{}"'), ('password', fake(30), 'client_secret: {}'), ('password', 'Winter'+'2024', 'user: jo, passwd: {}, host: db'), ('password', fake(20), "access_token='{}'"),
    ('url_password', 's3cr'+'3tpw', 'postgres://admin:{}@db.acme.io:5432/x'),
]

NEAR = ['order 4155552671 was shipped', 'Order no. 1234-5678-9012', 'ISBN 978-3-16-148410-0', 'ISBN 9783161484100 in print', 'on 2024-11-25 at 12:30:45', '25.11.2024', '11/25/2024 10:15:30.123',
    '1234-5678 = -4444', '48/2 = <<48/2=24>>24 clips', '100 + 200 + 3000 = <<100+200+3000=3300>>3300', '300 400 5000', '555-1234 is a difference', '2000000 - 1500000 = 500000', '$1,234,567.89',
    'version 1.2.3.4', 'v10.200.3.4', 'upgrade to 5.15.0.139', 'release 120.0.6099.109', 'section 4.12.3.25', 'localhost is 127.0.0.1', 'router at 192.168.1.1', '10.0.0.1 and 172.16.254.1', 'mask 255.255.255.0', 'bind 0.0.0.0',
    'fe80::1 and ::1', 'std::vector and Foo::Bar', 'at 10:20:30:40', 'MAC 00:1B:44:11:3A:B7', fake(40, hexa), 'sha256 '+fake(64, hexa), 'md5 '+fake(32, hexa), 'commit '+fake(7, hexa), 'id 550e8400-e29b-41d4-a716-446655440000',
    'Choose a password that is long.', 'The password must have 8 characters', 'Password: required', 'Your secret is safe with me', 'The secret: work hard', 'password = getpass()', 'password = os.environ["DB_PW1"]', 'pwd = self.config.pw1', 'api_key = "YOUR_API_KEY"',
    'api_key=<your key 1>', 'password: ********', 'token = 5', 'The secret is 12 eggs', 'secret number = 42', 'key: 3', 'sk-learn and sk-hynix are names', 'sk-this-is-only-a-slug-made-of-words', 'hf_hub_download(repo_id)', 'ghp_short', 'AKIA'+'IOSFODNN7EXAMPLE',
    'npm_config_registry', '4111 1111 1111 1112', '1234567812345678', '12345678901234567890', 'pi is 3.14159265358979323846', 'GB82 is half an account', 'DE00 1234 5678 9012 3456 78', 'part AB12 3456 7890',
    'tracking 1Z999AA10123456784', '900-12-3456', '000-12-3456', '123-00-4567', 'pages 100-150-2000', 'he ran 100-400-2000 m', 'scores 21-15-2024', '@home and me@work', 'icon@2x.png', 'git@github.com:me/x.git', 'a @ b . c', 'pkg@1.2.3', 'user@localhost',
    'call 12345', 'I call 3 of 4 friends 200 times', 'text 1000 people in 2 days', 'phone costs 1200 dollars, 24 months', '2020 2021 2022 2023 2024', '1 2 3 4 5 6 7 8 9 10', '5551234567890123 * 2', '12 x 3456789012', 'https://acme.io/1234567890?x=9876543210',
    'https://acme.io:8080/path', 'ratio 16:9:4', 'begin private key exchange', 'bearer of bad news', 'lat 52.520008, lon 13.404954', 'DOI 10.1000/182.4567.8901', '+5 degrees and +1234', 'x+1234567', 'a = 5 +4155552671', 'p**3 +15625000000*q**2', 'x[2::3] + x[3::17]', 'dtype 2::', 'multicast 224.0.0.251', 'password = password1', 'mongodb://{user}:{password}@{host}', 'https://user:'+'password@host.de', 'y = X@self.weights', 'Mobile sales grew from 2012345678 to 3012345678', 'the text has 2024561111 letters', 'access_token: string2', "api_key = 'test123'", 'let token = tokens[i+1];', 'A@np.linalg.inv(B)', 'room 415-555', 'ICD-10: 250.00-250.93']

@pytest.mark.parametrize('kind, value, around', PLANTED, ids=[f'{k}-{i}' for i,(k,_,_) in enumerate(PLANTED)])
def test_a_planted_value_is_found_whole(kind, value, around):
    t = around.format(value)
    a = t.index(value)
    fs = find(t)
    assert any(f.start<=a and a+len(value)<=f.end and f.kind==kind for f in fs), [f.kind for f in fs]
    assert value not in mask(t, fs)
    assert len(mask(t, fs))<=len(t)-len(value)+60

@pytest.mark.parametrize('text', NEAR, ids=range(len(NEAR)))
def test_what_only_looks_like_it_is_left_alone(text):
    assert not [(f.kind, text[f.start:f.end]) for f in find(text)+find(f'She said: {text}, and went on.')]

def test_there_are_enough_of_both():
    assert len(PLANTED)>=60 and len(NEAR)>=60 and len({k for k,_,_ in PLANTED})>=24

@pytest.mark.parametrize('style, around', [('INTERNATIONAL', 'My number is {}, write soon.'), ('E164', 'Reach me: {}.')])
def test_the_numbers_of_nearly_every_country_are_found_with_a_plus(style, around):
    import phonenumbers as P
    ns = [n for r in P.SUPPORTED_REGIONS for k in (P.PhoneNumberType.MOBILE, P.PhoneNumberType.FIXED_LINE) if (n := P.example_number_for_type(r, k))]
    said = [P.format_number(n, getattr(P.PhoneNumberFormat, style)) for n in ns]
    got = [any(f.kind=='phone' and f.end-f.start==len(s) for f in find(around.format(s))) for s in said]
    assert len(ns)>400 and sum(got)>=.98*len(got)

def sample_rows(name, n):
    path = DATA/name
    if not path.exists(): pytest.skip(f'{name} is not here')
    import json, random
    with path.open(encoding='utf-8') as f: rows = [json.loads(l) for l in f]
    return random.Random(0).sample(rows, min(n, len(rows)))

def test_the_quick_look_loses_nothing_on_planted_texts():
    ts = [around.format(v) for _,v,around in PLANTED]
    for t in [*ts, *NEAR, *(f'{"a b "*200}{t} and {"c-d_e "*50}' for t in ts)]: assert find(t)==find(t, fast=False)

@pytest.mark.parametrize('name', ['gsm8k_train_messages.jsonl', 'medquad_alpaca.jsonl'])
def test_the_quick_look_loses_nothing_on_real_rows(name):
    for r in sample_rows(name, 1500):
        t = str(r)
        assert find(t)==find(t, fast=False)

@pytest.mark.parametrize('name, most', [('gsm8k_train_messages.jsonl', 0), ('medquad_alpaca.jsonl', 25)])
def test_real_rows_are_not_flagged_for_nothing(name, most):
    rows = sample_rows(name, 10**6)
    assert sum(bool(find(' '.join(map(str, r.values())))) for r in rows)<=most

GH, MAIL = 'ghp_'+fake(36), 'ann.lee'+'@acme.io'
def chat(q, a, **k): return dict(messages=[dict(role='system', content='Be kind.'), dict(role='user', content=q), dict(role='assistant', content=a, **k)])

def test_no_value_is_in_what_a_person_or_a_log_reads():
    rec = chat(MAIL, GH)
    found = scan_record(rec)
    seen = repr(found)+str(found)+repr([str(p) for p,_ in found])+str(policy(rec)[1:])+find_secret(rec)
    with pytest.raises(UserError) as e: policy(rec, 'stop', where='a.jsonl, line 3')
    assert GH not in seen+str(e.value) and MAIL not in seen+str(e.value)

def test_a_secret_sets_the_row_aside_and_says_what_and_where():
    rec, reason, counts = policy(chat('hi', f'use {GH}'))
    assert reason=='a GitHub token in the answer' and counts=={'github_token': 1}
    assert policy(chat(MAIL, 'ok'), private_data='drop')[1]=='an e-mail address in the question'

def test_a_clean_row_is_the_same_object():
    rec = chat('hi', 'there')
    assert policy(rec, 'mask', 'mask')==(rec, None, {}) and policy(rec, 'mask', 'mask')[0] is rec

def test_reported_rows_are_counted_and_kept_as_they_are():
    rec = chat(f'{MAIL} and {MAIL}', 'ok')
    got, reason, counts = policy(rec)
    assert got is rec and reason is None and counts=={'email': 1}

def test_a_masked_row_is_new_and_the_given_one_untouched():
    rec = chat(f'mail {MAIL}', f'use {GH} now')
    got, reason, counts = policy(rec, 'mask', 'mask')
    assert got is not rec and reason is None and counts=={'email': 1, 'github_token': 1}
    assert [m['content'] for m in got['messages']]==['Be kind.', 'mail <EMAIL>', 'use <GITHUB_TOKEN> now']
    assert rec==chat(f'mail {MAIL}', f'use {GH} now')
    assert policy(got, 'mask', 'mask')[1:]==(None, {}), 'masked once is clean'

def test_only_the_group_that_is_masked_is_masked():
    got = policy(chat(MAIL, GH), 'mask', 'report')[0]
    assert got['messages'][1]['content']==MAIL and got['messages'][2]['content']=='<GITHUB_TOKEN>'

def test_a_dropped_row_is_dropped_though_the_other_group_is_masked():
    assert policy(chat(MAIL, GH), 'drop', 'mask')[1]=='a GitHub token in the answer'

def test_stop_names_the_line_and_the_way_out():
    with pytest.raises(UserError, match='a.jsonl, line 3: a GitHub token in the answer; .* set secrets to mask or drop'): policy(chat(MAIL, GH), 'stop', where='a.jsonl, line 3')
    with pytest.raises(UserError, match='an e-mail address in the question; .* set private_data to'): policy(chat(MAIL, GH), 'drop', 'stop')

call = dict(tool_calls=[dict(type='function', function=dict(name='send', arguments=dict(to=[dict(mail=MAIL)], n=3)))])
@pytest.mark.parametrize('rec, where', [
    (chat('q', 'a', **call), 'a tool call'), (chat('q', 'a', reasoning_content=MAIL), 'the reasoning of the answer'), (dict(text=f'x {MAIL}'), 'the text'),
    (dict(messages=[dict(role='tool', content=MAIL)]), 'the tool message'), (dict(messages=[dict(role='system', content=MAIL)]), 'the system message'),
    (dict(prompt=[dict(role='user', content=MAIL)], chosen=[dict(role='assistant', content='a')], rejected=[dict(role='assistant', content='b')]), 'the question'),
    (dict(prompt=[dict(role='user', content='q')], chosen=[dict(role='assistant', content=MAIL)], rejected=[dict(role='assistant', content='b')]), 'the chosen answer'),
    (dict(prompt=[dict(role='user', content='q')], chosen=[dict(role='assistant', content='a')], rejected=[dict(role='assistant', content=MAIL)]), 'the rejected answer'),
    (dict(prompt=[dict(role='user', content='q')], completion=[dict(role='assistant', content=MAIL)], label=True), 'the answer'),
    (dict(messages=[dict(role='user', content='q')], tools=[dict(type='function', function=dict(name='f', description=MAIL))]), 'the tools'),
], ids=lambda v: v if isinstance(v, str) else '')
def test_every_text_of_a_record_is_looked_at_and_can_be_masked(rec, where):
    assert [(str(p), f.kind) for p,f in scan_record(rec)]==[(where, 'email')]
    got = mask_record(rec, scan_record(rec))
    assert MAIL not in repr(got) and '<EMAIL>' in repr(got) and MAIL in repr(rec)
    assert got.keys()==rec.keys() and not scan_record(got)

def test_a_password_in_an_address_is_told_once_and_is_no_mail():
    t = 'https://bob:'+'s3cr3tpw@acme.io/x'
    assert [f.kind for f in find(t)]==['url_password'] and mask(t, find(t))=='https://bob:<URL_PASSWORD>@acme.io/x'

def test_many_findings_take_no_longer_than_their_number():
    import time
    t = time.process_time()
    text = ' '.join(f'user{i}'+'@acme.io' for i in range(30_000))
    rec = dict(messages=[dict(role='user', content=MAIL)]*5_000+[dict(role='assistant', content=text)])
    got, reason, counts = policy(rec, 'mask', 'mask')
    assert got['messages'][-1]['content'].count('<EMAIL>')==30_000 and counts=={'email': 1}
    assert time.process_time()-t<10

@pytest.mark.parametrize('text', ['a'*200_000, '1'*200_000, '1-'*100_000, '+1 '*60_000, 'a.'*100_000+'@', '@'*100_000, '::'*100_000, 'password='*20_000, 'eyJ'*50_000, 'sk-'*60_000, '://a:'*40_000, 'DE89 '*40_000,
    '-----BEGIN PRIVATE'+' KEY-----'+'a'*200_000, ('-----BEGIN PRIVATE'+' KEY-----')*5_000, 'call 1 '*30_000, '1.'*100_000, 'aws key '*25_000, 'password is '*20_000, 'SG'+'.'*100_000, 'a:1:'*50_000], ids=range(20))
def test_a_hostile_text_takes_no_longer_than_its_length(text):
    import time
    t = time.process_time()
    find(text)
    assert time.process_time()-t<5, 'quadratic in the length'

def test_the_policies_of_a_recipe_reach_the_rows(tmp_path, tiny):
    from conftest import short_rows, write_rows
    from ftnb.prepare import prepare
    from ftnb.recipe import make_recipe
    from ftnb.runs import Run
    mail, key = 'jo'+'@acme.io', 'ghp'+'_'+fake(36)
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
