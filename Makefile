# Plain pip into .venv. Each step of the setup leaves a stamp, so that none is done twice. `make help` lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin
export ZLORA_HOME ?= $(CURDIR)/build/zlora
# Tests start some hundred processes, each of which would compile this project anew.
unexport PYTHONDONTWRITEBYTECODE

# Debian's names of the programs that `make check-deploy` runs; apt-get installs them if one is missing. With systemd,
# Debian starts Prometheus on port 9090 and Valkey on port 6379 at their installation:
# systemctl disable --now prometheus valkey-server
DEPLOY_PROGRAMS := docker-compose prometheus kustomize chromium curl openssl wget valkey-server

BENCHMARKS := bases batches busy fetch gpu http lora png previews producer queue results scale schedules starts sweeps

.PHONY: help setup demo demo-model demo-model-report docs test pytest check check-deploy compat failover model soak freezes fuzz
.PHONY: changes cycles gallery lora-matrix mixed
.PHONY: bench clean
.PHONY: $(addprefix bench-,$(BENCHMARKS))

setup: $(VENV)/dev.stamp

help:
	@echo 'make setup         install everything into .venv'
	@echo 'make demo          draw with the demo model on this machine'
	@echo 'make docs          generate docs/reference from the code'
	@echo 'make types         generate the TypeScript types of the HTTP API'
	@echo 'make check         ruff, mypy --strict, import-linter'
	@echo 'make test          check, then all tests; each test starts the services that it needs'
	@echo 'make check-deploy  check deploy/, docker-compose.yml and the page; installs programs by apt-get'
	@echo 'make compat        old clients with new workers and the reverse; OLD=<checkout with .venv>'
	@echo 'make model         every state of the protocol by which a job has one end'
	@echo 'make failover      fail-overs and other outages of Redis, five times each; prints the longest pause of each'
	@echo 'make soak          twenty minutes of random faults; ARGS="--minutes 2" for a short run'
	@echo 'make freezes       twenty minutes of workers that stand still and come back; ARGS="--minutes 3"'
	@echo 'make fuzz          2,000 mutated messages between good jobs'
	@echo 'make mixed         300 jobs that mix everything a request can say, with failures'
	@echo 'make cycles        a thousand jobs of each family with failures and signals; prints changed bits'
	@echo 'make changes       a hundred changes of the base model with failures, for each mode'
	@echo 'make gallery       draw docs/gallery.md with the demo model'
	@echo 'make lora-matrix   write docs/lora-matrix.md: what three loaders do with each spelling and kind of LoRA'
	@echo 'make bench         the short form of every benchmark'
	@echo 'make bench-<name>  one whole benchmark: $(BENCHMARKS)'
	@echo 'make bench-gpu     what only a GPU can show; says so if there is none'
	@echo 'make demo-model    train the demo model, in an hour and a half on two cores'
	@echo 'make clean         remove build/ and dist/'

$(VENV)/python.stamp:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/demo.stamp: $(VENV)/python.stamp pyproject.toml
	$(RUN)/pip install --quiet --editable '.[worker,local]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(RUN)/pip install --quiet --editable '.[worker,server,local,flower,dev]'
	touch $@

# Packages of npm that generate and compile the types of examples/typescript.
$(VENV)/node.stamp: $(VENV)/dev.stamp examples/typescript/package.json
	mkdir -p build/typescript && cp examples/typescript/package.json build/typescript
	PATH="$(CURDIR)/$(RUN):$$PATH" npm install --prefix build/typescript --silent --no-package-lock --no-audit --no-fund
	touch $@

demo: $(VENV)/demo.stamp
	$(RUN)/zlora demo

# Draws, trains and packages the demo model: an hour and a half on two cores. A second run resumes the first; remove
# build/demo-model to start again. ARGS=--bfloat16 if the CPU has instructions for bfloat16.
demo-model: $(VENV)/dev.stamp
	TRANSFORMERS_VERBOSITY=error PYTHONPATH=tools $(RUN)/python -P -m demo_model.training $(ARGS)

# Measures the shipped demo model against its goals; ARGS="--prompts 50" for a shorter run.
demo-model-report: $(VENV)/dev.stamp
	TRANSFORMERS_VERBOSITY=error PYTHONPATH=tools $(RUN)/python -P -m demo_model.report $(ARGS)

# Generates docs/reference from the code.
docs: $(VENV)/dev.stamp
	$(RUN)/python -P tools/reference.py

# Generates examples/typescript/zlora.d.ts from the OpenAPI document.
types: $(VENV)/node.stamp
	$(RUN)/zlora schema openapi > build/typescript/openapi.json
	PATH="$(CURDIR)/$(RUN):$$PATH" build/typescript/node_modules/.bin/openapi-typescript --default-non-nullable false \
	    build/typescript/openapi.json --output examples/typescript/zlora.d.ts

