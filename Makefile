# Everything a person needs: demo, test, check, bench, soak. Each works on a fresh machine with Python 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint deploy/constraints.txt

# The demo's variables.
DEVICES ?= 8
ROUNDS ?= 6
EPSILON ?= 8
OUT ?= demo-out
# How long processes are killed.
MINUTES ?= 30

.PHONY: demo test check bench soak clean

demo: $(VENV)/.server $(VENV)/.broker
	$(BIN)/fl-server demo --devices $(DEVICES) --rounds $(ROUNDS) --epsilon $(EPSILON) --out $(OUT)

test: $(VENV)/.dev $(VENV)/.broker $(VENV)/.proxy
	$(BIN)/pytest

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/codespell

bench: $(VENV)/.dev $(VENV)/.broker $(VENV)/.proxy
	$(BIN)/python -m tests.bench --out bench.json

soak: $(VENV)/.dev $(VENV)/.broker
	$(BIN)/python -m tests.bench.soak --minutes $(MINUTES) --out soak.json

clean:
	rm -rf $(VENV) demo-out bench.json soak.json

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: a resolver that sees it among others may take another build of it.
$(VENV)/.server: pyproject.toml deploy/constraints.txt | $(BIN)/python
	@echo "installing into $(VENV), once: a few minutes"
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[server]'
	@touch $@

$(VENV)/.dev: pyproject.toml deploy/constraints.txt | $(BIN)/python
	@echo "installing into $(VENV), once: a few minutes"
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.server

$(VENV)/.broker: deploy/broker/get-mosquitto.sh deploy/unpack-program.sh | $(BIN)/python
	@sh deploy/broker/get-mosquitto.sh $(VENV)/mosquitto
	@touch $@

$(VENV)/.proxy: deploy/server/get-nginx.sh deploy/unpack-program.sh | $(BIN)/python
	@if sh deploy/server/get-nginx.sh $(VENV)/nginx; then touch $@; else echo "no nginx: what needs it is skipped"; fi
