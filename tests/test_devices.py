"The table of devices: every number has a source, names are found as people and drivers write them, prices can be edited"
import datetime
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ftnb.base import UserError, read_json, shipped
from ftnb.devices import Device, device, devices, devices_table, of_machine
from ftnb.settings import read_settings

ROOT = Path(__file__).parent.parent
G = 2**30

def settings(tmp_path, text):
    (tmp_path/'settings.ini').write_text('[ftnb]\n'+text)
    return read_settings(tmp_path)

@pytest.fixture(scope='module')
def table(tmp_path_factory): return {d.name: d for d in devices(read_settings(tmp_path_factory.mktemp('empty')))}

def test_the_devices_asked_for_are_there(table):
    assert set(table)>={'T4', 'L4', 'A10G', 'RTX 3090', 'RTX 4090', 'RTX 5090', 'A100 40GB', 'A100 80GB', 'L40S', 'H100', 'H200', 'B200', 'CPU'}

def test_every_number_has_a_source(table):
    for d in table.values():
        assert d.spec and (d.bandwidth or 0)>0, d.name
        if d.price is not None:
            assert d.price_source and datetime.date(2026, 1, 1)<=datetime.date.fromisoformat(d.price_date), d.name
            assert .1<d.price<15, d.name
    rows = read_json(shipped('data', 'devices.json'))
    assert rows['memory_source'] and all(r['colab_source'] for r in rows['devices'] if r.get('colab_units'))

def test_what_can_be_used_is_less_than_what_is_sold(table):
    for d in table.values():
        if d.kind=='cuda': assert .9*d.sold_gb*G<=d.memory<=d.sold_gb*G, d.name
    assert [round(table[n].memory/G, 1) for n in ('T4', 'L4', 'RTX 4090', 'A100 80GB')]==[14.6, 22.0, 23.5, 79.1]

def test_rates_are_those_of_trl(table):
    "TRL ships peaks too; where they differ, the reason is in the row"
    trl = pytest.importorskip('trl.trainer.utils')
    names = {'T4': 'Tesla T4', 'L4': 'NVIDIA L4', 'A100 40GB': 'NVIDIA A100-SXM4-40GB', 'A100 80GB': 'NVIDIA A100-SXM4-80GB', 'L40S': 'NVIDIA L40S', 'H100': 'NVIDIA H100 80GB HBM3', 'H100 PCIe': 'NVIDIA H100 PCIe',
        'H200': 'NVIDIA H200', 'B200': 'NVIDIA B200'}
    for ours,theirs in names.items():
        d = table[ours]
        assert d.flops==trl.get_peak_flops(theirs, d.half), ours
        assert device(theirs).name==ours
    assert trl.get_peak_flops('NVIDIA A10G', 'bfloat16')==125e12!=table['A10G'].flops and "TRL's table" in table['A10G'].spec

def test_bfloat16_begins_at_capability_8(table):
    for d in table.values():
        if d.kind=='cuda': assert (d.capability>=8)==bool(d.bf16)==(d.half=='bfloat16'), d.name
    assert table['CPU'].half=='float32' and table['CPU'].flops>=80e9

@pytest.mark.parametrize('name,want', [('NVIDIA A100-SXM4-80GB', 'A100 80GB'), ('NVIDIA A100 80GB PCIe', 'A100 80GB'), ('A100 80 GB', 'A100 80GB'), ('a100-80gb', 'A100 80GB'), ('a100', 'A100 40GB'), ('NVIDIA A100-PCIE-40GB', 'A100 40GB'),
    ('Tesla T4', 'T4'), ('NVIDIA L4', 'L4'), ('l40s', 'L40S'), ('NVIDIA GeForce RTX 3090', 'RTX 3090'), ('geforce rtx 4090', 'RTX 4090'), ('RTX5090', 'RTX 5090'), ('NVIDIA H100 80GB HBM3', 'H100'), ('h100 pcie', 'H100 PCIe'),
    ('NVIDIA B200', 'B200'), ('CPU', 'CPU'), (' t4 ', 'T4')])
def test_names(name, want): assert device(name).name==want

