# The project's commands, the same for people, hooks and CI. Every target sets up what it needs.

.DEFAULT_GOAL := help
.PHONY: help setup pull repro backfill reproduce test test-all check lock ui bench diff readme

PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MLFLOW_DISABLE_TELEMETRY := true

COMPILE := uv pip compile --quiet --universal --python-version 3.11 --extra cluster --group dev --generate-hashes \
	--no-emit-index-url --no-annotate --custom-compile-command "make lock" pyproject.toml --output-file

help: ## list the targets (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

setup: .venv/installed ## make .venv and install what the lock file names

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed, $(PYTHON) is %d.%d: make PYTHON=…" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@mkdir -p .venv; ln -s $$PPID .venv/lock 2>/dev/null || { maker=$$(readlink .venv/lock); \
		if kill -0 "$$maker" 2>/dev/null; then echo "error: make (PID $$maker) is setting up .venv: wait for it" >&2; exit 1; fi; \
		ln -sf $$PPID .venv/lock; }
	$(PYTHON) -m venv .venv
	pip install --quiet --require-hashes --requirement requirements.lock
	pip install --quiet --no-index --no-deps --no-build-isolation --editable .
	@rm .venv/lock; touch $@

pull: setup ## fetch data, model and earlier runs from DVC's remote, if there is one
	@[ -z "$$(dvc config core.remote 2>/dev/null)" ] || dvc pull --run-cache --allow-missing || \
		echo "warning: the remote lacks some files: make repro makes them again" >&2

repro: setup ## run the pipeline: only the stages whose inputs changed
	@git rev-parse --git-dir >/dev/null 2>&1 || dvc config --quiet --local core.no_scm true
	@mnist check-params
	dvc repro
	@[ -z "$$MLFLOW_TRACKING_URI" ] && [ mlflow.db -nt dvc.lock ] || mnist backfill

backfill: export MNIST_TRACKING = required
backfill: setup ## log to MLflow a run that it missed, or whose outputs DVC restored
	mnist backfill

test: setup ## run the quick tests, on 500 digits
	pytest -m "not thorough"

test-all: setup ## run all tests, also those that need a Ray cluster, PostgreSQL, mounts, network namespaces or minutes
	pytest

check: setup ## check lint, format, types, imports, workflows, and that the lock file matches pyproject.toml
	ruff format --check
	ruff check
	mypy
	lint-imports --no-cache
	zizmor --offline --quiet --strict-collection .github
	@cp requirements.lock .venv/requirements.lock && $(COMPILE) .venv/requirements.lock
	@cmp requirements.lock .venv/requirements.lock || { echo "error: requirements.lock does not match pyproject.toml: make lock" >&2; exit 1; }

lock: setup ## update the lock file to the newest releases
	$(COMPILE) requirements.lock --upgrade

ui: setup ## browse the runs in MLflow
	mlflow ui

reproduce: setup ## train HEAD again in a temporary clone and compare byte for byte
	mnist reproduce

bench: setup repro ## measure what training costs: reports/bench.json (minutes; PARTS="epoch_seconds floor" for a part)
	python -m benchmarks.bench $(PARTS)

diff: setup repro ## train for five epochs and compare with the last commit: reports/diff.md (minutes)
	dvc exp run --temp --force --name five-epochs --set-param train.epochs=5
	{ dvc params diff --md HEAD five-epochs; dvc metrics diff --md --precision 4 HEAD five-epochs; } > reports/diff.md

readme: setup ## update the figures in README.md and docs/ from the last runs
	python -m benchmarks.pages
