# The front door of the checkout. Every target sets up what it needs by itself.
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python

.PHONY: help bootstrap trixie demo test lint bench soak clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

bootstrap: ## install Debian packages that are missing and the pinned Python packages
	@tools/bootstrap

trixie: bootstrap ## unpack Debian 13's podman, skopeo and buildah into .cache/trixie
	@$(PYTHON) -m lab.trixie

demo: bootstrap ## start a real image with Podman, plainly and from the store, side by side
	@$(PYTHON) -m lab.demo

lint: bootstrap ## ruff (rules, format) and mypy --strict
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

# Three workers, for tests wait a lot; the files with the longest ones first, so that all end together.
test: lint trixie ## lint, unit tests and the tests against the real tools
	$(PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder tests/faults tests/compat tests/unit

bench: bootstrap trixie ## measure starts, pulls and conversions beside a plain pull, both Podmans and (if given) a peer
	@$(PYTHON) -m benchmarks
	@$(PYTHON) -m benchmarks.consumer
	@$(PYTHON) -m benchmarks.conversion

soak: bootstrap trixie ## half an hour of load with kills, upgrades and pulls: memory, descriptors, threads
	@$(PYTHON) -m benchmarks.soak

clean: ## remove caches and build products (.venv and .cache included)
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
