"The studio in a real JupyterLab: one recipe through all tabs, a run started and stopped from it, and no torch in its kernel"
import json
import pytest
from inlab import axe_faults, cut, dark, narrow, photograph

ROWS = [dict(prompt=f'What is {i} times {i+3}?', completion=f'It is {i*(i+3)}'+', and that is sure'*(i%3)+'.') for i in range(60)]

@pytest.fixture(scope='module')
def page(lab, show):
    (lab[1]/'sums.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in ROWS))
    return show('studio', 'import ftnb\ns = ftnb.studio()\ns')

def tab(page, name): page.locator('.ftnb-panel').first.get_by_role('tab', name=name, exact=True).click()

def test_the_recipe_goes_through_all_tabs(page, tmp_path):
    from playwright.sync_api import expect
    panel = page.locator('.ftnb-panel').first
    panel.get_by_label('dataset', exact=True).first.fill('sums.jsonl')
    panel.get_by_role('button', name='Look').click()
    expect(panel.get_by_text('sums.jsonl').first).to_be_visible()
    tab(page, 'recipe')
    expect(panel.get_by_label('dataset', exact=True).last).to_have_value('sums.jsonl')
    panel.get_by_label('lora_r', exact=True).first.fill('8')
    tab(page, 'plan')
    expect(panel.get_by_label('GPU', exact=True)).to_be_visible()
    tab(page, 'run')
    expect(panel.get_by_role('button', name='Start', exact=True)).to_be_visible()
    tab(page, 'compare')
    photograph(page, tmp_path/'compare.png')

def test_no_tab_is_cut_or_fails_the_reader(page, tmp_path):
    for name in ('data', 'recipe', 'plan', 'run', 'compare', 'rate', 'chat'):
        tab(page, name)
        page.wait_for_timeout(300)
        photograph(page, tmp_path/f'{name}.png')
        assert axe_faults(page)==[], name
    dark(page)
    assert axe_faults(page)==[]
    narrow(page)
    for name in ('data', 'recipe', 'plan', 'run', 'compare', 'rate', 'chat'):
        tab(page, name)
        assert cut(page)==[], name

def test_the_kernel_has_no_torch(page):
    code = "import sys; sorted({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules))"
    got = page.evaluate('''async code => { const k = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel; const out = [];
        const f = k.requestExecute({code, stop_on_error: true}); f.onIOPub = m => { if (m.header.msg_type === 'execute_result') out.push(m.content.data['text/plain']) }; await f.done; return out }''', code)
    assert got==['[]'] and not page.errors
