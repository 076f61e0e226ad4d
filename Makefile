# Everything sets itself up from nothing: a virtual environment in .venv, with the exact versions of constraints.txt.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# One thread a process: tests run beside each other, and small models gain nothing from two.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test check docs bench clean

demo: $(VENV)/.demo  ## train, merge and compare models on real data; ends with runs/digits/report.html
	$(BIN)/lfm run digits

test: check  ## lint, types, all tests
	$(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

docs: $(VENV)/.dev  ## write docs/methods from the method files
	$(BIN)/python docs/generate.py

# All of it: make bench BENCH='--write'
BENCH ?= --sizes tiny --methods linear2,slerp,ties,dare_ties

bench: $(VENV)/.demo  ## speed of merges beside mergekit, which is installed under runs/; benchmarks/README.md
	$(BIN)/python benchmarks/merge.py $(BENCH)

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first: what depends on it would otherwise choose a build of its own.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(VENV)/.demo $@
