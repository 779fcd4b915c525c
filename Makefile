# The newcomer's commands. GNU make 3.81 and a plain sh will do; `make help` lists the targets.

VENV = .venv
BIN = $(VENV)/bin

# Which Python makes the environment: PYTHON=/path/to/python3.13, else the first of these that runs.
PYTHON =
PYTHONS = python3.13 python3.12 python3.11 python3.14 python3
# Which torch: empty for the one that suits this machine, else a requirement, as torch==2.13.0+cpu.
TORCH_SPEC =

# make run: which device (auto, cpu, cuda), which fleet file, and ONCE=1 to stop after the answer.
DEVICE = auto
FLEET =
ONCE =
# make test, make test-all: processes that share the test files. Many tests wait for processes they
# have started, so two are worth it on two cores.
JOBS = 2
# make load
USERS = 20
TIME = 60

.PHONY: help run test test-all lint load kernels clean

help:
	@echo "make run       environment, model, a fleet on this machine, a first streamed answer"
	@echo "               ONCE=1: stop after the answer; FLEET=FILE: another layout; DEVICE=cpu|cuda"
	@echo "make test      the tests: every package, at most 10 minutes on 2 cores"
	@echo "make test-all  the slow ones too"
	@echo "make lint      format, style, types, import contracts"
	@echo "make load      $(USERS) locust users for $(TIME) s against the running fleet (USERS=, TIME=)"
	@echo "make kernels   compile the CPU kernels now; an engine does it when it first starts"
	@echo "make clean     remove the environment and the caches in this folder"

run: $(VENV)/.installed
	@$(BIN)/python -m routing up --device "$(DEVICE)" $(if $(FLEET),--fleet "$(FLEET)") $(if $(filter-out 0,$(ONCE)),--once)

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow"

test-all: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

load: $(VENV)/.installed-load
	@$(BIN)/python -m loadtest run --users $(USERS) --time $(TIME)

kernels: $(VENV)/.installed
	@$(BIN)/python -m infire kernels

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	rm -rf tests/clients/js/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: a second run starts at once, and a change of what is needed installs again.
INSTALL = routing/install.py routing/preflight.py

$(VENV)/.installed: pyproject.toml $(INSTALL)
	@python=`$(FIND_PYTHON)` && "$$python" -m routing.install --venv $(VENV) --torch-spec "$(TORCH_SPEC)"
	@touch $@

$(VENV)/.installed-load: $(VENV)/.installed
	@$(BIN)/python -m routing.install --venv $(VENV) --extras load
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(BIN)/python -m routing.install --venv $(VENV) --extras edge,origin,dev
	@touch $@

FIND_PYTHON = for python in $(if $(PYTHON),"$(PYTHON)",$(PYTHONS)); do \
	"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
		>/dev/null 2>&1 && echo "$$python" && exit; \
	done; \
	echo "Missing: Python 3.11 to 3.14, on the PATH or as make PYTHON=/path/to/python3" >&2; \
	echo "    Debian, Ubuntu: sudo apt install python3 python3-venv" >&2; \
	echo "    macOS:          brew install python@3.13" >&2; \
	exit 1
