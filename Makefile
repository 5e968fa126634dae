# `make train` and `make test` each work as the first command on a fresh machine with python3 (3.11 or newer), pip and make.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# Tests and the embedded default run on the CPU, also where a TPU runtime is installed.
CPU := JAX_PLATFORMS=cpu
# The tests' stand-in for gcloud is compared with the real one where that is installed.
NO_GCLOUD := $(shell command -v gcloud >/dev/null || echo " and not gcloud")
STAMP := $(VENV)/.installed

.PHONY: setup train test lint types test-unit test-nightly test-notebook test-parity test-browser test-tpu-aot test-clusters \
  audit docs build clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"python3 is {v[0]}.{v[1]}; this needs 3.11 or newer: make PYTHON=/path/to/python3.12 …" if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: setup
	$(CPU) $(PY) train.py --config=configs/digits.py --workdir=runs/digits

test: setup lint types test-unit

lint: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

types: setup
	$(VENV)/bin/mypy

test-unit: setup
	@if [ -n "$(NO_GCLOUD)" ]; then echo "test: there is no gcloud here, so the flags of the tests' stand-in for it are not compared"; fi
	$(CPU) $(PY) -m pytest -n 2 --dist worksteal -m 'not nightly and not notebook and not parity and not browser and not tpu_aot and not clusters$(NO_GCLOUD)'

test-nightly: setup
	$(CPU) $(PY) -m pytest -n 2 --dist worksteal -m nightly

# Runs the notebooks from the first cell to the last.
test-notebook: setup
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(CPU) $(PY) -m pytest -m notebook

# Comparisons with other libraries; installs the extra where the registry has it, and says so where it doesn't.
test-parity: setup
	@if $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[parity]'; then \
	  $(CPU) $(PY) -m pytest -m parity; \
	else echo "test-parity: the extra 'parity' can't be installed here, so the comparisons with other libraries did not run"; fi

# Compiles the kernels for TPUs that aren't here.
test-tpu-aot: setup
	@if $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[tpu-aot]'; then \
	  $(CPU) $(PY) -m pytest -m tpu_aot; \
	else echo "test-tpu-aot: libtpu can't be installed here, so nothing was compiled for TPUs"; fi

# What SkyPilot and Kubernetes say of the files in tpu_setup; in an environment of its own, because SkyPilot is heavy, and
# without constraints.txt, because it wants an older click.
test-clusters: setup
	$(PYTHON) -m venv $(VENV)-clusters
	@if $(VENV)-clusters/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,clusters]' \
	    skypilot==0.14.1 kubernetes-validate==1.37.0; then \
	  $(CPU) $(VENV)-clusters/bin/python -m pytest -m clusters tests/tpu_setup; \
	else echo "test-clusters: the extra 'clusters' can't be installed here, so the files of tpu_setup were not validated"; fi

# The pages of runs in Chromium, the machine's or the one that `playwright install chromium` brings.
test-browser: setup
	@if $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[browser]'; then \
	  $(CPU) $(PY) -m pytest -m browser; \
	else echo "test-browser: the extra 'browser' can't be installed here, so no page was looked at"; fi

# What is known against the versions that constraints.txt pins; in an environment of its own, with nothing else in it.
audit:
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip-audit
	@$(VENV)-audit/bin/python tests/audit.py constraints.txt

# The pages of docs/ in build/docs; a warning is an error.
docs: setup
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(CPU) $(PY) -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

# Wheel and source archive in dist/, and what the wheel does where nothing else of ours is.
build:
	$(PYTHON) -m venv --clear $(VENV)-build
	$(VENV)-build/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt build setuptools
	rm -rf build/lib build/bdist.* dist
	$(VENV)-build/bin/python -m build --quiet --no-isolation --outdir dist
	$(VENV)-build/bin/python tests/archives.py dist

clean:
	rm -rf $(VENV) build dist runs data
