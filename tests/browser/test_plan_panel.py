"The plan panel in a real JupyterLab"
import pytest
from inlab import axe_faults, cut, dark, narrow, photograph

CELL = "from ftnb.plan_panel import plan_panel\nfrom ftnb.recipe import make_recipe\np = plan_panel(make_recipe(dict(model_name_or_path='llama-3.1-8b', peft='qlora', max_length=2048, per_device_train_batch_size=1)), 'T4', 1000)\np"

@pytest.fixture(scope='module')
def page(show): return show('plan', CELL)

def test_it_can_be_read_by_everyone(page, tmp_path):
    page.wait_for_selector('.ftnb-panel')
    for on in (False, True):
        dark(page, on)
        photograph(page, tmp_path/f'{on}.png')
        assert axe_faults(page)==[]
    narrow(page)
    photograph(page, tmp_path/'narrow.png')
    assert cut(page)==[]
    assert not page.errors