@pytest.mark.parametrize('name,near', [('T44', 'T4'), ('RTX 4091', 'RTX 4090'), ('A100 90GB', 'A100 80GB'), ('H1000', 'H100'), ('L40', 'L40S'), ('banana', ''), ('', ''), (None, '')])
def test_an_unknown_name_is_refused_with_the_nearest(name, near):
    with pytest.raises(UserError, match='is not in the table of devices') as e: device(name)
    assert (f"Did you mean '{near}'?" in str(e.value)) if near else 'Did you mean' not in str(e.value)
    assert 'A100 80GB' in str(e.value)

def test_a_size_stands_for_a_card():
    assert device('24GiB').memory==24*G and device('23.5 gib').memory==int(23.5*G)
    for sold in (16, 24, 32, 40, 48, 80): assert device(f'{sold}GB').memory<=min(d.memory for d in devices() if d.sold_gb==sold or (sold==48 and d.name=='L40S'))
    assert device('24GB').flops is None and device('24GB').price is None
    with pytest.raises(UserError, match='has no memory'): device('0GB')

def test_a_device_is_taken_as_it_is():
    d = Device('mine', 10*G)
    assert device(d) is d

def test_this_machine():
    assert of_machine('NVIDIA GeForce RTX 4090', 24564*2**20)==device('RTX 4090')
    new = of_machine('NVIDIA X1', 50*G, bf16=False)
    assert (new.name, new.memory, new.flops, new.price, new.capability)==('NVIDIA X1', int(49*G), None, None, 7.5)
    assert of_machine('CPU, 2 cores', 8*G, 'cpu').memory==8*G

# ---- prices

def test_prices_of_the_workspace_replace_the_shipped_ones(tmp_path):
    s = settings(tmp_path, 'currency = EUR\n[prices]\nA100-SXM4-80GB = 1.25\nrtx 4090 = 0\n')
    d = device('A100 80GB', s)
    assert (d.price, d.currency, d.price_date)==(1.25, 'EUR', '') and str(tmp_path) in d.price_source
    assert device('RTX 4090', s).price==0 and device('T4', s)==device('T4', settings(tmp_path, ''))
    assert [r for r in devices_table(s) if r['device']=='A100 80GB'][0]['hour'].startswith('1.25 EUR')

@pytest.mark.parametrize('line,said', [('t4 = -0.1', 'price: -0.1 for T4 is not a number from 0 up'), ('t4 = nan', 'is not a number from 0 up'), ('t4 = inf', 'is not a number from 0 up'), ('t4 = free', r'\[prices\] t4 = free is not a number'),
    ('t4x = 1', "Did you mean 'T4'"), ('24gb = 1', 'is not in the table')])
def test_bad_prices_are_refused(tmp_path, line, said):
    with pytest.raises(UserError, match=said): devices(settings(tmp_path, f'[prices]\n{line}\n'))

def test_the_section_is_no_stage_and_its_keys_are_no_fields(tmp_path):
    (tmp_path/'settings.ini').write_text('[ftnb]\nlora_r = 8\n[train]\nreport_to = none\n[prices]\nt4 = 1\n')
    s = read_settings(tmp_path, fields=['lora_r', 'report_to'])
    assert s.prices=={'t4': '1'} and set(s.stages)=={'train'}
    (tmp_path/'settings.ini').write_text('[ftnb]\n[price]\nt4 = 1\n')
    with pytest.raises(UserError, match="unknown section .price.* Did you mean 'prices'"): read_settings(tmp_path)

def test_a_price_given_in_code_is_checked():
    for bad in (-1, float('nan'), 'x', True, None):
        with pytest.raises(UserError, match='is not a number from 0 up'): device('T4').with_price(bad)
    assert device('T4').with_price(0).price==0

# ---- what ships

def test_the_tables_ship():
    globs = tomllib.loads((ROOT/'pyproject.toml').read_text())['tool']['setuptools']['package-data']['ftnb._data']
    for f in ('devices.json', 'profiles.json', 'models/llama-3.1-8b.json'): assert any(Path(f).match(g) for g in globs) and shipped('data', *f.split('/'))

def test_planning_modules_know_no_torch():
    code = 'import sys, ftnb.devices, ftnb.flops, ftnb.profiles; assert not {"torch", "transformers", "numpy"} & set(sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT).returncode==0
