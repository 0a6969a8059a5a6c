# Two commands do all the set-up they need: `make quickstart` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# ninja must be on the PATH: DeepSpeed builds its CPU communication op at first use.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# An import of the trainer costs 12 seconds of a core where every process compiles its sources, 5
# where it finds them compiled: those of packages by `install`, ours by the first process.
unexport PYTHONDONTWRITEBYTECODE
# Built once per checkout, next to the environment that built it.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions

.PHONY: quickstart test test-faults test-slurm lint install clean

install: $(STAMP)

$(STAMP): setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or pass PYTHON=/path/to/python3.11" >&2; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || { echo "error: no C++ compiler: $${CXX:-g++} not found; DeepSpeed builds one small op with it (Debian: apt-get install g++)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^uv==' constraints.txt)"
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(STAMP)
	$(BIN)/python -m tools.quickstart

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Two test files side by side; a file stays in one process, which trains once for all its tests.
# The order is that of tests/conftest.py: a long file that began last would leave a core idle.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		-m "not faults and not slurm"

# Killed, hung, starved and signalled training; at most 25 minutes on 2 cores.
test-faults: $(STAMP)
	$(BIN)/python -m pytest -m faults

# launch/ on a private Slurm of two nodes; needs root, slurm-wlm and munge; at most 25 minutes.
test-slurm: $(STAMP)
	$(BIN)/python -m pytest -m slurm

clean:
	rm -rf runs .cache
