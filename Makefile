# Two commands: `make puzzle` runs the whole method on the quickstart parent, `make test` proves it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
SPEC ?= deployments/specs/quickstart.yaml

.PHONY: puzzle test lint lock s3 clean

puzzle: $(VENV)/.installed
	$(VENV)/bin/puzzle run $(SPEC)

test: $(VENV)/.installed lint
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# After a change of pyproject.toml: write the versions that are installed now.
lock:
	$(VENV)/bin/python -m pip freeze --exclude-editable --exclude pip --exclude setuptools | sed 's/+cpu$$//' > constraints.txt

# An S3 server on loopback to try a store in a bucket with; prints the environment to set (docs/operations.md).
s3: $(VENV)/.installed
	$(VENV)/bin/python -m tests.s3_server .puzzle/s3

clean:
	rm -rf .puzzle .pytest_cache .mypy_cache .ruff_cache
