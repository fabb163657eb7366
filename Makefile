# Plain pip into .venv. Each set-up step leaves a stamp, so that none is done twice.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin
export ZLORA_HOME ?= $(CURDIR)/build/zlora

# What `make check-deploy` runs beside .venv, by Debian's names; apt-get is asked only where something is missing. Where
# systemd runs, Debian starts a Prometheus on port 9090 as it installs it: systemctl disable --now prometheus
DEPLOY_PROGRAMS := docker-compose prometheus kustomize chromium curl openssl wget

.PHONY: setup demo demo-model demo-model-report docs test check check-deploy soak bench clean

setup: $(VENV)/dev.stamp

$(VENV)/python.stamp:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/demo.stamp: $(VENV)/python.stamp pyproject.toml
	$(RUN)/pip install --quiet --editable '.[worker,local]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(RUN)/pip install --quiet --editable '.[worker,local,flower,dev]'
	touch $@

demo: $(VENV)/demo.stamp
	$(RUN)/zlora demo

# Draws and trains the demo model, and writes it into the package: an hour and a half on two cores. It goes on where it
# was cut off; remove build/demo-model to begin anew. ARGS=--bfloat16 where the CPU has instructions for it.
demo-model: $(VENV)/dev.stamp
	TRANSFORMERS_VERBOSITY=error PYTHONPATH=tools $(RUN)/python -P -m demo_model.training $(ARGS)

# What the shipped demo model reaches, with goals; ARGS="--prompts 50" for less.
demo-model-report: $(VENV)/dev.stamp
	TRANSFORMERS_VERBOSITY=error PYTHONPATH=tools $(RUN)/python -P -m demo_model.report $(ARGS)

# The pages of docs/reference, from the code.
docs: $(VENV)/dev.stamp
	$(RUN)/python -P tools/reference.py

check: $(VENV)/dev.stamp
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

test: check
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(RUN)/pytest

# The files of deploy/ and docker-compose.yml, checked and run as plain processes; no container engine is needed.
check-deploy: $(VENV)/dev.stamp
	for name in $(DEPLOY_PROGRAMS); do command -v $$name >/dev/null || \
	    { apt-get update -qq && apt-get install -y -qq --no-install-recommends $(DEPLOY_PROGRAMS) >/dev/null && break; } \
	    || exit 1; done
	PYTHONPATH=tests $(RUN)/python -P tests/deploy/compose_check.py
	PYTHONPATH=tests $(RUN)/python -P tests/deploy/manifests.py
	PYTHONPATH=tests $(RUN)/python -P tests/deploy/watching.py
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(RUN)/pytest -n 0 tests/deploy

# Twenty minutes of faults at random; ARGS="--minutes 5" for fewer.
soak: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONPATH=tests $(RUN)/python -P tests/faults/soak.py $(ARGS)

# make bench-<name> runs tests/benchmarks/<name>.py; make bench runs the short forms of all.
bench: ARGS = --thin
bench: bench-queue bench-lora bench-fetch bench-results bench-png bench-producer bench-scale

bench-%: $(VENV)/dev.stamp
	PYTHONPATH=tests $(RUN)/python -P tests/benchmarks/$*.py $(ARGS)

clean:
	rm -rf build dist
