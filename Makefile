# All set-up happens inside the targets: each makes the virtual environment when it is missing or
# older than what defines it, and does nothing when it is current.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MANIFEST := dbt_sql/target/manifest.json

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long ui serve bench bench-warehouse bench-drift \
  bench-feature-store bench-quality docs lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /	/'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 …"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

$(MANIFEST): $(STAMP) $(shell find dbt_sql -name '*.sql' -o -name '*.yml' | grep -v ^dbt_sql/target/)
	$(BIN)/dbt --quiet parse --project-dir dbt_sql --profiles-dir dbt_sql

setup: $(STAMP) $(MANIFEST)  ## make the virtual environment and dbt's manifest

demo: setup  ## raw simulated events become published embeddings and a report
	$(BIN)/behavior-pipeline run

# Where the tests write: in memory if there is room, for the thousands of commits of Dagster's runs
# each wait for a disk.
IN_MEMORY = $(shell test $$(df --output=avail /dev/shm 2>/dev/null | tail -1 || echo 0) -gt 8000000 \
  2>/dev/null && echo --tmpdir=/dev/shm)

test: setup  ## run the tests, two workers, a core each
	scratch=$$(mktemp -d $(IN_MEMORY)) && trap 'rm -rf "$$scratch"' EXIT && \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --basetemp="$$scratch/tests" $(PYTEST)

test-long: setup  ## 5,000 random histories of nights against builds from nothing, a worker a core
	OMP_NUM_THREADS=1 BEHAVIOR_HISTORIES=5000 BEHAVIOR_HISTORY_SHARDS=16 \
	  $(BIN)/python -m pytest -n auto tests/properties/test_nights_equal_from_nothing.py

ui: setup  ## serve the Dagster UI and its daemon on port 3000
	$(BIN)/behavior-pipeline ui

serve: setup  ## serve features over HTTP on port 6566, of the source SOURCE=…
	$(BIN)/behavior-pipeline serve $(if $(SOURCE),--source $(SOURCE))

bench: setup  ## run the quick benchmarks; one JSON line per figure
	$(BIN)/python benchmarks/main_path.py

bench-drift: setup  ## false alarms of drift, and how soon changes are named: 20 minutes beside other work
	$(BIN)/python benchmarks/drift.py $(BENCH)

bench-warehouse: setup  ## the warehouse at 50 M and 169 M events, half an hour, 40 GB of disk
	$(BIN)/python benchmarks/warehouse.py $(BENCH)

bench-feature-store: setup  ## publish a million users beside stock Feast; half an hour, 25 GB of disk
	$(BIN)/python benchmarks/feature_store.py $(BENCH)

QUALITY ?= build/quality

bench-quality: setup  ## what the embedding is worth, on all data sets: docs/quality.md; hours without a GPU
	$(BIN)/python benchmarks/quality_prepare.py --all $(or $(BEHAVIOR_REALDATA),../shared/data) \
	  --out $(QUALITY)/data
	$(BIN)/python benchmarks/quality.py --data $(QUALITY)/data/* --out $(QUALITY)/results \
	  --table docs/quality.md $(BENCH)

docs: $(STAMP)  ## describe every model and column on one page, with their lineage
	$(BIN)/dbt --quiet docs generate --static --empty-catalog \
	  --project-dir dbt_sql --profiles-dir dbt_sql --target-path target/docs
	@echo "Open dbt_sql/target/docs/static_index.html"

lint: setup  ## types, style, seams, SQL
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/sqlfluff lint --disable-progress-bar dbt_sql/models

format: setup  ## rewrite the files as the linters want them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/sqlfluff fix --disable-progress-bar dbt_sql/models

clean:  ## remove the virtual environment and caches; data stay
	rm -rf $(VENV) build *.egg-info dbt_sql/target dbt_sql/logs .mypy_cache .ruff_cache \
	  .pytest_cache .hypothesis .import_linter_cache
