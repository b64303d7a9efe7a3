# The project's commands, the same for people, hooks and CI. Every target sets up what it needs.

.DEFAULT_GOAL := help
.PHONY: help setup cluster onnx dev scm pull repro backfill reproduce test test-all check lock ui portable bench diff readme

PYTHON ?= python3
export OUTER_PATH := $(PATH)
INSTALL := PATH="$$OUTER_PATH" $(PYTHON) install.py
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MLFLOW_DISABLE_TELEMETRY := true
export LOGNAME ?= $(shell id -un 2>/dev/null || id -u)
unexport PYTHONOPTIMIZE PYTHONWARNINGS

help: ## list the targets (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv; install what the pipeline, its commands and MLflow's UI need
	@$(INSTALL)

cluster: ## add Ray: studies and sweeps over many machines
	@$(INSTALL) cluster

onnx: ## add ONNX: mnist export onnx
	@$(INSTALL) onnx

dev: ## add these and all that tests and checks need
	@$(INSTALL) dev

# DVC must be told where there is no git repository, and must not be told so where git only refuses or comes later.
scm: setup
	@said=$$(LC_ALL=C git rev-parse 2>&1 | tr -s '\n\t' ' '); case $$said in \
		*"not a git repository (or any"*|*"not found"*) [ -e .git ] || exec dvc config --quiet --local core.no_scm true ;; \
	esac; ! grep -qs no_scm .dvc/config.local || dvc config --quiet --local --unset core.no_scm; \
	[ -z "$$said" ] || echo "warning: runs get no commit, because git says: $$said" >&2

pull: scm ## fetch data, model and earlier runs from DVC's remote, if there is one
	@[ -z "$$(dvc config core.remote 2>/dev/null)" ] || dvc pull --run-cache --allow-missing || \
		echo "warning: the remote lacks some files: make repro makes them again" >&2

repro: scm ## run the pipeline: only the stages whose inputs changed
	@mnist check-params
	@trap 'echo "interrupted: make repro goes on from there" >&2; exit 130' INT; dvc repro
	@mnist backfill

backfill: export MNIST_TRACKING = required
backfill: setup ## log to MLflow a run that it missed, or whose outputs DVC restored
	mnist backfill

test: dev ## run the quick tests, on 500 digits
	pytest -m "not thorough"

test-all: dev ## run all tests, also those that need a Ray cluster, PostgreSQL, mounts, network namespaces or minutes
	pytest

check: dev ## check lint, format, types, imports, workflows, and that the lock file matches pyproject.toml
	ruff format --check
	ruff check
	mypy
	lint-imports --no-cache
	zizmor --offline --quiet --strict-collection .github
	@rm -rf .venv/lock && .ci/lock .venv/lock
	@for file in requirements*.lock; do cmp "$$file" ".venv/lock/$$file" || { \
		echo "error: $$file does not match pyproject.toml: make lock" >&2; exit 1; }; done

lock: dev ## update the lock files to the newest releases
	@rm -rf .venv/lock && .ci/lock .venv/lock --upgrade && mv .venv/lock/* .

ui: setup ## browse the runs in MLflow
	@python -c 'from mnist_pipeline.tracking.store import Store; print( \
		f"The runs: http://127.0.0.1:5000/#/experiments/{Store().experiment_id}?workflowType=machine_learning")'
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --workers 1

reproduce: setup ## train HEAD again in a temporary clone and compare byte for byte
	mnist reproduce

portable: dev ## check on emulated processors that others give the same bytes as this one (minutes)
	@command -v qemu-x86_64 >/dev/null || { [ "$$(id -u)" = 0 ] || sudo="sudo -n"; $$sudo apt-get install --quiet --yes qemu-user; } || \
		echo "warning: the package qemu-user is absent and cannot be installed: no processor is emulated" >&2
	pytest -rs tests/test_same_bits.py

bench: setup repro ## measure what training costs: reports/bench.json (minutes; PARTS="epoch_seconds floor" for a part)
	python -m benchmarks.bench $(PARTS)

diff: setup repro ## train for five epochs and compare with the last commit: reports/diff.md (minutes)
	mnist experiment specification --temp --force --name five-epochs --set-param train.epochs=5
	{ dvc params diff --md HEAD five-epochs; dvc metrics diff --md --precision 4 HEAD five-epochs; } > reports/diff.md

readme: setup ## update the figures in README.md and docs/ from the last runs
	python -m benchmarks.pages
