VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export HF_DATASETS_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help setup demo test soak vllm-env lab docs bench clean
help:
	@echo "make demo   fine-tune the small model on the bundled data, from nothing to a proven adapter"
	@echo "make test   what CI runs"
	@echo "make soak   the longer checks"
	@echo "make vllm-env  vLLM for the CPU in an environment of its own, for tests/test_vllm.py and ftnb serve --engine vllm"
	@echo "make lab    JupyterLab on the stages and the runs"
	@echo "make docs   the site, in _docs/"
	@echo "make bench  the benchmarks, into bench/results/"

setup: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info>=(3,11) else "ftnb needs Python 3.11 or later, this is "+sys.version.split()[0]+"; set PYTHON=python3.11")'
	@echo "installing into $(VENV) (torch first, versions of constraints.txt)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -q -c constraints.txt $$(grep '^torch==' constraints.txt) "setuptools>=77" wheel
	@$(PY) -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup
	@$(BIN)/ftnb run demo

# Two test processes with a thread each are faster on two cores than one after the other, and do not wait for each other's threads.
test: export OMP_NUM_THREADS ?= 1
test: setup
	@$(PY) tools/check_export.py
	@$(PY) tools/browser.py
	@$(BIN)/nbdev-test --n-workers 2
	@$(PY) -m pytest -m "not soak" -n 2 --dist loadfile --no-loadscope-reorder

soak: setup
	@$(PY) -m pytest -m soak

VLLM ?= .venv-vllm
vllm-env:
	@$(PYTHON) tools/vllm_env.py $(VLLM)

lab: setup
	@$(BIN)/jupyter lab --notebook-dir=. nbs/stages/1_prepare.ipynb

docs: export PATH := $(abspath $(BIN)):$(PATH)
docs: setup
	@$(PY) tools/measured.py
	@$(PY) tools/build_site.py
	@echo "the site is in _docs/: $(PY) -m http.server -d _docs"

bench: setup
	@$(PY) bench/speed.py
	@$(PY) bench/overhead.py
	@$(PY) tools/measured.py

clean:
	rm -rf $(VENV) _docs _proc reference build *.egg-info
