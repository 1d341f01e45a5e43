# portkit: every target sets the environment up first (.venv; under a second when it is ready).
#
#   make PYTHON=python3.12 …     the Python for .venv (default: python3, or a 3.11-3.13 found)
#   PORTKIT_DEVICE=cpu make …    skip the search for a GPU (cpu or gpu)

MODEL ?= helium
PYTEST_ARGS ?=
LAB_ARGS ?=
IN_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: help setup lab test port lint lock clean
.DEFAULT_GOAL := help

help: ## show the targets
	@sed -n 's/^\([a-z]*\):[a-z ]*## /  make \1\t/p' Makefile | expand -t 16

setup: ## make .venv: locked packages for this machine, the Jupyter kernel, vLLM's source
	@p=$$(command -v python3 || command -v "$(PYTHON)") || { echo "set-up failed: no python3 on \
	the PATH; install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=/path/to/python" >&2; exit 1; }; \
	"$$p" requirements/install.py $(if $(PYTHON),--python "$(PYTHON)")

lab: setup ## open the workbook in JupyterLab (LAB_ARGS=…)
	$(IN_VENV) jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS) notebooks/00_choose.ipynb

test: setup ## run the tests (PYTEST_ARGS="-m 'not vllm'" for the quick ones)
	$(IN_VENV) python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

port: setup ## walk a bundled model through every step, headless (MODEL=helium)
	$(IN_VENV) portkit autopilot --model $(MODEL) --fresh

lint: setup ## check style
	$(IN_VENV) ruff check . && $(IN_VENV) ruff format --check .

# Needs uv. The locks hold one version per package for Linux and Python 3.11-3.13, and leave out
# what requirements/overrides*.txt says. PyPI has no +cpu build of torch: PyTorch's page has.
UV ?= uv
TORCH_WHEELS ?= https://download.pytorch.org/whl/cpu/torch/
COMPILE = $(UV) pip compile -q --upgrade --universal --python-version 3.11 --no-annotate --no-header

lock: ## resolve requirements/*.in again into requirements/*.txt (UV=uv)
	$(COMPILE) requirements/cpu.in -o requirements/cpu.txt --override requirements/overrides-cpu.txt \
	  --find-links $(TORCH_WHEELS) $(addprefix --no-emit-package ,torchvision torchaudio torchcodec triton)
	$(COMPILE) requirements/gpu.in -o requirements/gpu.txt --override requirements/overrides.txt \
	  $(addprefix --no-emit-package ,torchvision torchaudio torchcodec)

clean: ## remove .venv and caches; your ports stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './ports/*' -prune -exec rm -rf {} +
