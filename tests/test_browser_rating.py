"The rating panel in a real JupyterLab: pairs rated by keyboard, gone on with by another panel, files at the end"
import json
import pytest
from inlab import axe_faults, cut, dark, narrow, photograph, read_by_everyone

LONG = 'To reset it, open the settings, choose *Account*, then *Security*, and press "Reset password". A mail with a link arrives within a minute; the link is good for one hour.'
ROWS = [dict(prompt='How do I reset my <b>password</b>?', base='I am a language model and have no password.', tuned=LONG, reference=LONG[:60]),
    dict(prompt='Sort this.', base='{\n  "topic": "billing",\n  "urgent": true\n}', tuned='{\n  "topic": "account"\n}'), *(dict(prompt=f'What is {i} and {i}?', base=f'Hm, {i}.', tuned=str(2*i)) for i in range(2, 4))]
CELL = "from ftnb.panels import rating_panel\np = rating_panel('answers.jsonl')\np"

@pytest.fixture(scope='module')
def page(lab, show):
    (lab[1]/'answers.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in ROWS))
    return show('rating', CELL)

def kept(lab): return [json.loads(l) for l in (lab[1]/'answers_ratings.jsonl').read_text().splitlines()]

def test_pairs_are_rated_by_keyboard_alone(page, lab, tmp_path):
    from playwright.sync_api import expect
    panel = page.locator('.ftnb-panel').first
    expect(panel.get_by_text('Pair 1 of 4')).to_be_visible()
    photograph(page, tmp_path/'first.png')
    field = panel.get_by_label('key', exact=True)
    field.focus()
    for k,n in (('121', 2), ('B', 3), ('u', 2), ('0', 3)): # keys that come faster than the next pair can be seen rate one pair
        page.wait_for_timeout(300)
        page.keyboard.type(k)
        expect(panel.get_by_text(f'Pair {n} of 4')).to_be_visible()
        expect(field).to_have_value('')
    assert [(r.get('choice'), r.get('undo')) for r in kept(lab)]==[('a', None), ('b', None), (None, True), ('both', None)]
    assert page.locator('.jp-Cell').count()==page.locator('.jp-CodeCell').count()==1 # no key was a shortcut of the notebook

def test_a_pressed_button_hands_the_keys_back_to_the_field(page, lab):
    from playwright.sync_api import expect
    panel = page.locator('.ftnb-panel').first
    page.wait_for_timeout(300)
    panel.get_by_role('button', name='Skip (s)').click()
    expect(panel.get_by_text('Pair 4 of 4')).to_be_visible()
    expect(panel.get_by_label('key', exact=True)).to_be_focused()
    assert kept(lab)[-1]['choice']=='skip'

def test_it_can_be_read_by_everyone(page, tmp_path):
    read_by_everyone(page, tmp_path)

def test_a_new_panel_goes_on_and_ends_with_the_files(lab, show, tmp_path):
    from playwright.sync_api import expect
    page = show('again', CELL)
    panel = page.locator('.ftnb-panel').first
    expect(panel.get_by_text('Pair 4 of 4')).to_be_visible()
    panel.get_by_label('key', exact=True).focus()
    page.wait_for_timeout(300)
    page.keyboard.press('2')
    expect(panel.get_by_text('Once more: 1 that was skipped')).to_be_visible()
    page.wait_for_timeout(300)
    page.keyboard.press('s')
    expect(panel.get_by_text('All 4 pairs are rated')).to_be_visible()
    expect(panel.get_by_text('tuned over base')).to_be_visible()
    dpo, kto = ([json.loads(l) for l in (lab[1]/f'answers_ratings_{m}.jsonl').read_text().splitlines()] for m in ('dpo', 'kto'))
    assert len(dpo)==2 and len(kto)==6
    dark(page)
    photograph(page, tmp_path/'done.png')
    assert axe_faults(page)==[]
    narrow(page)
    photograph(page, tmp_path/'done_narrow.png')
    assert cut(page)==[] and not page.errors
