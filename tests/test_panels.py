"The studio without a browser: one recipe through all tabs, its static twin, no heavy library, broken input"
import subprocess, sys
import pytest

pytest.importorskip('ipywidgets')
from ftnb.panels import studio

def run(code, cwd):
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=cwd)
    assert p.returncode==0, p.stderr
    return p.stdout

def test_all_panels_open_without_a_heavy_library(tmp_path):
    run("import sys, ftnb\ns = ftnb.studio()\nfor k in ('data', 'recipe', 'plan', 'run', 'compare', 'rate', 'chat'): s.show_tab(k)\ns.form.set(model_name_or_path='llama-3.1-8b', peft='qlora')\ns.static_html()\n"
        "assert not {'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules), set(sys.modules)", tmp_path)

def test_ftnb_alone_loads_no_widgets(tmp_path): run("import sys, ftnb\nassert 'ipywidgets' not in sys.modules\ntry: ftnb.nothing\nexcept AttributeError as e: assert 'nothing' in str(e)", tmp_path)

def test_data_sets_the_recipe_and_the_plan_follows_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'a.csv').write_text('frage,antwort\n'+''.join(f'What is {i}?,It is {i}\n' for i in range(9)))
    s = studio()
    s.panels['data'].path.value = 'a.csv'
    s.panels['data'].map(prompt='frage', completion='antwort')
    assert s.value.dataset=='a.csv' and s.value.mapping==dict(prompt='frage', completion='antwort')
    before = s.show_tab('plan').value.report['memory']['peak']
    s.show_tab('recipe').form.set(max_length=4096)
    assert s.panels['plan'].value.report['memory']['peak']>before
    assert 'a.csv' in s.show_tab('recipe').box.value

def test_the_static_twin_holds_every_open_tab_and_no_markup_of_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s = studio()
    s.show_tab('recipe'); s.show_tab('plan')
    s.form.set(run_name='<script>x</script>')
    html = s.static_html()
    assert '<script>' not in html and 'Plan' in html and 'Recipe' in html

def test_a_broken_recipe_file_is_a_sentence(tmp_path):
    (tmp_path/'r.yaml').write_text('lora_r: 16\nlora_alhpa: 3\n')
    with pytest.raises(ValueError, match="line 2: unknown key 'lora_alhpa'. Did you mean 'lora_alpha'"): studio(str(tmp_path/'r.yaml'))
