# `make demo` and `make test` set everything up in .venv by themselves, and are quick when nothing has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEST_JOBS ?= 2
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test lint bench format clean setup
.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo "make demo    two photographs through ResNet-50, and a small ResNet trained on digits, fused beside plain"
	@echo "make test    the whole test suite          make lint    style of Python and C++"
	@echo "make bench   everything against the peers that are installed, and the report (an hour)"

# torch comes first and pinned: everything after it finds it there, and the build uses it.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep ^torch== constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77" wheel ninja numpy
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[demo,test,dev]"
	touch $@

setup: $(VENV)/.installed

demo: setup
	$(BIN)/python -m fused_resnet demo --out demo_out

test: setup
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

bench: setup
	$(BIN)/python -m bench all --out bench/results
	$(BIN)/python -m bench report

clean:
	rm -rf build dist *.egg-info fused_resnet/*.so $(VENV)/.installed
