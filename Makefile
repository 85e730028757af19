# Everything here runs on a machine with no GPU; nothing is installed outside $(VENV).
#   make train                                   install, then: nemo-fp8 train fp8_recipe=mxfp8
#   make train ARGS="fp8_recipe=blockwise training.steps=200"
#   make test                                    the test suite
#   make test-slurm                              launching, on a real SLURM of two nodes on this machine
#   make test-browser                            the HTML report in Chromium
#   make test-loops                              Lightning's and Accelerate's loops around Transformer Engine
#   make test-megatron-lm MEGATRON_LM=PATH       a checkout of Megatron-LM: its parser, its pretrain_gpt.py
#   make test-conformance TE_TESTS=PATH          Transformer Engine's own tests; PATH: tests/pytorch of its source
#   make train-nemo / make test-nemo             NeMo 2's trainer, in an environment of its own ($(VENV_NEMO))
#   make train-bridge / make test-bridge         Megatron-Bridge's trainer, likewise ($(VENV_BRIDGE))
#   make test-presets                            presets and models against NeMo's and Bridge's own sources
#   make test-preflight                          preflight against the real stack on hundreds of random jobs
#   make test-te-versions                        the emulated binding under the older Transformer Engines it knows
#   make test-python-3.12                        the suite under Python 3.12 and a CUDA build of PyTorch ($(VENV_3_12))
#   make lint                                    ruff, mypy and the documentation check

PYTHON ?= python3
VENV ?= .venv
VENV_NEMO ?= .venv-nemo
VENV_BRIDGE ?= .venv-bridge
VENV_3_12 ?= .venv-3.12
# KB that installing it takes, packages as they are downloaded and unpacked.
ROOM_3_12 ?= 8000000
# Megatron-Bridge 0.3.1 and its Megatron-Core, found before the newer ones.
BRIDGE_0_3 = $(abspath $(VENV_BRIDGE))/bridge-0.3
CONFORMANCE = $(abspath $(VENV))/conformance
ARGS ?=
PYTEST_WORKERS ?= 2
# More options for pip, such as where your mirror of PyTorch's CPU wheels is.
PIP_ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c requirements/cpu.txt
PIP_INSTALL_NEMO := $(VENV_NEMO)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c requirements/nemo.txt
PIP_INSTALL_3_12 := $(VENV_3_12)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c requirements/python-3.12.txt
PIP_INSTALL_BRIDGE := $(VENV_BRIDGE)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
# The recipe named in ARGS wins over the default one.
RECIPE := $(if $(filter fp8_recipe=%,$(ARGS)),,fp8_recipe=mxfp8)

.PHONY: train test test-distributed test-telemetry test-sinks test-slurm test-browser test-loops test-megatron-lm test-conformance train-nemo test-nemo train-bridge test-bridge test-presets test-preflight test-te-versions test-python-3.12 run-python-3.12 lint clean
.DELETE_ON_ERROR:

train: $(VENV)/.installed-cpu
	$(BIN)/nemo-fp8 train $(strip $(RECIPE) $(ARGS))

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile $(ARGS)

# A SLURM of its own, started and ended by the tests. SLURM comes from apt where this may install it.
test-slurm: $(VENV)/.installed-test
	@PATH="$$PATH:/usr/sbin"; command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge >/dev/null; } \
	  || echo "There is no SLURM, and it cannot be installed here: its tests will be skipped."
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/launch -m slurm $(ARGS)

# Telemetry under tensor, pipeline, data and expert parallelism: two and four processes under torchrun.
test-distributed: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/stages/distributed $(ARGS)

# Telemetry in whole training jobs: what callbacks ask for, resumed histories, every source of quantised tensors.
test-telemetry: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/stages/telemetry $(ARGS)

# Sinks on the libraries they write to: W&B (offline) and Lightning's loggers.
test-sinks: $(VENV)/.installed-test
	$(PIP_INSTALL) -e '.[cpu,test,sinks]'
	$(BIN)/python -m pytest tests/stages/sinks $(ARGS)

