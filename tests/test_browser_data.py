"The data panel in a real JupyterLab: what a file was taken for, a column corrected, and the proof made in another process"
import json
import pytest
from inlab import read_by_everyone

ROWS = [dict(frage=f'What is <b>{i}</b> times {i+3}?', antwort=f'It is {i*(i+3)}'+', and that is sure'*(i%3)+'.', note='x') for i in range(40)]

@pytest.fixture(scope='module')
def page(lab, show):
    (lab[1]/'mine.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in ROWS))
    return show('data', "import sys\nfrom ftnb.data_panel import data_panel\np = data_panel('mine.jsonl')\np", 'p')

def test_a_file_is_looked_at_mapped_and_proved(page, tmp_path):
    from playwright.sync_api import expect
    panel = page.locator('.ftnb-panel').first
    expect(panel.get_by_role('button', name='Look')).to_be_visible()
    expect(panel.get_by_text('mine.jsonl').first).to_be_visible()
    panel.get_by_role('button', name='Take prompt: frage, completion: antwort').click()
    expect(panel.get_by_label('prompt', exact=True)).to_have_value('frage')
    expect(panel.get_by_text('as a line of the recipe: mapping: {prompt: frage, completion: antwort}')).to_be_visible()
    panel.get_by_role('button', name='Prove').click()
    expect(panel.get_by_text('at work in its own process').first).to_be_visible()
    expect(panel.get_by_text('Stage 1 of mine is done.')).to_be_visible(timeout=90_000)
    expect(panel.get_by_text('end_of_turn_trained').first).to_be_visible()
    assert not page.locator('.ftnb-panel b:has-text("7")').count() # a row's HTML is text

def test_it_can_be_read_by_everyone(page, tmp_path):
    read_by_everyone(page, tmp_path)
