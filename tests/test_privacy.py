"Secrets and private data: found in the spellings people use, not seen where there is none, never repeated"
import json, random, string
import pytest

from ftnb.base import UserError
from ftnb.privacy import find, find_secret, mask_record, policy, scan_record

rng = random.Random(7)
def drawn(n, of=string.ascii_letters+string.digits): return ''.join(rng.choice(of) for _ in range(n-2))+'a7' # built at run time: no scanner shall take this file for a leak
up = string.ascii_uppercase+string.digits
def luhn(head, n):
    d = head+''.join(rng.choice(string.digits) for _ in range(n-len(head)-1))
    s = sum(int(c) if i%2 else sum(divmod(2*int(c), 10)) for i,c in enumerate(d[::-1]))
    return d+str(-s%10)
def fours(s, gap=' '): return gap.join(s[i:i+4] for i in range(0, len(s), 4))
at = lambda a, b: f'{a}@{b}'

SECRETS = {'AWS key': ['AKIA'+drawn(16, up).upper(), 'ASIA'+drawn(16, up).upper()], 'GitHub token': ['ghp_'+drawn(36), 'gho_'+drawn(36), 'github_pat_'+drawn(82)], 'GitLab token': ['glpat-'+drawn(20)],
    'Hugging Face token': ['hf_'+drawn(34)], 'API key': ['sk-'+drawn(48), 'sk-proj-'+drawn(60), 'sk-ant-api03-'+drawn(80)], 'Slack token': ['xoxb-'+drawn(40), 'xoxp-'+drawn(50)], 'Google key': ['AIza'+drawn(35)],
    'Stripe key': ['sk_live_'+drawn(24), 'rk_live_'+drawn(24)], 'JSON web token': ['eyJ'+drawn(20)+'.eyJ'+drawn(40)+'.'+drawn(43)], 'npm token': ['npm_'+drawn(36)], 'PyPI token': ['pypi-'+drawn(90)],
    'SendGrid key': ['SG.'+drawn(22)+'.'+drawn(43)], 'private key': ['-----BEGIN RSA PRIVATE KEY-----\n'+drawn(64)+'\n-----END RSA PRIVATE KEY-----', '-----BEGIN OPENSSH PRIVATE KEY-----']}
NAMED = [f'password = {drawn(10)}', f'The password is {drawn(9)}!', f'pwd: "{drawn(8)}"', f"api_key='{drawn(24)}'", f'my passphrase: Blue{drawn(5)}', f'client_secret={drawn(30)}', f'Authorization: Bearer {drawn(40)}',
    f'access token: {drawn(32)}', f'"secret_key": "{drawn(20)}"', f'PASSWORD={drawn(12)}', 'postgres://me:'+drawn(9)+'@db.example.org/x']
PRIVATE = {'e-mail address': [at('jo.doe', 'example.org'), at('j+x_1', 'mail.example.co.uk'), at('ANNA', 'EXAMPLE.COM'), at('o-brien', 'sub.example.museum')],
    'telephone number': ['+44 20 7946 0958', '+49 30 901820', '+33 1 42 68 53 00', '+1 (212) 555-0187', '(212) 555-0187', '212-555-0187', '212.555.0187', '1-800-860-8747', '+91 98765 43210', '+81 3-1234-5678', '+12125550187', '+351 21 342 5678'],
    'card number': [luhn('4', 16), fours(luhn('4', 16)), fours(luhn('51', 16), '-'), fours(luhn('2221', 16)), luhn('37', 15), luhn('6011', 16)],
    'IBAN': ['DE89370400440532013000', 'DE89 3704 0044 0532 0130 00', 'GB29 NWBK 6016 1331 9268 19', 'FR14 2004 1010 0505 0001 3M02 606', 'NL91ABNA0417164300'],
    'social security number': ['123-45-6789', '078-05-1120'], 'IP address': ['8.8.8.8', '93.184.216.34', '203.98.7.65', '2a00:1450:4001:81b::200e', '2606:2800:220:1:248:1893:25c8:1946']}