# The HTML report in a real browser. Chromium comes from apt where this may install it.
test-browser: $(VENV)/.installed-test
	$(PIP_INSTALL) -e '.[cpu,test,browser]'
	@command -v chromedriver >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && apt-get install -y -qq chromium chromium-driver >/dev/null; } \
	  || echo "There is no chromedriver, and it cannot be installed here: the browser tests will be skipped."
	$(BIN)/python -m pytest tests/browser $(ARGS)

test-loops: $(VENV)/.installed-test
	$(PIP_INSTALL) -e '.[cpu,test,loops]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/loops $(ARGS)

test-megatron-lm: $(VENV)/.installed-test
	$(PIP_INSTALL) -e '.[cpu,test]' pybind11
	MEGATRON_LM=$(MEGATRON_LM) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/targets/test_megatron_lm_source.py $(ARGS)

# Whole files take long: what a part of it said is kept, and used again as long as nothing changed.
test-conformance: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --upgrade \
	  --target $(CONFORMANCE) -r requirements/conformance.txt
	PYTHONPATH=$(CONFORMANCE) OMP_NUM_THREADS=1 $(BIN)/python -m nemo_fp8_recipes.emulation.conformance $(TE_TESTS) \
	  --keep $(CONFORMANCE)-outcomes --output docs/conformance.md $(ARGS)

train-nemo: $(VENV_NEMO)/.installed
	$(VENV_NEMO)/bin/nemo-fp8 train framework=nemo $(strip $(RECIPE) $(ARGS))

test-nemo: $(VENV_NEMO)/.installed
	OMP_NUM_THREADS=1 $(VENV_NEMO)/bin/python -m pytest tests/frameworks/nemo $(ARGS)

train-bridge: $(VENV_BRIDGE)/.installed
	$(VENV_BRIDGE)/bin/nemo-fp8 train framework=bridge $(strip $(RECIPE) $(ARGS))

test-bridge: $(VENV_BRIDGE)/.installed
	OMP_NUM_THREADS=1 $(VENV_BRIDGE)/bin/python -m pytest tests/frameworks/bridge tests/injection/test_grouped_operations.py $(ARGS)
	PYTHONPATH=$(BRIDGE_0_3) OMP_NUM_THREADS=1 $(VENV_BRIDGE)/bin/python -m pytest tests/frameworks/bridge/test_pretrain.py $(ARGS)

# The sources of both packages, without what they need: nothing of them is imported.
PEERS := $(VENV)/peers
test-presets: $(VENV)/.installed-test
	rm -rf $(PEERS)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --ignore-requires-python \
	  --only-binary :all: --dest $(PEERS) nemo_toolkit==2.7.3 megatron-bridge==0.6.2
	for wheel in $(PEERS)/*.whl; do $(BIN)/python -m zipfile -e $$wheel $${wheel%%-*}; done
	NEMO_FP8_PEERS_REQUIRED=1 NEMO_FP8_PEER_SOURCES=$(PEERS)/nemo_toolkit:$(PEERS)/megatron_bridge \
	  $(BIN)/python -m pytest tests/recipes/test_presets.py tests/recipes/test_published.py $(ARGS)

test-preflight: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -m preflight tests/preflight $(ARGS)

# Other releases of Transformer Engine, their Python part alone, in front of the one that is installed.
TE_VERSIONS ?= 2.11.0 2.14.1 2.17.1
test-te-versions: $(TE_VERSIONS:%=$(VENV)/te-%/.installed)
	set -e; for version in $(TE_VERSIONS); do \
	  echo "-- Transformer Engine $$version"; \
	  PYTHONPATH=$(abspath $(VENV))/te-$$version NEMO_FP8_TE_VERSION=$$version OMP_NUM_THREADS=1 \
	    $(BIN)/python -m pytest -q tests/stages/te_versions tests/emulation/binding tests/numerics/test_te_references.py \
	    tests/targets/test_transformer_engine.py tests/injection/test_extra_state.py $(ARGS); \
	done

$(VENV)/te-%/.installed: $(VENV)/.installed-test
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --no-compile \
	  --target $(@D) transformer_engine==$*
	@touch $@

# PyPI's PyTorch for this Python is a CUDA build: what people have who install it on a machine without a GPU.
PYTHON_3_12 ?= $(shell for one in python3.12 "$$HOME"/.pyenv/versions/3.12*/bin/python3.12; do \
  "$$one" -c "" 2>/dev/null && { echo "$$one"; break; }; done)
