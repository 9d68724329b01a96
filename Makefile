# Everything is here: `make demo` shows the main job, `make test` runs all tests. Both set up what they need.
SHELL := /bin/sh
VENV ?= .venv
PYTHON3 ?= python3
export PYTHONUNBUFFERED := 1
bin := $(VENV)/bin
py := $(bin)/python
KEEP ?=
PYTEST_ARGS ?=
# A machine that stands still for a second is no bug of ours: a test that fails is tried once more, and said to have
# been; more than a few of these fail the run (tests/conftest.py), and what is left behind or untrue fails at once.
again := --reruns 1 --rerun-except 'left behind' --rerun-except 'untrue history'

began := $(shell date +%s)

.DEFAULT_GOAL := help
.PHONY: help demo test image e2e kind-up kind-test kind-down faults check bench crds stubs rules lock conformance setup lint unit clean

help: ## This list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.ready: pyproject.toml requirements-dev.lock
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: Python 3.11 or newer is needed, $$($(PYTHON3) --version) was found: apt-get install python3, or set PYTHON3=" >&2; exit 1; }
	@echo "==> Python packages into $(VENV)"
	@$(PYTHON3) -m venv $(VENV) || { echo "make: no venv module: apt-get install python3-venv" >&2; exit 1; }
	@$(bin)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@$(bin)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

setup: $(VENV)/.ready ## What demo and tests need: Python packages, Debian packages (asks), etcd and kube-apiserver
	@$(py) -m sandkeeper.localcluster.preflight --install
	@$(py) -m sandkeeper.localcluster.binaries

# Beside the targets, since a demo needs no containerd.
.PHONY: test-setup
test-setup: setup
	@$(py) -m sandkeeper.localcluster.binaries --tests

demo: setup ## From kubectl apply to an exit status in the object, on a real API server and a real runtime
	@KEEP=$(KEEP) $(bin)/sandkeeper demo

test: test-setup check ## All tests: unit, then against a real API server with crun and runc, then on a real kubelet
	@$(py) -m pytest tests --ignore=tests/unit --ignore=tests/e2e --ignore=tests/gitops $(again) $(PYTEST_ARGS)
	@PY=$(py) hack/short-e2e.sh $(began) $(again) $(PYTEST_ARGS)

image: $(VENV)/.ready ## The image of operator and shim, into build/sandkeeper.tar (with Docker, or as root with buildah)
	@$(py) hack/image.py

# `make test` runs a part of it (hack/short-e2e.sh).
e2e: test-setup e2e-setup ## A real Kubernetes of one node without Docker (needs root; the first time it builds kubelet)
	@SANDKEEPER_TEST_IMAGE=build/sandkeeper.tar $(py) -m pytest tests/e2e $(PYTEST_ARGS)

kind-up: $(VENV)/.ready ## Sandkeeper on a cluster of kind's with two workers (needs Docker), with this tree's image
	@$(py) hack/kind.py up

kind-test: $(VENV)/.ready ## The life of Sandboxes on it
	@$(py) hack/kind.py test $(PYTEST_ARGS)

kind-down: $(VENV)/.ready ## Removes it
	@$(py) hack/kind.py down

.PHONY: e2e-setup
e2e-setup: image
	@$(py) -m sandkeeper.localcluster.preflight --install --e2e
	@$(py) -m sandkeeper.localcluster.binaries --e2e

faults: test-setup ## Every fault at every effect, and a table of what held (an hour)
	@$(py) -m pytest tests/faults --faults=all $(PYTEST_ARGS)

conformance: setup ## Every rule of docs/contract.md against every engine and through containerd, as tables (ENGINE= for one)
	@$(py) -m tests.conformance

# Not part of `make test` yet: to build Flux's two controllers takes 6 minutes and more on 2 cores, once.
.PHONY: gitops
gitops: setup ## Sandboxes from a git repository, by Flux's own controllers (which it builds first)
	@$(py) -m sandkeeper.localcluster.gitops_sources
	@$(py) -m pytest tests/gitops $(PYTEST_ARGS)

check: $(VENV)/.ready ## All that needs no cluster: lint, types, layers, drift, unit tests
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .
	@$(bin)/mypy
	@$(bin)/lint-imports --no-timing 2>/dev/null || $(bin)/lint-imports
	@$(py) -m pytest tests/unit -q $(PYTEST_ARGS)

bench: setup ## The figures of the README, into build/bench.json and docs/images/scale.png
	@$(py) -m bench --plot docs/images/scale.png

crds: $(VENV)/.ready ## Generate crds/ and docs/reference.md from the pydantic models
	@$(py) hack/gen-api.py

stubs: $(VENV)/.ready ## Generate the gRPC stubs from wire/*.proto
	@PYTHON=$(py) hack/gen-stubs.sh

rules: $(VENV)/.ready ## Generate the conformance command's rules from docs/contract.md
	@$(py) hack/gen-rules.py

lock: ## Pin the dependencies of pyproject.toml anew
	@$(bin)/pip install --quiet uv
	@$(bin)/uv pip compile -q --upgrade --generate-hashes --no-header --no-emit-index-url --no-emit-find-links --extra dev -o requirements-dev.lock pyproject.toml
	@$(bin)/uv pip compile -q --generate-hashes --no-header --no-emit-index-url --no-emit-find-links -c requirements-dev.lock -o requirements.lock pyproject.toml
	@$(bin)/uv pip compile -q --generate-hashes --no-header --no-emit-index-url --no-emit-find-links -c requirements-dev.lock -o requirements-sbom.lock --group sbom

clean: ## Remove what was built here
	rm -rf build dist $(VENV) .mypy_cache .ruff_cache .pytest_cache
