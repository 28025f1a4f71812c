# Each target with a line of what it does; .ci/run calls the same ones.
PYTHON ?= python3
BIN := .venv/bin
SCRATCH ?= /tmp/ksmdist-bench
FUZZ_SECONDS ?= 600
WAITING := ray or kernel or live or producers or browser
EPOCH = $${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2> /dev/null || echo 1735689600)}

.DEFAULT_GOAL := help
.PHONY: help setup demo fuzz test lint bench soak schemas lock audit dist sbom clean

help:           ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

.venv/.done: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ksmdist needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python has no venv: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m compileall -q ksmdist
	@touch $@

setup: .venv/.done  ## .venv with the program and the test tools

demo: setup     ## three images made on the spot, scanned, counted; ksmdist-demo/report.html
	$(BIN)/ksmdist demo ksmdist-demo
	$(BIN)/ksmdist report ksmdist-demo/run --html ksmdist-demo/report.html

fuzz: setup     ## each reader of images fuzzed for ten minutes, two at a time (80 minutes); finds go to build/fuzz
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r fuzz/atheris.txt
	$(BIN)/python fuzz/readers.py list | xargs -P 2 -I TARGET nice $(BIN)/python fuzz/readers.py TARGET --seconds $(FUZZ_SECONDS)

test: setup     ## the tests, those that wait for clusters, the kernel or a browser beside the others
	@printf '%s\0' 'not ($(WAITING))' '$(WAITING)' | xargs -0 -P 2 -I MARKS $(BIN)/python -m pytest -q -m MARKS

lint: setup     ## style, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup    ## whole processes beside their peers, rates, scale (35 minutes, 17 GiB of scratch)
	$(BIN)/python benchmarks/peers.py $(SCRATCH)
	$(BIN)/python benchmarks/rates.py $(SCRATCH)
	$(BIN)/python benchmarks/scale.py $(SCRATCH)
	$(BIN)/python benchmarks/coordinator.py
	$(BIN)/python benchmarks/pairs.py
	$(BIN)/python benchmarks/report_page.py
	$(BIN)/python benchmarks/contents.py
	$(BIN)/python benchmarks/whatif.py $(SCRATCH)
	$(BIN)/python benchmarks/capture.py
	$(BIN)/python benchmarks/readers.py $(SCRATCH)
	$(BIN)/python benchmarks/confirming.py $(SCRATCH)

soak: setup     ## an hour of runs on three raylets, one or a worker of theirs killed every 20 s; build/soak/result.md
	PYTHONPATH=. RAY_AUTH_MODE=disabled $(BIN)/python benchmarks/soak.py

schemas: setup  ## render schemas/*.json and docs/tables/*.md from ksmdist/tables
	$(BIN)/python schemas/render.py

lock: setup     ## pin what pyproject.toml names, anew
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r supply/uv.txt
	$(BIN)/uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes \
	  --no-annotate --upgrade --custom-compile-command "make lock" -q -o constraints.txt
	for tool in supply/uv fuzz/atheris; do $(BIN)/uv pip compile $$tool.in --universal --python-version 3.11 \
	  --generate-hashes --no-annotate --upgrade --custom-compile-command "make lock" -q -o $$tool.txt || exit 1; done

audit: setup    ## hashes of all pins, licences, known vulnerabilities; fails where the service does not answer
	$(BIN)/python -m supply.audit $(AUDIT)

dist: setup     ## dist/: the wheel, its bill of materials (CycloneDX), SHA256SUMS; the same bytes from the same commit
	rm -rf dist && mkdir dist
	SOURCE_DATE_EPOCH=$(EPOCH) $(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w dist .
	SOURCE_DATE_EPOCH=$(EPOCH) $(BIN)/python -m supply.sbom dist

sbom: dist      ## the same: the bill of materials is of the wheel beside it

clean:          ## forget everything made here
	rm -rf .venv ksmdist-demo dist
