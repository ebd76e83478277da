PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# What `make lock`, `audit` and `sbom` run, apart from what they look at.
TOOLS := .venv/tools/bin
TOOLS_INSTALLED := .venv/tools/installed
# Published clients that tests run against the server.
CLIENTS := .venv/clients/bin
CLIENTS_INSTALLED := .venv/clients/installed

# Ray, and beside it what .venv has.
CLUSTER := .venv/cluster/bin
CLUSTER_INSTALLED := .venv/cluster/installed
PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))

LOCKS := configs/locks
# From an index come only wheels whose digest stands in a lock; nothing is built but our own package.
VERIFIED := --require-hashes --only-binary :all:
# torch-cpu where pip is offered that build (a folder or an index of yours), else torch, which brings
# CUDA on Linux.
CPU_TORCH := $(shell sed -n 's/^torch==\([^ ]*\).*/\1/p' $(LOCKS)/torch-cpu.txt)
TORCH ?= $(shell $(BIN)/pip index versions torch 2>/dev/null | grep -qwF '$(CPU_TORCH)' \
	&& echo torch-cpu || echo torch)

.PHONY: help install demo serve test test-stores test-fast fuzz fuzz-api check docs pictures format bench chaos \
	clients cluster cluster-demo image lock audit sbom licences dist release-check

help:  ## lists these targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1 \2/p' $(firstword $(MAKEFILE_LIST)) | \
		while read -r target text; do printf '%-12s %s\n' "$$target" "$$text"; done

install: $(INSTALLED)  ## installs what configs/locks lists into .venv

$(BIN)/pip:
	$(PYTHON) -m venv .venv

