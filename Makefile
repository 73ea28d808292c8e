# Everything is done in .venv, which the first target that needs it makes.
# Variables: NB=notebooks  N=processes  ZOO=folder of models  OUT=folder for results
# A word of settings.ini's tst_flags runs with NB_FLAGS, as in: NB_FLAGS=slow make test

PYTHON ?= python3
N      ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
NB     ?=
ZOO    ?=
OUT    ?=

VENV  := .venv
STAMP := $(VENV)/.stamp
BIN   := $(VENV)/bin
PY    := $(BIN)/python
UV    := $(shell command -v uv 2>/dev/null)
PIP    = $(if $(UV),$(UV) pip install -q --python $(PY),$(PY) -m pip install -q)

.DEFAULT_GOAL := help
.PHONY: help install demo test lab export save clean check readme docs bench bench-gpu
.NOTPARALLEL:

help: ## show this list
	@echo "usage: make TARGET [NB=notebooks] [N=processes] [ZOO=folder] [OUT=folder]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-9s %s\n", $$1, $$2}' Makefile

install: $(STAMP) ## make .venv with the library and all tools (no second time)

demo: $(STAMP) ## convert the shipped model and compare it with the float one
	@$(PY) tools/demo.py $(if $(OUT),--out "$(OUT)")

test: $(STAMP) ## run all notebooks and tests; NB=file: one notebook
	$(PY) -m pytest -q --nbval -n $(N) --dist loadfile $(or $(NB),nbs)
	$(if $(NB),,$(PY) -m pytest -q -n $(N) tests)

lab: $(STAMP) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

export: $(STAMP) ## write ptqlit/ from the notebooks
	$(BIN)/nbdev_export

save: export ## run notebooks and save their outputs; NB=files, else all
	$(PY) tools/nb.py run $(NB)

clean: $(STAMP) ## clean the notebooks, remove what other targets made (never .venv)
	$(BIN)/nbdev_clean
	rm -rf out _proc _docs build dist jupyter_execute .pytest_cache .ruff_cache .hypothesis
	find nbs ptqlit tools tests docs -name __pycache__ -prune -exec rm -rf {} +
	find nbs \( -name .ipynb_checkpoints -o -name .hypothesis \) -prune -exec rm -rf {} +

check: $(STAMP) ## nothing generated is out of date; links, imports, course map
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(PY) tools/readme.py
	$(PY) tools/in_sync.py
	$(PY) tools/check.py

readme: $(STAMP) ## write README.md from nbs/index.ipynb
	$(PY) tools/readme.py

docs: $(STAMP) ## build the site in _docs/
	@$(PY) -c "import myst_nb, sphinx_book_theme" 2>/dev/null || $(PIP) -e ".[docs]"
	$(PY) docs/build.py

bench: $(STAMP) ## compare with quantize_static on the models in ZOO=folder
	@test -n "$(ZOO)" || { echo "bench needs a folder of models: make bench ZOO=folder"; exit 2; }
	$(PY) tools/bench.py --zoo "$(ZOO)" $(if $(OUT),--out "$(OUT)")
	$(PY) tools/bench_methods.py --zoo "$(ZOO)"
	$(PY) tools/bench_calibration.py --zoo "$(ZOO)"
	$(PY) tools/bench_overlap.py --zoo "$(ZOO)"
	$(PY) tools/bench_reports.py --zoo "$(ZOO)"
	$(PY) tools/bench_tune.py --zoo "$(ZOO)"
	$(PY) tools/bench_per_layer.py --zoo "$(ZOO)"
	$(PY) tools/bench_weights.py --zoo "$(ZOO)"
	$(PY) tools/bench_mixed.py --zoo "$(ZOO)"
	$(PY) tools/bench_dynamic.py --zoo "$(ZOO)"
	$(PY) tools/bench_targets.py --zoo "$(ZOO)"
	$(PY) tools/bench_portable.py --zoo "$(ZOO)"
	$(PY) tools/bench_large.py

bench-gpu: $(STAMP) ## bandwidth and bits of the GPU's kernels; without a GPU it says so
	@$(PY) tools/bench_gpu.py

$(STAMP): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c "import sys; v = sys.version_info; v >= (3, 10) or sys.exit('ptqlit needs \
	Python 3.10 or newer, $(PYTHON) is %d.%d: choose one with make PYTHON=...' % v[:2])"
	@echo "Installing ptqlit and its tools in $(VENV), once ..."
	@$(if $(UV),$(UV) venv -q --allow-existing --python "$$(command -v $(PYTHON))" $(VENV),\
	$(PYTHON) -m venv $(VENV))
	@$(PIP) -e ".[dev]"
	@touch $@
