# Everything that a developer types. The recipes live in scripts/, each short enough to read.

MEMBERS ?= 3

.DEFAULT_GOAL := help
.PHONY: help build demo test test-all bench chaos fuzz lint deps

help: ## Show this
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-9s %s\n", $$1, $$2 }'

deps: ## Install what is missing to build and test (Debian and Ubuntu; says what and why)
	@scripts/deps.sh

build: deps ## Build target/release/pgherd
	cargo build --locked --release -p pgherd

demo: build ## Run a whole cluster on this machine until Ctrl-C (MEMBERS=3)
	@scripts/demo.sh --members $(MEMBERS)

lint: deps ## Check format and lints
	@scripts/lint.sh

test: lint ## Lint, unit tests, then scenarios on real etcd and PostgreSQL
	@scripts/test.sh

test-all: test ## The same, then the long scenarios, documentation and its examples
	@scripts/test.sh --long
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps
	cargo test --locked --workspace --doc

bench: deps ## Measure what the proxy costs beside its rivals, and write gaps of failovers (ROUNDS=9 RUNS=3)
	@scripts/deps.sh benches
	cargo build --locked --profile dist -p pgherd
	PGHERD_BIN=$${CARGO_TARGET_DIR:-target}/dist/pgherd cargo run --locked --release -p pgherd-benches

chaos: deps ## What clients feel of each fault, on hosts of their own (needs root; CASE=name MODE=quorum RUNS=1)
	@scripts/chaos.sh

fuzz: deps ## Throw bytes at every parser, MINUTES at each, then connections at the proxy (MINUTES=1 CONNECTIONS=1000000)
	@MINUTES=$(MINUTES) CONNECTIONS=$(CONNECTIONS) scripts/fuzz.sh
