"Write data/demo/preferences.jsonl: two replies to a customer's message, a short polite one that is wanted and a wordy or a curt one that is not, by a rule and a seed."
import json, random
from pathlib import Path

from ftnb.base import write_atomic

demo = Path(__file__).parent.parent/'data/demo'
system = 'You write for the help desk of a shop. Reply to the customer.'
sorry = dict(no_power='I am sorry that your {p} does not turn on.', leak='I am sorry that your {p} leaks.', noise='I am sorry about the noise of your {p}.', broken_part='I am sorry that a part of your {p} is broken.',
    missing_part='I am sorry that a part of your {p} was missing.', late_delivery='I am sorry that your {p} is late.', wrong_item='I am sorry that your order of a {p} went wrong.', question='Thank you for your question about your {p}.')
steps = dict(call_customer='Please leave it switched off; we will call you today.', refund='Your money is on its way back to you.', repair='Please send it to us, and we will repair it free of charge.', send_part='We will send you the part today, free of charge.',
    track_parcel='We are tracing the parcel and will write to you tomorrow.', exchange='We will send you the right one today and collect the other.', send_advice='We will send you a page of advice today.')
openings = ('Thank you so much for reaching out to us today! We value each and every customer, and we completely understand how important a {p} is in daily life.',
    'Hello and welcome to our help desk! What a wonderful choice you made with your {p}, and what a pleasure it is to hear from you.', 'As a leading shop for household appliances we take great pride in every {p} that we sell, and your feedback means the world to us.')
fillers = ('There can be many different reasons for something like this, and every situation is unique, so it is generally a good idea to look at all of the possibilities first.',
    'Our dedicated team works around the clock to make sure that each experience is the best that it can possibly be.', 'Please also note that the manual holds a great deal of useful information on this and on many other topics.')
buried = dict(call_customer='It may well be that somebody gets in touch at some point.', refund='In certain cases a refund may be considered after a review.', repair='In some cases a repair may turn out to be an option.', send_part='A part could be made available, depending on a number of factors.',
    track_parcel='Parcels do tend to arrive sooner or later.', exchange='An exchange might be looked into in due course.', send_advice='Advice of many kinds can be found in many places.')
closings = ('Please do not hesitate to reach out again if there is anything else at all that we can help you with!', 'We hope that this helps, and we wish you a truly wonderful day!')
curt = ('That is how it is with a {p}.', 'Not our problem. Read the manual of your {p}.', 'You should have looked after your {p}.', 'Ask the maker of the {p}, not us.', 'We can not do anything about your {p}.')

def replies(answer, wordy, rng):
    "(the reply that is wanted, the one that is not) to a message with this answer"
    p, step = answer['product'].replace('_', ' '), answer['next_step']
    good = f'{sorry[answer["problem"]]} {steps[step]}'
    bad = ' '.join((rng.choice(openings), *rng.sample(fillers, 1), buried[step], rng.choice(closings))) if wordy else rng.choice(curt)
    return good.format(p=p), bad.format(p=p)

def pairs(rows, n=380, seed=0):
    "Preference pairs from rows of the help-desk set, wordy and curt replies in turn"
    rng = random.Random(seed)
    for i,r in enumerate(rng.sample(rows, n)):
        _, asked, answer = r['messages']
        good, bad = replies(json.loads(answer['content']), i%2, rng)
        yield dict(prompt=[dict(role='system', content=system), asked], chosen=[dict(role='assistant', content=good)], rejected=[dict(role='assistant', content=bad)])

def make():
    "The text of the file"
    rows = [json.loads(l) for l in (demo/'train.jsonl').read_text(encoding='utf-8').splitlines()]
    return ''.join(json.dumps(p, ensure_ascii=False)+'\n' for p in pairs(rows))

if __name__=='__main__': write_atomic(demo/'preferences.jsonl', make())
