# Every target does its own set-up on the first call, in .venv; PYTHON=python3.12 picks another Python.

PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready
TORCH := $(shell grep '^torch==' constraints.txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: train test test-slow doctest coverage fuzz lint results notebooks bench setup clean

# Goes on with the run that is there, if there is one.
train: $(READY)
	$(PY) bin/svi-train --model lavae --data multi-dsprites --resume

test: $(READY)
	$(PY) -m pytest

test-slow: $(READY)
	$(PY) -m pytest -m slow

# The examples in docstrings alone; make test runs them too.
doctest: $(READY)
	$(PY) -m pytest pyro_scenes

# Fails below 95%; COVERAGE.md lists the lines that no test reaches.
coverage: $(READY)
	$(PY) -m coverage erase
	$(PY) -m coverage run -m pytest
	$(PY) -m coverage combine --quiet
	{ echo '# What the tests do not reach'; echo; echo 'Written by `make coverage`.'; echo; \
		$(PY) -m coverage report --format=markdown --show-missing --skip-covered; } > COVERAGE.md
	@tail -n 1 COVERAGE.md

# A million damaged files, in an hour or so on one core; see the file for what else it does.
fuzz: $(READY)
	$(PY) tests/fuzz.py --inputs 1000000

lint: $(READY)
	$(PY) -m flake8 pyro_scenes tests bin/*
	$(PY) -m isort --check-only --diff pyro_scenes tests bin/*
	$(PY) -m mypy

# Goes on where it was interrupted.
results: $(READY)
	$(PY) bin/svi-eval --suite --readme README.md

# Runs all and keeps their outputs. Two of them need MNIST, see the README.
notebooks: $(READY)
	$(PY) notebooks/execute.py notebooks/*.ipynb

bench: $(READY)
	$(PY) bin/svi-bench

setup: $(READY)

# Runs are kept.
clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .coverage .coverage.*
	find bin pyro_scenes tests -name __pycache__ -prune -exec rm -rf {} +

# On Linux, PyPI's torch brings gigabytes of CUDA libraries with it. Where there is no NVIDIA GPU
# the CPU build comes first; where its index cannot be reached, PyPI's is taken after all.
$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Error: pyro_scenes needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..." >&2; \
		exit 2; }
	$(PYTHON) -m venv .venv
	@if [ "$$(uname -s)" = Linux ] && ! nvidia-smi > /dev/null 2>&1; then \
		echo "No NVIDIA GPU found: installing the CPU build of $(TORCH)"; \
		$(PY) -m pip install $(TORCH) --index-url $(CPU_INDEX) --timeout 10 --retries 1 \
		|| echo "$(CPU_INDEX) cannot be reached: taking $(TORCH) from pip's default index"; fi
	$(PY) -m pip install -c constraints.txt -e '.[test]'
	@touch $@
