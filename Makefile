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

# Budgets on two quiet cores: 10, 12 and 12 minutes. Tests run side by side; the longest begin first
# (tests/conftest.py). Here a file stays in one process, which trains once for all its tests.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		-m "not faults and not slurm"

# Killed, hung, starved and signalled training.
test-faults: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist load --maxschedchunk 1 -m faults

# launch/ on private Slurms of two nodes each, three of them: most of a job's time is waiting. Needs
# root, slurm-wlm and munge.
test-slurm: $(STAMP)
	$(BIN)/python -m pytest -n 3 --dist load --maxschedchunk 1 -m slurm

clean:
	rm -rf runs .cache
