PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGE := $(VENV)/.package
INSTALLED := $(VENV)/.installed

.PHONY: install quickstart browser test test-slow test-oldest soak lint format readme docs \
	figures gpu benchmark clean

install: $(INSTALLED)

# The package, and the extra that the quickstart makes its page with. torch first and through the
# constraints file: see there.
$(PACKAGE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[report]'
	touch $@

$(INSTALLED): $(PACKAGE)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The suite runs every engine for real. DeepSpeed is not part of `dev`, since importing Transformers
# beside it makes noise; here it is the one addition to the set-up.
$(VENV)/.engines: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[deepspeed]'
	touch $@

# Pages are opened in a real browser. Where it cannot be installed, those tests are skipped and say
# why.
browser:
	@if command -v chromium >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		(apt-get update -qq && apt-get install -y -qq chromium) >/dev/null 2>&1 \
			|| echo "chromium could not be installed; tests of pages will be skipped"; \
	else echo "chromium is not installed; tests of pages will be skipped"; fi

quickstart: $(PACKAGE)
	$(BIN)/python -m pulseopt_hf.quickstart

test: $(VENV)/.engines browser
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --durations 10 $(TESTS)

test-slow: $(VENV)/.engines browser
	$(BIN)/python -m pytest -m slow --timeout 3600

# The lowest versions that pyproject.toml allows, as `tests/oldest.txt` lists them. The torch
# of that age on PyPI is a CUDA build: about 6 GB.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --constraint tests/oldest.txt --editable '.[dev]'
	.venv-oldest/bin/python -m pytest

# Kills a thousand runs and throws a million spoiled files, on two cores. Stopped, it goes on where
# it was; another commit starts anew.
soak: install
	$(BIN)/python -m tests.robustness.soak --out runs/soak-$$(git rev-parse --short HEAD)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

readme: install
	$(BIN)/python -m benchmarks.tables --write

# Into site/, which opens from disk. The extra `docs` is part of `dev`.
docs: install
	$(BIN)/mkdocs build --strict

figures: install
	$(BIN)/python -m benchmarks.figures

# All that needs a GPU, on a machine where nothing can be downloaded: $(PYTHON) has torch for CUDA,
# WHEELS is a folder with the packages it lacks, this one's among them, and DATA one as
# `benchmarks/atlas.py` reads it. What was measured before is kept in runs/gpu.
gpu:
	if [ -n "$(WHEELS)" ]; then \
		$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target build/site $(WHEELS)/*.whl; fi
	PYTHONPATH=$(CURDIR):$(CURDIR)/build/site $(PYTHON) -m pytest tests/gpu
	PYTHONPATH=$(CURDIR):$(CURDIR)/build/site $(PYTHON) -m benchmarks.gpu --data $(DATA) --write

benchmark: install
	$(BIN)/python -m benchmarks.overhead

clean:
	rm -rf $(VENV) .venv-oldest build dist runs site
