"The recipe panel in a real JupyterLab"
import pytest
from inlab import photograph, read_by_everyone

@pytest.fixture(scope='module')
def page(show): return show('recipe', 'from ftnb.recipe_panel import recipe_panel\np = recipe_panel()\np')

def test_a_change_reaches_the_text_and_a_wrong_one_is_said_beside_the_field(page, tmp_path):
    from playwright.sync_api import expect
    panel = page.locator('.ftnb-panel').first
    expect(panel.get_by_text('Take it along')).to_be_visible()
    panel.get_by_label('lora_r', exact=True).fill('64')
    expect(panel.get_by_label('as text')).to_have_value('lora_r: 64\n')
    panel.get_by_label('lora_r', exact=True).fill('64x')
    expect(panel.get_by_text("'64x' is not a whole number")).to_be_visible()
    expect(panel.get_by_label('as text')).to_have_value('lora_r: 64\n')
    panel.get_by_role('button', name='Undo').click()
    expect(panel.get_by_label('lora_r', exact=True)).to_have_value('16')
    panel.get_by_label('peft', exact=True).select_option('full')
    expect(panel.get_by_label('lora_r', exact=True)).to_be_hidden()
    panel.get_by_role('button', name='Defaults').click()
    expect(panel.get_by_label('lora_r', exact=True)).to_be_visible()

def take(page, text):
    panel = page.locator('.ftnb-panel').first
    panel.get_by_label('as text').fill(text)
    panel.get_by_role('button', name='Take text').click()
    return panel

def test_text_goes_back_into_the_form(page):
    from playwright.sync_api import expect
    panel = take(page, 'peft: qlora\nload_in_4bit: true\nlora_r: 8\n')
    expect(panel.get_by_text('read: 3 fields')).to_be_visible()
    expect(panel.get_by_label('lora_r', exact=True)).to_have_value('8')
    expect(panel.get_by_label('peft', exact=True)).to_have_value('qlora')

def test_a_button_acts_on_what_was_typed_just_before(page):
    from playwright.sync_api import expect
    for r in range(100, 125): # under ipykernel 7.4.0 a click is handled in another thread than the text: one in five came first
        expect(take(page, f'lora_r: {r}\n').get_by_label('lora_r', exact=True)).to_have_value(str(r))

def test_it_can_be_read_by_everyone(page, tmp_path):
    read_by_everyone(page, tmp_path)

def test_each_method_says_what_it_would_train(page, tmp_path):
    from playwright.sync_api import expect
    panel = page.locator('.ftnb-panel').first
    panel.get_by_role('button', name='Defaults').click()
    expect(panel.get_by_text('4,884,480 parameters')).to_be_visible()
    panel.get_by_label('peft', exact=True).select_option('ia3')
    expect(panel.get_by_text('IA3 adds a vector')).to_be_visible()
    panel.get_by_text('What each method would train of this model').click()
    expect(panel.get_by_role('region', name='methods').get_by_role('cell', name='vera', exact=True)).to_be_visible()
    photograph(page, tmp_path/'methods.png')
