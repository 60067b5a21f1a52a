# Every command runs in .venv, which the first one makes.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TORCH = torch==2.13.0

# Benchmark data, where it lies beside the checkout; the demo and some tests use it.
ifeq ($(origin DATASHUNT_DATA_DIR), undefined)
ifneq ($(wildcard ../shared/data),)
export DATASHUNT_DATA_DIR := $(abspath ../shared/data)
endif
endif

.PHONY: install demo test test-core coverage test-slow test-gpu test-lowest test-newest fuzz fuzz-guided audit licences sbom docs cookbook dist lint format typecheck bench clean

install: $(VENV)/.installed

# torch first and by exact version: a range would pull the newest build with its GPU packages.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --group dev --editable '.[all]'
	touch $@

demo: install
	$(BIN)/datashunt demo $(ARGS)

test: lint typecheck
	$(BIN)/pytest -m "not slow and not gpu" $(ARGS)

# The inner loop, under a minute: no torch, no subprocess, no database (tests/support/core.py holds that).
CORE = tests/test_prediction.py tests/test_inputs.py tests/test_reading.py tests/evaluation tests/policies \
	tests/calibration/test_calibration.py tests/large_models/test_circuit_breaker.py tests/large_models/test_label_parser.py \
	tests/large_models/test_prompt_pruning.py tests/large_models/test_retry.py tests/privacy/test_privacy.py \
	tests/privacy/test_guards_elsewhere.py tests/routing/test_shunt.py tests/routing/test_shunt_batch.py \
	tests/routing/test_shunt_tracing.py tests/routing/test_label_router.py tests/routing/test_subtasks.py \
	tests/chat/test_chat_model.py tests/chat/test_chat_model_standard.py

test-core: install
	$(BIN)/pytest -q -p tests.support.core -m "not heavy and not slow and not gpu" $(CORE) $(ARGS)

# The same tests, traced, which takes half as long again; fails below 90%.
coverage: install
	$(BIN)/pytest --cov --cov-report=term -m "not slow and not gpu" $(ARGS)

test-slow: install
	$(BIN)/pytest -m slow $(ARGS)

test-gpu: install
	$(BIN)/pytest -m gpu $(ARGS)

# The oldest versions that the package admits, and the newest there are; each in an environment of its own.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --upgrade 'pip>=25.1' uv
	.venv-lowest/bin/pip install --quiet $(TORCH)
	echo '$(TORCH)' > .venv-lowest/overrides.txt
	.venv-lowest/bin/uv pip compile --quiet pyproject.toml --extra all --group dev --resolution lowest-direct \
		--override .venv-lowest/overrides.txt --python .venv-lowest/bin/python -o .venv-lowest/lowest.txt
	.venv-lowest/bin/pip install --quiet --requirement .venv-lowest/lowest.txt
	.venv-lowest/bin/pip install --quiet --no-deps --editable .
	.venv-lowest/bin/pytest -m "not slow and not gpu" $(ARGS)

test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade 'pip>=25.1'
	.venv-newest/bin/pip install --quiet $(TORCH)
	.venv-newest/bin/pip install --quiet --upgrade --group dev --editable '.[all]'
	.venv-newest/bin/pytest -m "not slow and not gpu" $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m tests.support.prose

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: install
	$(BIN)/mypy

# Many more examples of the property tests than `make test` takes.
fuzz: install
	DATASHUNT_FUZZ_EXAMPLES=2000 $(BIN)/pytest --timeout 1800 tests/test_fuzz.py tests/privacy/test_privacy.py $(ARGS)

# Coverage-guided fuzzing of what reads other people's bytes, a minute for each target; SECONDS=600 for longer.
fuzz-guided: install
	$(BIN)/pip install --quiet --group audit
	$(BIN)/python -m tests.support.guided_fuzzing --seconds $(or $(SECONDS),60) $(ARGS)

# Known weaknesses of what is installed (asks pypi.org), the licences of all of it, and a list of it (SBOM, CycloneDX).
audit: install
	$(BIN)/pip install --quiet --group audit
	$(BIN)/pip-audit --progress-spinner off --skip-editable $(ARGS)

licences: install
	$(BIN)/python -m tests.support.licences

sbom: install
	$(BIN)/pip install --quiet --group audit
	mkdir -p dist
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON -o dist/sbom.json $(BIN)/python

bench: install
	mkdir -p benchmark-output
	$(BIN)/python -m tests.benchmarks.speed --json benchmark-output/speed.json --markdown benchmark-output/speed.md $(ARGS)
	$(BIN)/python -m tests.benchmarks.overhead --json benchmark-output/overhead.json

# The site, into site/; a link or an anchor that leads nowhere is an error.
docs: install
	$(BIN)/pip install --quiet --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Every notebook from its first cell to its last; ARGS=--overwrite writes the outputs down anew.
cookbook: install
	$(BIN)/pip install --quiet --group cookbook
	$(BIN)/pytest --nbmake --nbmake-timeout=600 --force-enable-socket cookbook $(ARGS)

# sdist and wheel, looked at, installed into a fresh environment, and asked a question.
dist: install
	$(BIN)/pip install --quiet --group dist
	rm -f dist/*.whl dist/*.tar.gz
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*.whl dist/*.tar.gz
	$(BIN)/python -m tests.support.wheel dist/*.whl dist/*.tar.gz
	rm -rf .venv-dist && $(PYTHON) -m venv .venv-dist
	.venv-dist/bin/pip install --quiet $(TORCH)
	.venv-dist/bin/pip install --quiet --constraint constraints.txt "$$(ls dist/*.whl)[minilm,cli,store]"
	cd dist && ../.venv-dist/bin/datashunt --version && ../.venv-dist/bin/python ../tests/support/smoke.py
	rm -rf .venv-dist

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest .venv-dist dist build site .coverage .mypy_cache .ruff_cache .pytest_cache demo-output benchmark-output