FRAMES = ['It is {}, as I said.', 'Please use {}', 'She wrote: {}\nand left.', '({})']
planted = [(k, f.format(v)) for table in (SECRETS, PRIVATE) for k,vs in table.items() for n,v in enumerate(vs) for f in [FRAMES[n%4]]] + [('password or token', v) if '//' not in v else ('password in a URL', v) for v in NAMED]
clean = ['Natalia sold 48/2 = 24 clips in May, 48+24 = 72 in all.', 'Your order 1234-5678-9012-3456 has left.', 'ISBN 978-3-16-148410-0', 'ISBN 0-306-40615-2', 'On 2024-07-26 at 12:34:56', 'between 1990-2005 and 2010-2015',
    'Version 10.2.3.4 is out', 'v8.8.8.8 of the driver', 'see section 4.3.2.1', 'sha256 '+'9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08', 'commit 1a2b3c4d5e6f', 'the secret is patience',
    'What is the password policy of the company?', 'Enter your password: then press return.', 'The token is a unit of text.', 'token: abc', 'password: ********', 'password = <your password>', 'api_key = ${API_KEY}', 'api_key: YOUR_API_KEY',
    'the password is required', 'A secret: nobody knows.', 'the bearer of bad news', 'localhost is 127.0.0.1', 'the router at 192.168.1.1', 'ssh to 10.0.0.12', '1.5 2.5 3.5 4.5', '0.0.0.0', 'a ratio of 16:9 or 4:3', '12:30:45:11',
    '123456789', '1234567890', '4111 1111 1111 1112 fails the check', '0000 0000 0000 0000', '16 digits: 1234567890123456', '3.141592653589793', '555 apples and 1234 pears', '100-200-3000 units', '$1,234,567.89', '1,000,000 rows',
    'page 212-214', 'the years 1914-1918 and 1939-1945', '5-3-2 formation', 'x = 800 - 555 - 1234', 'A1 B2 C3 D4', 'Me @ home', 'user@localhost', 'foo@bar', 'a@b', '@username on the web', 'e-mail me', 'sk-learn is a library', 'hf_hub_download(repo)',
    'the xoxo sign', 'GitHub tokens begin with ghp_', 'AKIA is a prefix', 'serial 4012-88-1881', 'zip 20892-3655', 'DE89 is not an account', 'room 212, phone in the lobby', '(1999) 12 pages', 'f(1234567) = 2', '12 345 678 people', 'std::vector<int> a::b', '10:20:30', 'ratio 1:2:3:4',
    'a 3x3x3 cube', 'ids 1001, 1002, 1003', 'tokens: 2048', 'secret santa party', 'passwords should have 12 characters', 'http://example.org:8080/a@b']

@pytest.mark.parametrize('kind, text', planted, ids=[f'{k} {i}' for i,(k,_) in enumerate(planted)])
def test_a_planted_value_is_found_and_named(kind, text): assert kind in [f.kind for f in find(text)], text

@pytest.mark.parametrize('text', clean, ids=range(len(clean)))
def test_what_only_looks_like_one_is_left_alone(text): assert not find(text), find(text)

def test_there_are_enough_of_both(): assert len(planted)>=60 and len(clean)>=60

def test_a_value_is_never_repeated_in_what_is_reported():
    for kind,text in planted:
        rec = dict(messages=[dict(role='user', content=text), dict(role='assistant', content='ok')])
        said = repr(scan_record(rec))+str(find_secret(rec))+str(policy(rec)[1:])
        value = max((text[f.start:f.end] for f in find(text)), key=len)
        assert value not in said
        try: policy(rec, 'stop', 'stop', 'a.jsonl, line 1')
        except UserError as e: assert value not in str(e) and 'a.jsonl, line 1' in str(e)

def test_masking_takes_everything_out_and_keeps_the_rest():
    for kind,text in planted:
        got = mask_record(dict(text=f'Before. {text} After.'))['text']
        assert got.startswith('Before.') and got.endswith('After.') and kind.upper() in got and not [f for f in find(got)], got

def test_every_part_of_a_record_is_looked_at():
    key = 'ghp_'+drawn(36)
    call = dict(role='assistant', content='', tool_calls=[dict(function=dict(name='f', arguments=dict(a=[key])))])
    for rec in (dict(text=key), dict(messages=[dict(role='system', content=key)]), dict(messages=[call]), dict(prompt=[], chosen=[], rejected=[dict(role='assistant', content=key)]),
            dict(prompt=[dict(role='user', content=key)], completion=[], label=True), dict(messages=[dict(role='assistant', content='x', reasoning_content=key)])):
        assert 'a GitHub token in' in find_secret(rec) and not scan_record(mask_record(rec))

def test_the_policies_of_a_recipe_reach_the_rows(tmp_path, tiny):
    from conftest import short_rows, write_rows
    from ftnb.prepare import prepare
    from ftnb.recipe import make_recipe
    from ftnb.runs import Run
    mail, key = at('jo', 'example.org'), 'ghp_'+drawn(36)
    data = write_rows(tmp_path/'a.jsonl', [*short_rows(60), dict(prompt=f'I am {mail} and wait', completion='yes'), dict(prompt='Which key?', completion=key)])
    def go(**kw):
        run = Run(tmp_path/'run', make_recipe(dict(dataset=data, model_name_or_path=tiny, **kw)))
        return prepare(run).report, ''.join(p.read_text() for p in run.path('data').glob('*.jsonl'))+''.join(p.read_text() for p in run.path('reports').glob('*.*'))
    rep, text = go()
    gates = {g['gate']: g for g in rep['gates']}
    assert gates['no_secrets']['verdict']=='fixed' and gates['no_private_data']['verdict']=='warn' and 'e-mail address 1' in gates['no_private_data']['text']
    assert key not in text and mail in text
    rep, text = go(secrets='mask', private_data='mask')
    assert key not in text and mail not in text and '<GITHUB TOKEN>' in text and '<E-MAIL ADDRESS>' in text and rep['aside']==0
    rep, text = go(private_data='drop')
    assert mail not in text and [a['reason'] for a in rep['set_aside']]==['an e-mail address in the question', 'a GitHub token in the answer']
    with pytest.raises(UserError, match='a.jsonl, line 61: an e-mail address in the question; take it out'): go(private_data='stop')
