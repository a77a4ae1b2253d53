# The two commands of the README. Both set up .venv from pyproject.toml first; only Python and a C++ compiler are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/edgesep demo

test: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --dist loadfile

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[build,onnxruntime,openvino,tensorrt-rtx,train,test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo-bundle
