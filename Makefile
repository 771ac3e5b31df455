# make setup | test | test-slow | lint | docs | demo | bench | clean
#
# PYTHON=python3.12 make setup    makes the environment with another Python (3.10 to 3.13)
# make test ARGS="-k focal -x"    passes arguments to pytest

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# Install into the environment, also if pip's configuration says otherwise.
export PIP_USER := 0

BIN    := $(VENV)/bin
# An existing environment keeps its Python unless PYTHON names another.
CHOSEN := $(if $(filter file,$(origin PYTHON)),,--use-this-python)

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow lint format docs demo bench clean distclean

help:
	@echo "make setup      create $(VENV) with torch, detectron2 and this package (implied by the rest)"
	@echo "make demo       train on drawn shapes for some minutes and draw the detections"
	@echo "make test       the tests, except the slow ones"
	@echo "make test-slow  the slow tests"
	@echo "make lint       ruff and mypy; 'make format' rewrites the files"
	@echo "make docs       these documents and the API reference as pages: docs/_build/html/index.html"
	@echo "make bench      time and memory of the losses and of a step, compared with detectron2's"
	@echo "make clean      remove what was built; 'make distclean' removes $(VENV) too"

setup:
	@$(PYTHON) tools/setup_env.py "$(VENV)" constraints.txt $(CHOSEN)

# A process a core, each with one thread: a file's tests stay together, in the order of the folders
# (xdist would sort files by their number of tests, and a few long tests would come last).
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile \
		--no-loadscope-reorder $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m slow -o faulthandler_timeout=7200 $(ARGS)

lint: setup
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

format: setup
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

docs: setup
	$(BIN)/python -m sphinx -W -n --keep-going -q -c docs -d docs/_build/doctrees . docs/_build/html

demo: setup
	$(BIN)/python train_net.py --overwrite --config-file configs/Demo/retinanet_demo_iou_balanced.yaml
	$(BIN)/python tools/visualize_results.py --config-file configs/Demo/retinanet_demo_iou_balanced.yaml --output output/demo/pictures

bench: setup
	$(BIN)/python tools/benchmark_losses.py --output output/benchmark_losses.json $(ARGS)
	$(BIN)/python tools/benchmark_step.py --output output/benchmark_step.json

clean:
	rm -rf build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean
	rm -rf "$(VENV)"
