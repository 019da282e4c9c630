PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow lint clean

demo: .venv/.installed  ## train a small ViT on digits, compress, export, verify, measure
	$(BIN)/prehab-export demo -o demo-run

# Every test runs on one thread. Each worker begins with a part of the files in a row, whose fixtures are models, and
# takes over tests from another when it has none left.
test: .venv/.installed  ## lint, types and the test suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

slow: .venv/.installed  ## the long tests
	$(BIN)/pytest -m slow

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv demo-run
