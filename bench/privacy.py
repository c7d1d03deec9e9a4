"""Secrets and private data: speed, false alarms on real rows, recall on planted and on made-up values.

    python bench/privacy.py FILE.jsonl ... [--show 100] [--wrong FILE=N ...] [--rows 100000] [--faker] [--out bench/results/privacy.json]

False alarms are judged by hand: a run prints every flagged row (a random sample of --show per kind if there are more)
with the finding in [[ ]], a person counts the wrong rows and gives the number with --wrong for the record.
--faker asks the package Faker (not a dependency) for values of 12 countries; many of its phone numbers exist in no country's plan.
"""
import argparse, importlib.util, itertools, json, random, statistics, time
from collections import Counter
from pathlib import Path
from ftnb.privacy import find, scan_record, texts
from ftnb.runs import hardware, versions

ROOT = Path(__file__).parents[1]
def rows_of(path): return [json.loads(l) for l in Path(path).read_text().split('\n') if l.strip()]

def timed(rows, times=5):
    "Seconds per row of one core, the median of `times`"
    took = []
    for _ in range(times):
        t = time.process_time()
        for r in rows: scan_record(r)
        took.append((time.process_time()-t)/len(rows))
    return statistics.median(took)

def flagged(rows):
    "(row number, kind, the finding with its surroundings) of all findings"
    for i,r in enumerate(rows, 1):
        at = dict(texts(r))
        for path,f in scan_record(r):
            t = at[path]
            yield i, f.kind, ' '.join(f'{t[max(0, f.start-40):f.start]}[[{t[f.start:f.end]}]]{t[f.end:f.end+25]}'.split())

def of_file(path, show, wrong):
    rows = rows_of(path)
    found = list(flagged(rows))
    kinds = {k: sorted({i for i,o,_ in found if o==k}) for k in sorted({k for _,k,_ in found})}
    for k,at in kinds.items():
        pick = set(at if len(at)<=show else random.Random(0).sample(at, show))
        print(f'{Path(path).name}: {k}: {len(at)} rows, shown {len(pick)}')
        for i,o,said in found:
            if o==k and i in pick: print(f'  row {i}: {said}')
    s = timed(rows)
    return dict(rows=len(rows), characters_per_row=round(sum(len(t) for r in rows for _,t in texts(r))/len(rows)), us_per_row=round(s*1e6, 1), rows_per_s=round(1/s),
        rows_flagged=len({i for i,*_ in found}), rows_by_kind={k: len(v) for k,v in kinds.items()}, rows_wrong_by_hand=wrong)

def planted():
    "Recall and false alarms on the sets of tests/test_privacy.py"
    spec = importlib.util.spec_from_file_location('test_privacy', ROOT/'tests/test_privacy.py')
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    hits = Counter(); n = Counter()
    for kind,value,text in m.planted():
        a = text.index(value)
        n[kind] += 1
        hits[kind] += any((f.kind, f.start, f.end)==(kind, a, a+len(value)) for f in find(text))
    return dict(planted=sum(n.values()), found_whole=sum(hits.values()), missed=[k for k in n if hits[k]<n[k]], near_misses=len(m.NEAR), flagged_wrongly=sum(bool(find(t)) for t in m.NEAR))

def made_up(each=40):
    "Recall on what Faker makes up for 12 countries, in sentences"
    from faker import Faker
    said = dict(email='Please write to {} soon.', phone='Call me at {} please.', phone_alone='You get us under {} all day.', card='{} was charged', card_of_any_age='My card is {}.', iban='Send it to {} today.',
        ssn='His number is {}.', ip_address='request from {} failed')
    kinds = dict(phone_alone='phone', card_of_any_age='card')
    issuers = itertools.cycle(('visa16', 'visa19', 'mastercard', 'amex', 'discover', 'diners'))
    hits, n = Counter(), Counter()
    for loc in ('en_US', 'en_GB', 'de_DE', 'fr_FR', 'es_ES', 'it_IT', 'nl_NL', 'pt_BR', 'en_IN', 'ja_JP', 'pl_PL', 'sv_SE'):
        f = Faker(loc)
        f.seed_instance(11)
        make = dict(email=f.email, phone=f.phone_number, card=lambda: f.credit_card_number(next(issuers)), card_of_any_age=f.credit_card_number, ip_address=f.ipv4_public)
        if loc not in ('en_US', 'en_IN', 'ja_JP'): make['iban'] = f.iban
        if loc=='en_US': make |= dict(ssn=f.ssn, phone_alone=f.phone_number)
        for k,fn in make.items():
            for _ in range(each):
                v = fn()
                t, kind = said[k].format(v), kinds.get(k, k)
                a, name = t.index(v), f'{k} {loc}' if k.startswith('phone') else k
                n[name] += 1
                hits[name] += any(o.kind==kind and o.start<=a and o.end>=a+len(v) for o in find(t))
    return {k: f'{hits[k]} of {n[k]}' for k in n}

def regions():
    "How many of the example numbers of the world's regions are found in international form, without a word for phone"
    import phonenumbers as P
    nums = [P.format_number(e, P.PhoneNumberFormat.INTERNATIONAL) for r in sorted(P.SUPPORTED_REGIONS) if (e := P.example_number(r))]
    def ok(v): return any(f.kind=='phone' and t[f.start:f.end]==v for t in [f'You can reach the office under {v} until five.'] for f in find(t))
    return f'{sum(map(ok, nums))} of {len(nums)}'

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('files', nargs='+'); p.add_argument('--show', type=int, default=100); p.add_argument('--wrong', nargs='*', default=[])
    p.add_argument('--rows', type=int, default=100_000); p.add_argument('--faker', action='store_true'); p.add_argument('--out')
    a = p.parse_args()
    wrong = {k: int(v) for k,v in (o.split('=') for o in a.wrong)}
    find('warm: +1 301 435 3848, password: ' + 'x7x7x7x7')
    res = dict(method='every flagged row (a random sample of --show per kind if more) was read one by one; wrong = the value is not what its kind says. Times: process time of one core, median of 5 passes.',
        files={Path(f).name: of_file(f, a.show, wrong.get(Path(f).name)) for f in a.files})
    rows = rows_of(a.files[0])
    many = [rows[i%len(rows)] for i in range(a.rows)]
    t = time.process_time()
    for r in many: scan_record(r)
    res |= dict(rows_scanned=a.rows, seconds=round(time.process_time()-t, 2), planted=planted(), phone_numbers_of_regions=regions())
    if a.faker: res['faker'] = made_up()
    res |= dict(hardware=hardware(), versions={k: v for k,v in versions().items() if k in ('python', 'ftnb')})
    print(json.dumps(res, indent=1, ensure_ascii=False))
    if a.out:
        from ftnb.base import write_json
        write_json(a.out, res)

if __name__=='__main__': main()