check: $(VENV)/dev.stamp
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

# Both at once: mypy has one thread.
test: $(VENV)/node.stamp
	$(MAKE) --no-print-directory -j 2 check pytest

pytest: $(VENV)/node.stamp
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(RUN)/pytest

# Checks deploy/ and docker-compose.yml, and runs their commands as plain processes; needs no container engine.
check-deploy: $(VENV)/dev.stamp
	for name in $(DEPLOY_PROGRAMS); do command -v $$name >/dev/null || \
	    { apt-get update -qq && apt-get install -y -qq --no-install-recommends $(DEPLOY_PROGRAMS) >/dev/null && break; } \
	    || exit 1; done
	PYTHONPATH=tests $(RUN)/python -P tests/deploy/compose_check.py
	PYTHONPATH=tests $(RUN)/python -P tests/deploy/manifests.py
	PYTHONPATH=tests $(RUN)/python -P tests/deploy/watching.py
	TLS_SERVER=$$(command -v valkey-server) OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(RUN)/pytest -n 0 \
	    tests/deploy tests/browser tests/integration/test_broker_tls.py

# Another version as client of this version's worker and as worker of its client; prints a line for each check. OLD is a
# checkout of the other version with a .venv of its own, for example: git worktree add ../old <commit>; make -C ../old setup
compat: $(VENV)/dev.stamp
	PYTHONPATH=tests $(RUN)/python -P tests/compat.py $(OLD)

# Explores tests/protocol/one_end.py in larger forms than `make test`, in a minute or two.
model: $(VENV)/dev.stamp
	PYTHONPATH=tests $(RUN)/python -P tests/protocol/model.py

# Each outage of tests/faults/test_failover.py five times, with more jobs; `make test` has a short form.
failover: $(VENV)/dev.stamp
	ZLORA_FAILOVER_ROUNDS=5 ZLORA_FAILOVER_JOBS=60 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE \
	    $(RUN)/pytest -n 0 --timeout 1200 tests/faults/test_failover.py tests/faults/test_sentinel.py

# Random faults for twenty minutes; ARGS="--minutes 2" for a short run.
soak: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONPATH=tests $(RUN)/python -P tests/faults/soak.py $(ARGS)

# Workers that stand still and come back, for twenty minutes; ARGS="--minutes 3" for a short run.
freezes: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONPATH=tests $(RUN)/python -P tests/faults/freezes.py $(ARGS)

# 300 jobs that mix everything a request can say, with failures, on the tests' tiny model; `make test` has a short form.
mixed: $(VENV)/dev.stamp
	ZLORA_MIXED_JOBS=300 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(RUN)/pytest -n 0 tests/unit/worker/test_mixed_jobs.py

# A thousand jobs of each family with LoRAs of all kinds, failures and signals, half of them in each mode of the patch;
# prints how many bits of the base model have changed. `make test` has a short form.
cycles: $(VENV)/dev.stamp
	ZLORA_CYCLES=500 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(RUN)/pytest -n 0 --timeout 1800 \
	    tests/unit/worker/test_cycles.py

# A hundred changes of the base model with LoRAs, failures and signals, for each mode of the patch, and fewer
# of bases that are read from disk; prints how many bits were wrong.
changes: $(VENV)/dev.stamp
	ZLORA_BASE_CHANGES=100 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(RUN)/pytest -n 0 --timeout 600 \
	    tests/unit/worker/test_bases.py

# Draws docs/gallery.md: a sheet of images for each feature, with the demo model, in a minute.
gallery: $(VENV)/dev.stamp
	$(RUN)/python -P tools/gallery.py

# Writes docs/lora-matrix.md: every spelling and kind of LoRA in this project, diffusers and PEFT, in ten minutes.
lora-matrix: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONPATH=tests:tools $(RUN)/python -P tests/benchmarks/lora_matrix.py

# 2,000 mutated messages between good jobs: worker and child live, every good job is drawn. `make test` has a short form.
fuzz: $(VENV)/dev.stamp
	ZLORA_FUZZ_MESSAGES=2000 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(RUN)/pytest -n 0 --timeout 1200 tests/faults/test_fuzz.py

# The short form of every benchmark, at most a minute or two each. The whole one: make bench-<name>; its other options:
# make bench-<name> ARGS=--help. Tables are printed, and build/bench/<name>.json is written.
bench: ARGS = --thin
bench: $(addprefix bench-,$(BENCHMARKS))

$(addprefix bench-,$(BENCHMARKS)): bench-%: $(VENV)/dev.stamp
	PYTHONPATH=tests:tools $(RUN)/python -P tests/benchmarks/$*.py $(ARGS)

clean:
	rm -rf build dist
