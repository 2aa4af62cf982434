# make test is what CI runs; every target sets up what it needs.
.PHONY: setup test demo demo-seg study study-more paper-costs rules bench bench-accuracy bench-accuracy-more bench-latency bench-large zoo fuzz fuzz-files kills slow lint format types layers clean
.DEFAULT_GOAL := test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

# The C library gives each large block back to the kernel and takes it anew. Where page faults are
# slow, as in some virtual machines, that can take as long as the work; bench and bench-latency stay
# as users have it.
test slow zoo fuzz study study-more bench-accuracy bench-accuracy-more: export MALLOC_MMAP_MAX_ := 0
test slow zoo fuzz study study-more bench-accuracy bench-accuracy-more: export MALLOC_TRIM_THRESHOLD_ := 8589934592
test slow zoo fuzz study study-more bench-accuracy bench-accuracy-more: export MALLOC_TOP_PAD_ := 67108864

setup: $(STAMP)

# torch comes first, alone: the versions of all that builds on it follow from it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[all,dev]'
	touch $@

test: lint types layers
	$(BIN)/python -m pytest -n 2 -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

layers: $(STAMP)
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

fuzz: $(STAMP)
	PYTHONPATH=src:tests OMP_NUM_THREADS=1 $(BIN)/python -W error -m generator

fuzz-files: $(STAMP)
	$(BIN)/python -m pytest tests/test_files.py

kills: $(STAMP)
	$(BIN)/python -m pytest tests/test_survival.py

demo: $(STAMP)
	$(BIN)/python -m cpd.cli compress recipes/demo.yaml --output out/demo --overwrite true

demo-seg: $(STAMP)
	$(BIN)/python -m cpd.cli compress recipes/demo-seg.yaml --output out/demo-seg --overwrite true

# The paper's questions at small scale, two runs at a time; stopped and started at will.
STUDIES := table4 figure5 table3 upernet-table4 upernet-figure5 digits-table4 digits-figure5 digits-table3
RUNS := $(foreach name,$(STUDIES),$(foreach seed,0 1 2,study-$(name)-$(seed)))

study: $(STAMP)
	OMP_NUM_THREADS=1 $(MAKE) -j 2 $(RUNS)
	for name in $(STUDIES); do $(BIN)/python -m cpd.cli study recipes/study/$$name.yaml || exit; done

# Three losses more, which take longer than those of the paper.
study-more: $(STAMP)
	OMP_NUM_THREADS=1 $(MAKE) -j 2 $(foreach seed,0 1 2,study-table4-more-$(seed))
	$(BIN)/python -m cpd.cli study recipes/study/table4-more.yaml

study-%: $(STAMP)
	$(BIN)/python -m cpd.cli study recipes/study/$(patsubst %-$(lastword $(subst -, ,$*)),%,$*).yaml --only.seed $(lastword $(subst -, ,$*))

# They share networks and runs with those of the losses.
$(foreach seed,0 1 2,$(eval study-figure5-$(seed): study-table4-$(seed)))
$(foreach name,figure5 table3,$(foreach seed,0 1 2,$(eval study-digits-$(name)-$(seed): study-digits-table4-$(seed))))
$(foreach name,table4 figure5,$(foreach seed,0 1 2,$(eval study-upernet-$(name)-$(seed): study-table3-$(seed))))
$(foreach seed,0 1 2,$(eval study-upernet-figure5-$(seed): study-upernet-table4-$(seed)))

# What the full-size tables cost before and after, with random weights.
paper-costs: $(STAMP)
	for name in table1 table2 table3 table4 figure5; do $(BIN)/python -m cpd.cli study recipes/paper/$$name.yaml --cost_only true --threads 1 || exit; done

rules: $(STAMP)
	$(BIN)/python tools/rules_page.py

bench: $(STAMP)
	$(BIN)/python -m bench
	$(BIN)/python -m bench.loop
	$(BIN)/python -m bench.collecting --write-docs

# Two cells at a time; stopped at any time it goes on where it was.
bench-accuracy: $(STAMP)
	PYTHONPATH=src $(BIN)/python -m bench.accuracy

bench-accuracy-more: $(STAMP)
	PYTHONPATH=src $(BIN)/python -m bench.accuracy --more

bench-latency: $(STAMP)
	PYTHONPATH=src $(BIN)/python -m bench.latency --write-docs

bench-large: $(STAMP)
	$(BIN)/python -m bench.large

$(VENV)/.zoo: $(STAMP)
	$(PIP) -e '.[zoo]'
	touch $@

zoo: $(VENV)/.zoo
	$(BIN)/python -m zoo --workers 2 --redo stale --write-docs

clean:
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
