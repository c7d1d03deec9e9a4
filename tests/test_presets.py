"Presets: valid recipes that change only what they name, with a reason for each value, below what a user gives"
import re
from pathlib import Path
import pytest

from ftnb.advice import advice
from ftnb.cli import main
from ftnb.fields import defaults, names
from ftnb.presets import preset, preset_table, presets, with_preset
from ftnb.recipe import load_recipe, make_recipe, to_dict

each = pytest.mark.parametrize('name', presets)

@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path/'none'))
    monkeypatch.chdir(tmp_path)
    (tmp_path/'my.jsonl').write_text('{"prompt": "a", "completion": "b"}\n')

def test_the_four_domains_are_there(): assert list(presets)==['code', 'medical', 'legal', 'support']

@each
def test_a_preset_is_a_valid_recipe_that_differs_from_the_defaults_only_in_what_it_names(name):
    r = make_recipe(preset(name))
    assert set(to_dict(r))<=set(preset(name)) and set(to_dict(r)) # nothing is set by the way
    assert all(getattr(r, k)==v for k,v in preset(name).items())
    assert make_recipe(with_preset(dict(peft='full'), name)) and make_recipe(with_preset(dict(peft='prefix'), name)) and make_recipe(with_preset(dict(method='dpo'), name))

@each
def test_every_value_has_a_reason_and_a_source_and_no_rule_warns_of_it(name):
    assert presets[name].note
    for row in preset_table(name): assert len(row['reason'])>30 and re.match(r'https://\S+$', row['source']) and row['field'] in names
    assert not [str(a) for a in advice(make_recipe(preset(name)), rows=5000) if a.kind=='warn']

@pytest.mark.parametrize('name', ['medical', 'legal'])
def test_where_errors_hurt_private_rows_are_not_trained_on_and_answers_are_not_drawn(name):
    v = preset(name)
    assert v['private_data'] in ('drop', 'stop') and v['secrets']=='stop' and v['do_sample'] is False and 'advice' in presets[name].note

@each
@pytest.mark.parametrize('given', [dict(max_length=333), dict(lora_r=8), dict(rank=8), dict(epochs=1), dict(max_steps=10), dict(private_data='report'), dict(do_sample=True, temperature=.7), dict(temperature=.7, do_sample='true', top_p=.9), dict(system_prompt=None)], ids=str)
def test_what_a_user_gives_stands_under_whatever_name(name, given):
    given = {k: v for k,v in given.items() if k!='rank'} or dict(r=8)
    r, alone = make_recipe(with_preset(given, name)), make_recipe(given)
    for k in to_dict(alone): assert getattr(r, k)==getattr(alone, k), k
    if 'lora_r' in to_dict(alone): assert r.lora_alpha==defaults()['lora_alpha'] # no alpha of another rank
    if 'system_prompt' in given: assert r.system_prompt is None

@each
def test_ftnb_new_writes_a_preset_below_what_is_given(name, work, capsys):
    assert main(['new', 'my.yaml', '--dataset', 'my.jsonl', '--preset', name, '-p', 'max_length=700'])==0
    text = Path('my.yaml').read_text()
    assert load_recipe('my.yaml')==make_recipe(with_preset(dict(dataset='my.jsonl', max_length=700), name))
    assert presets[name].note in text and set(re.findall(r'(?m)^(\w+):', text))=={'dataset', 'max_length', *preset(name)}

def test_the_help_lists_the_presets_with_what_they_set_and_a_wrong_name_gets_the_nearest(work, capsys):
    with pytest.raises(SystemExit): main(['new', '--help'])
    out = ' '.join(capsys.readouterr().out.split())
    for p in presets.values(): assert f'{p.name} (' in out and all(k in out for k in p.values)
    assert main(['new', 'my.yaml', '--preset', 'medicine'])==2
    assert "Did you mean 'medical'?" in capsys.readouterr().err and not Path('my.yaml').exists()

def test_the_page_of_presets_is_what_its_maker_writes():
    import sys
    sys.path.insert(0, str(Path(__file__).parents[1]/'tools'))
    import presets as maker
    assert (Path(__file__).parents[1]/'guides/presets.qmd').read_text()==maker.page(), 'run python tools/presets.py'
