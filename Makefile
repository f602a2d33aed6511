# make demo   set up and run the main job on the bundled model          make test   the test suite
# make check  ruff, mypy, import-linter                                  make bench  the benchmarks that need no GPU
# make proto  the code that is generated of the .proto files

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: demo test check proto bench clean

$(BIN)/headrace: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(BIN)/headrace
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

test: $(BIN)/headrace
	$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

check: $(BIN)/headrace
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

proto: $(BIN)/headrace
	$(BIN)/python -m grpc_tools.protoc -Isrc --python_out=src --pyi_out=src --grpc_python_out=src \
		$(wildcard src/headrace/cluster/serving/rpc/*.proto)

bench: $(BIN)/headrace
	$(BIN)/python benchmarks/perplexity.py

clean:
	rm -rf $(VENV) .demo build
