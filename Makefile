# The words are the same here, in CI and in pre-commit.  Each sets up what it needs; the second time that costs nothing.
#   make run ARGS="--port 9000"      make test ARGS="-k wire -x"      make PYTHON=/path/to/python install

ARGS ?=
BIN := .venv/bin
CODE := relay tests tools examples $(wildcard clients/python benchmarks)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The tests start some thousand Pythons; where this is set, as in many containers, each of them compiles the relay again.
unexport PYTHONDONTWRITEBYTECODE

# An environment that no longer runs (its Python is gone, or this directory was moved or copied) is made anew.
ifneq ($(shell cat .venv/.made-in 2>/dev/null && $(BIN)/python -c ''),$(CURDIR))
$(shell rm -rf .venv)
endif

.DEFAULT_GOAL := help
.PHONY: help run test packages check lint floors format install cover docs fuzz soak lock clean

help: ## show these words
	@sed -n 's/^\([a-z]*\):[^#]*## /\1	/p' Makefile

run: .venv/.run ## start the relay with its own Valkey; ARGS go to `relay serve`
	@exec $(BIN)/relay serve $(ARGS)

test: .venv/.dev packages ## run every test (about 20 minutes on 2 cores); ARGS go to pytest
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

packages: # what the tests need besides
	@tools/browser.sh
	@tools/tangram.sh

check: .venv/.dev ## check format, lint, types and spelling (a minute or two)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(CODE)
	PATH="$(CURDIR)/$(BIN):$$PATH" basedpyright --verifytypes relay --ignoreexternal
	$(BIN)/codespell
	$(BIN)/lint-imports --no-cache >/dev/null || $(BIN)/lint-imports --no-cache

lint: check ## the same as check

format: .venv/.dev ## put the code in its one format, and repair what can be repaired
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .

install: .venv/.dev ## set up the development environment in .venv

floors: build/floors/.made ## run unit tests and the broker contract with the oldest dependencies allowed (3 minutes)
	PATH="$(CURDIR)/build/floors/bin:$$PATH" build/floors/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal \
		-W "ignore:The anyio.abc.BlockingPortal:DeprecationWarning" --assert=plain -p no:cacheprovider $(FLOORS_TESTS) $(ARGS)

cover: .venv/.dev packages ## run every test and say which branches none of them took
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS) || failed=$$?; \
		$(BIN)/coverage combine --quiet && $(BIN)/coverage report && exit $${failed:-0}

bench: .venv/.dev ## measure what a delivered frame costs (15 minutes); ARGS="--against REV" compares with a revision
	$(BIN)/python -m benchmarks $(ARGS)

bench-full: .venv/.dev
	$(BIN)/python -m benchmarks --full $(ARGS)

docs: .venv/.dev ## build the documentation as a site, in build/docs
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs

fuzz: .venv/.dev ## feed the decoder, the protocol and the HTTP side with nonsense, a minute each; TESTS_FUZZ_S=600 for longer
	TESTS_EXAMPLES=$${TESTS_EXAMPLES:-1000} $(BIN)/python -m pytest -q tests/unit -m hypothesis $(ARGS)
	TESTS_EXAMPLES=$${TESTS_EXAMPLES:-1000} $(BIN)/python -m pytest -n auto --maxprocesses 4 tests/integration/faults/test_frame_streams.py \
		-o faulthandler_timeout=0 $(ARGS)
	TESTS_FUZZ_S=$${TESTS_FUZZ_S:-60} $(BIN)/python -m pytest tests/integration/faults/test_fuzz.py -rP -o faulthandler_timeout=0 $(ARGS)

soak: .venv/.dev ## an hour of churn and faults; fails if memory grows by over 1 %; ARGS="--minutes 3" for less
	$(BIN)/python -m tests.soak $(ARGS)

dist: .venv/.dev ## build and check the packages that are released, in dist/; ARGS=--offline installs nothing
	$(BIN)/python tools/dist.py $(ARGS)

lock: .venv/.dev ## write the lock files anew; LOCK_ARGS=--upgrade takes the newest versions
	tools/lock.sh

clean: ## remove all that make and the tools made
	rm -rf .venv build dist htmlcov .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf tests/js/node_modules examples/node-plugin/node_modules
	rm -f relay/transports/speedups.abi3.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Two environments in one: `make run` needs the extra `standard`, a third of what `make test` needs, and the second
# includes the first.
BUILT_FROM := pyproject.toml hatch_build.py relay/transports/speedups.c
PIP_INSTALL := $(BIN)/python -m pip install --quiet

.venv/.made-in:
	@tools/venv.sh .venv
	@printf '%s\n' '$(CURDIR)' > $@

.venv/.run: .venv/.made-in requirements.lock $(BUILT_FROM)
	@echo "installing the relay's packages in .venv: 120 MB, a minute"
	$(PIP_INSTALL) --require-hashes -r requirements.lock
	$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

.venv/.dev: .venv/.made-in requirements.lock requirements-dev.lock $(BUILT_FROM)
	@echo "installing the development packages in .venv: 750 MB, two minutes"
	$(PIP_INSTALL) --require-hashes -r requirements-dev.lock
	$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch .venv/.run $@

# The oldest versions that pyproject.toml allows; the oldest Starlette uses a name of anyio that later ones have moved.
# The layout is left out: it does not depend on them.
FLOORS_TESTS = $(filter-out tests/unit/test_house.py, $(shell find tests/unit -name 'test_*.py')) tests/integration/test_brokers.py

build/floors/.made: requirements-floors.lock $(BUILT_FROM)
	@tools/venv.sh build/floors
	build/floors/bin/python -m pip install --quiet --require-hashes -r requirements-floors.lock
	build/floors/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@
