PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: install demo serve test fuzz fuzz-api check format bench chaos

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/inpaint-server demo

serve: $(INSTALLED)
	$(BIN)/inpaint-server serve

test: $(INSTALLED)
	$(BIN)/pytest

fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz_pictures --count 10000

check: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.engine --out out/bench
	$(BIN)/python -m benchmarks.serving --out out/bench
	$(BIN)/python -m benchmarks.host --out out/bench
	$(BIN)/python -m benchmarks.load --out out/bench

fuzz-api: $(INSTALLED)
	FUZZ_EXAMPLES=5000 $(BIN)/pytest tests/test_api_fuzz.py

chaos: $(INSTALLED)
	$(BIN)/python -m tests.chaos --out out/chaos