$(INSTALLED): pyproject.toml $(wildcard $(LOCKS)/*.txt) | $(BIN)/pip
	@echo "Installing what configs/locks lists into .venv: minutes; several GB where torch brings CUDA."
	$(BIN)/pip install --quiet $(VERIFIED) --requirement $(LOCKS)/runtime.txt \
		--requirement $(LOCKS)/dev.txt --requirement $(LOCKS)/$(TORCH).txt
	$(BIN)/pip install --quiet --no-index --no-deps --no-build-isolation --editable .
	$(BIN)/pip check
	touch $@

$(TOOLS_INSTALLED): $(LOCKS)/tools.txt
	$(PYTHON) -m venv .venv/tools
	$(TOOLS)/pip install --quiet $(VERIFIED) --requirement $<
	touch $@

# The locks are complete; --no-deps keeps out what IOPaint's page does not need.
$(CLIENTS_INSTALLED): $(LOCKS)/clients.txt $(LOCKS)/iopaint.txt tests/clients/package-lock.json
	$(PYTHON) -m venv .venv/clients
	$(CLIENTS)/pip install --quiet --no-compile --no-deps $(VERIFIED) \
		--requirement $(LOCKS)/clients.txt --requirement $(LOCKS)/iopaint.txt
	npm ci --prefix tests/clients --ignore-scripts --no-audit --no-fund --loglevel=error
	touch $@

clients: $(CLIENTS_INSTALLED)  ## installs the published clients that tests run, a minute; needs npm

$(CLUSTER_INSTALLED): $(LOCKS)/cluster.txt | $(INSTALLED)
	$(PYTHON) -m venv .venv/cluster
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(PURELIB)')')" \
		>"$$($(CLUSTER)/python -c '$(PURELIB)')/beside.pth"
	$(CLUSTER)/pip install --quiet --no-deps $(VERIFIED) --requirement $<
	touch $@

cluster: $(CLUSTER_INSTALLED)  ## installs Ray for the tests of clusters, a minute

cluster-demo: $(CLUSTER_INSTALLED)  ## breaks a Ray cluster on this machine, some minutes
	$(CLUSTER)/python -m tests.cluster

image: $(INSTALLED) $(TOOLS_INSTALLED)  ## builds the image for CPUs with podman and tries it, minutes; as root
	$(TOOLS)/hadolint Dockerfile
	.ci/image

demo: $(INSTALLED)  ## makes a picture through the API, into out/demo.png
	$(BIN)/inpaint-server demo

serve: $(INSTALLED)  ## serves the built-in model on http://127.0.0.1:8000
	$(BIN)/inpaint-server serve

test: $(INSTALLED)  ## runs all tests, over half an hour on two cores
	$(BIN)/pytest

test-stores: $(INSTALLED)  ## runs the end-to-end tests on PostgreSQL and S3, minutes
	$(BIN)/python -m tests.support.shared_stores $(BIN)/pytest tests/e2e

test-fast: $(INSTALLED)  ## runs the tests that start no process, a minute and a half
	$(BIN)/pytest -m "not process and not slow and not postgres and not gpu"

fuzz: $(INSTALLED)  ## decodes 10,000 mutated pictures
	$(BIN)/python -m tests.corpora.fuzz_pictures --count 10000

check: $(INSTALLED)  ## runs ruff and mypy
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

docs: $(INSTALLED)  ## writes docs/settings.md, configs/example.toml and docs/benchmarks.md
	$(BIN)/python -m tests.support.settings_page
	$(BIN)/python -m tests.support.benchmarks_page

pictures: $(INSTALLED) $(CLIENTS_INSTALLED)  ## writes the playground's pictures in docs/; needs Chromium
	$(BIN)/python -m tests.support.playground_pictures

format: $(INSTALLED)  ## formats the code and mends what ruff can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(INSTALLED)  ## runs the benchmarks into out/bench, half an hour
	$(BIN)/python -m benchmarks.engine --out out/bench
	$(BIN)/python -m benchmarks.serving --out out/bench
	$(BIN)/python -m benchmarks.host --out out/bench
	$(BIN)/python -m benchmarks.load --out out/bench

fuzz-api: $(INSTALLED)  ## sends 5,000 generated requests
	FUZZ_EXAMPLES=5000 $(BIN)/pytest tests/e2e/test_api_fuzz.py

chaos: $(INSTALLED)  ## breaks running servers in 34 ways, twenty minutes
	$(BIN)/python -m tests.chaos --out out/chaos

# Known holes in what is locked; AUDIT=--tolerate-unreachable passes where the service does not answer.
audit: $(INSTALLED) $(TOOLS_INSTALLED)  ## looks for known holes in what is locked
	$(BIN)/python -m tests.project.supply.audit $(AUDIT)

sbom: $(INSTALLED) $(TOOLS_INSTALLED)  ## writes a CycloneDX bill of materials to out/sbom.json
	$(BIN)/python -m tests.project.supply.sbom --out out/sbom.json

licences: $(INSTALLED)  ## writes docs/licences.md
	$(BIN)/python -m tests.project.supply.licences

# What a build left behind would go into the next wheel.
dist: $(INSTALLED)  ## builds the wheel and the source distribution into dist/
	rm -rf build dist inpaint_server.egg-info
	$(BIN)/python -c "from setuptools.build_meta import build_sdist, build_wheel; \
		build_sdist('dist'); build_wheel('dist')" >/dev/null

release-check: dist sbom  ## tells what keeps this state from being a release
	$(BIN)/python -m tests.project.supply.release --dist dist --sbom out/sbom.json

# Renews the locks after a change of pyproject.toml from what has been out for AGE; pins stay as far as
# they fit. UPGRADE=--upgrade raises all, UPGRADE='--upgrade-package NAME' one; AGE='0 days' lets in a
# fix that cannot wait. torch-cpu.txt is kept by hand: its head says how.
AGE ?= 7 days
UPGRADE ?=
COMPILE := $(TOOLS)/uv pip compile --quiet --no-config --no-header --universal \
	--python-version 3.11 --generate-hashes --only-binary :all: --exclude-newer '$(AGE)' $(UPGRADE)
# Prints the entries of the second lock that the first lacks.
BEYOND := awk '/^[a-z0-9]/ { drop = $$0 in pinned } NR == FNR { pinned[$$0]; next } !drop'

lock: $(TOOLS_INSTALLED)  ## renews configs/locks after a change of pyproject.toml
	mkdir -p out
	cat $(LOCKS)/runtime.txt $(LOCKS)/torch.txt >out/runtime.txt
	$(COMPILE) pyproject.toml --output-file out/runtime.txt
	awk '/^[a-z0-9]/ { cuda = /^(torch|triton|nvidia-|cuda-)/ } cuda' out/runtime.txt >$(LOCKS)/torch.txt
	awk '/^[a-z0-9]/ { cuda = /^(torch|triton|nvidia-|cuda-)/ } !cuda' out/runtime.txt >$(LOCKS)/runtime.txt
	cat out/runtime.txt $(LOCKS)/dev.txt >out/dev.txt
	$(COMPILE) pyproject.toml --extra dev --constraint out/runtime.txt --output-file out/dev.txt
	$(BEYOND) out/runtime.txt out/dev.txt >$(LOCKS)/dev.txt
	cp $(LOCKS)/cluster.txt out/cluster.txt
	$(COMPILE) pyproject.toml --extra cluster --constraint out/runtime.txt --output-file out/cluster.txt
	$(BEYOND) out/runtime.txt out/cluster.txt >$(LOCKS)/cluster.txt
	cat $(LOCKS)/runtime.txt $(LOCKS)/torch.txt $(LOCKS)/tracing.txt >out/tracing.txt
	$(COMPILE) pyproject.toml --extra tracing --constraint out/runtime.txt --output-file out/tracing.txt
	$(BEYOND) out/runtime.txt out/tracing.txt >$(LOCKS)/tracing.txt
	cp $(LOCKS)/tools.txt out/tools.txt
	$(COMPILE) --group tools --constraint out/dev.txt --output-file out/tools.txt
	cp out/tools.txt $(LOCKS)/tools.txt
	cp $(LOCKS)/clients.txt $(LOCKS)/iopaint.txt out
	$(COMPILE) --group clients --output-file out/clients.txt
	$(COMPILE) --group iopaint --no-deps --output-file out/iopaint.txt
	cp out/clients.txt out/iopaint.txt $(LOCKS)
