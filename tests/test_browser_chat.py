"The chat panel in a real JupyterLab, against a stand-in of a server: Enter, two answers that grow, Stop, and a page that does not jump"
import pytest
from inlab import read_by_everyone
from test_chat_panel import StandIn

@pytest.fixture(scope='module')
def page(show):
    with StandIn(pause=.04) as s:
        page = show('chat', f"from ftnb.panels import chat_panel\np = chat_panel('{s.url}', system='Answer in one <b>sentence</b>.')\np")
        yield page

def test_enter_asks_both_and_stop_ends_them_without_a_jump(page):
    from playwright.sync_api import expect
    panel = page.locator('.ftnb-panel').first
    box = panel.get_by_label('you', exact=True)
    at = lambda: (panel.bounding_box()['height'], box.bounding_box()['y']-panel.bounding_box()['y'])
    expect(panel.get_by_text('is asked')).to_be_visible()
    before = at()
    box.focus()
    page.keyboard.type('My Kettle <i>leaks</i>\n', delay=5)
    expect(panel.get_by_role('group', name='answer of demo').get_by_text('MY KETTLE <I>LEAKS</I>')).to_be_visible()
    expect(panel.get_by_role('group', name='answer of base').get_by_text('my kettle <i>leaks</i>')).to_be_visible()
    expect(panel.get_by_role('button', name='Send')).to_be_enabled()
    expect(box).to_have_value('')
    expect(box).to_be_focused()
    page.keyboard.type('Tell me of kettles, of tea and of leaks for ever\n')
    expect(panel.get_by_role('button', name='Stop')).to_be_enabled()
    talk = page.locator('.ftnb-talk').first
    for _ in range(300): # until it is longer than its window
        if talk.evaluate('e => e.scrollHeight > e.clientHeight+40'): break
        page.wait_for_timeout(50)
    assert at()==before and abs(talk.evaluate('e => e.scrollTop'))<2 # the newest line is in view
    panel.get_by_role('button', name='Stop').press('Enter')
    expect(panel.get_by_role('group', name='answer of demo').last.get_by_text('stopped')).to_be_visible()
    assert page.locator('.jp-Cell').count()==1 # no key was a shortcut of the notebook

def test_it_can_be_read_by_everyone(page, tmp_path):
    read_by_everyone(page, tmp_path)