TESTS_3_12 ?= tests
test-python-3.12:
	@if [ -z "$(PYTHON_3_12)" ]; then echo "There is no Python 3.12 here: its tests are skipped."; \
	  elif [ ! -e $(VENV_3_12)/.installed ] && [ "$$(df -Pk . | awk 'END { print $$4 }')" -lt $(ROOM_3_12) ]; then \
	    echo "There is less room than $(ROOM_3_12) KB for Python 3.12 and a CUDA build: its tests are skipped."; \
	  else $(MAKE) --no-print-directory run-python-3.12 PYTHON_3_12="$(PYTHON_3_12)"; fi

run-python-3.12: $(VENV_3_12)/.installed
	OMP_NUM_THREADS=1 $(VENV_3_12)/bin/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile $(TESTS_3_12) $(ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/check.py

clean:
	rm -rf $(VENV) $(VENV_NEMO) $(VENV_BRIDGE) $(VENV_3_12) build dist .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; found $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-cpu: $(BIN)/python pyproject.toml requirements/cpu.txt
	@echo "Installing the emulated stack into $(VENV) (once) ..."
	$(PIP_INSTALL) -e '.[cpu]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed-cpu
	$(PIP_INSTALL) -e '.[cpu,test]'
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed-test
	$(PIP_INSTALL) -e '.[cpu,test,lint]'
	@touch $@

# Not compiled: 5 GB of packages of which few are imported.
$(VENV_3_12)/.installed: pyproject.toml requirements/cpu.txt requirements/python-3.12.txt
	@echo "Installing the emulated stack and PyTorch's CUDA build into $(VENV_3_12) (once, about 5 GB) ..."
	test -x $(VENV_3_12)/bin/python || $(PYTHON_3_12) -m venv $(VENV_3_12)
	$(PIP_INSTALL_3_12) --no-compile -e '.[cpu,test]'
	@touch $@

# torch comes first: asked for by NeMo's other requirements, a CUDA build of several GB would come instead.
$(VENV_NEMO)/.installed: pyproject.toml requirements/nemo.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "NeMo's lock is for Python 3.11; found $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "Installing the NeMo 2 stack into $(VENV_NEMO) (once, about 2.5 GB) ..."
	test -x $(VENV_NEMO)/bin/python || $(PYTHON) -m venv $(VENV_NEMO)
	$(PIP_INSTALL_NEMO) torch
	$(PIP_INSTALL_NEMO) -e '.[nemo]' pytest
	@touch $@

# Without resolving: Megatron-Bridge declares Python 3.12 and packages that only GPU jobs use, and runs without.
$(VENV_BRIDGE)/.installed: pyproject.toml requirements/bridge.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; found $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "Installing the Megatron-Bridge stack into $(VENV_BRIDGE) (once, about 1.3 GB) ..."
	test -x $(VENV_BRIDGE)/bin/python || $(PYTHON) -m venv $(VENV_BRIDGE)
	$(PIP_INSTALL_BRIDGE) $$(grep '^torch==' requirements/bridge.txt)
	$(PIP_INSTALL_BRIDGE) --no-deps --ignore-requires-python -r requirements/bridge.txt
	$(PIP_INSTALL_BRIDGE) --no-deps --ignore-requires-python --target $(BRIDGE_0_3) --upgrade \
	  megatron-bridge==0.3.1 megatron-core==0.16.1
	$(PIP_INSTALL_BRIDGE) --no-deps -e .
	@touch $@
