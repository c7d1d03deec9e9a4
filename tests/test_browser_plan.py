"The plan panel in a real JupyterLab"
import pytest
from inlab import read_by_everyone

CELL = "from ftnb.plan_panel import plan_panel\nfrom ftnb.recipe import make_recipe\np = plan_panel(make_recipe(dict(model_name_or_path='llama-3.1-8b', peft='qlora', max_length=2048, per_device_train_batch_size=1)), 'T4', 1000)\np"

@pytest.fixture(scope='module')
def page(show): return show('plan', CELL)

def test_everything_moves_with_gpu_rows_and_fields(page):
    from playwright.sync_api import expect
    panel = page.locator('.ftnb-panel').first
    expect(panel.get_by_text('fits: needs').first).to_be_visible()
    panel.get_by_label('peft', exact=True).select_option('full')
    expect(panel.get_by_text('does not fit: needs').first).to_be_visible()
    panel.get_by_text('What would fit', exact=True).click()
    panel.get_by_role('button', name='take').first.click()
    expect(panel.get_by_text('fits: needs').first).to_be_visible()
    panel.get_by_label('GPU', exact=True).select_option(index=5)
    panel.get_by_label('training rows', exact=True).fill('-5')
    expect(panel.get_by_text('is not a whole number from 1 up')).to_be_visible()
    panel.get_by_label('training rows', exact=True).fill('2000')
    panel.get_by_text('Batch and length', exact=True).click()
    expect(panel.locator('table.ftnb-map td[aria-current]')).to_have_count(1)
    panel.get_by_label('model_name_or_path', exact=True).fill('no/such-<i>model</i>')
    expect(panel.get_by_text('There is no model no/such-<i>model</i>').first).to_be_visible()
    assert not panel.locator('i:has-text("model")').count()
    panel.get_by_role('button', name='Undo').click()
    expect(panel.get_by_text('There is no model')).to_have_count(0)

def test_it_can_be_read_by_everyone(page, tmp_path):
    page.wait_for_selector('.ftnb-panel')
    read_by_everyone(page, tmp_path)
