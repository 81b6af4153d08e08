# `make` sets up the environment and renders (or measures, where there is a GPU); `make test` runs every CPU test.
# PYTHON names the Python 3.11 or 3.12 to use; LOCK=base|cpu|cuda says which lock is installed; ARGS go to Snakemake,
# PYTEST to pytest.

VENV := .venv
LOCK := auto
CORES := 1
PYTHON := $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
SETUP = $(if $(PYTHON),,$(error Python 3.11 or 3.12 is needed and not on PATH (on Debian 12: apt-get install python3 \
	python3-venv); or name one: make PYTHON=/path/to/python3.11))PYTHONPATH=profiling $(PYTHON) -m \
	attn_profiling.environment --venv $(VENV) --lock $(LOCK)
SNAKEMAKE = $(VENV)/bin/snakemake --cores $(CORES) --workflow-profile config/profiles/default

.PHONY: all results measure verify container promote keep test lint lock readme clean
.DEFAULT_GOAL := all

all:
	@$(SETUP) --tex need
	$(SNAKEMAKE) $(ARGS)

results:
	@$(SETUP)
	$(SNAKEMAKE) results $(ARGS)

measure:
	@$(SETUP)
	$(SNAKEMAKE) measure --config tier=measure $(if $(RUN),run=$(RUN)) $(ARGS)

verify promote keep: RUN_GIVEN = $(if $(RUN),,$(error name the run: make $@ RUN=<id>, a folder of runs/))
verify:
	@$(RUN_GIVEN)$(SETUP)
	$(SNAKEMAKE) verify --config run=$(RUN) $(ARGS)

promote:
	@$(RUN_GIVEN)$(SETUP)
	$(VENV)/bin/attn-profiling promote --run runs/$(RUN) $(ARGS)

keep:
	@$(RUN_GIVEN)$(SETUP)
	$(VENV)/bin/attn-profiling keep --run runs/$(RUN)

container:
	@$(SETUP)
	$(SNAKEMAKE) container $(ARGS)

test:
	@$(SETUP) --without-gpu cpu --tex try
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(PYTEST)

lint:
	@$(SETUP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/snakefmt --check Snakefile profiling paper
	$(VENV)/bin/mypy

# The CPU lock needs a place that has torch's CPU wheels: UV_FIND_LINKS=folder or UV_INDEX=address.
lock:
	cd requirements && for name in base cpu cuda; do uv pip compile --quiet --generate-hashes --universal \
		--python-version 3.11 --fork-strategy fewest --no-annotate --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make lock" $$name.in -o $$name.txt || exit; done

# The headline table of the README, from the recorded run.
readme: results
	$(VENV)/bin/python -m paper.tables readme --write

clean:
	rm -rf results paper/generated .snakemake
