# Everything runs in .venv, which the first target makes. PYTHON chooses the interpreter it is made with;
# TORCH_INDEX adds an index to take torch from, such as https://download.pytorch.org/whl/cpu
# (PyPI's Linux builds of torch bring CUDA along).

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
NATIVE := CMakeLists.txt pyproject.toml $(wildcard cmake/*) $(SOURCES)

.PHONY: sample test lint format bench clean help
.DEFAULT_GOAL := help

help:
	@echo "make sample  install into $(VENV), build, and write samples.png from the bundled model"
	@echo "make test    install with the development extra, and run the tests"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make format  let ruff and clang-format rewrite the sources"
	@echo "make bench   benchmarks against transformers; writes into benchmarks/results/"
	@echo "make clean   remove builds and caches ($(VENV) stays)"

sample: $(VENV)/installed
	$(BIN)/igpt sample -n 16 --seed 0 --out samples.png --force

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy igpt_fast
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/parity.py
	$(BIN)/python benchmarks/bench_ops.py

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis samples.png
	rm -f $(VENV)/installed $(VENV)/installed-dev
	find igpt_fast tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(PIP) install -c constraints.txt scikit_build_core pybind11 cmake ninja
	touch $@

$(VENV)/installed: $(VENV)/torch $(NATIVE)
	$(PIP) install --no-build-isolation -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/torch $(NATIVE)
	$(PIP) install --no-build-isolation -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/installed
