PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install dev models demo serve talk test check bench vllm-test parity-parler speed-parler clean

install: $(VENV)/.core
dev: $(VENV)/.dev
models: $(VENV)/.models

$(VENV)/.core: requirements-core.txt requirements-nodeps.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-core.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-nodeps.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.core requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# Everything below runs from the virtual environment.
HOST ?= 127.0.0.1
PORT ?= 8765

demo: install
	$(BIN)/python -m benchmarks.demo

serve: install
	$(BIN)/python -m server --host $(HOST) --port $(PORT)

talk: install
	$(BIN)/python -m client.listen_and_play --host $(HOST) --port $(PORT)

test: dev check
	$(BIN)/pytest

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

bench: install
	mkdir -p out
	$(BIN)/python -m benchmarks.latency --json out/latency.json --picture out/latency.png
	$(BIN)/python -m benchmarks.load --json out/load.json --picture out/load.png

# Real models: the CPU build of torch first, so that nothing brings another.
$(VENV)/.models: $(VENV)/.core requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# vLLM's engines are tested for real in an environment of their own, on a CPU.
vllm-test: .venv-vllm/.ready
	VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python -m pytest tests/models/test_vllm_engine.py \
		tests/handlers/test_vllm_lm.py

.venv-vllm/.ready: requirements-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet torch==2.13.0
	.venv-vllm/bin/pip install --quiet -r requirements-vllm.txt
	.venv-vllm/bin/pip uninstall --quiet -y torchvision torchaudio torchcodec
	@touch $@

# Our Parler against the package, which wants an older transformers.
parity-parler: models .venv-parler/.ready
	$(BIN)/python -m tests.parity.parler --reference_python .venv-parler/bin/python

# How fast it streams beside the package's streamer: about two minutes of one core.
speed-parler: models .venv-parler/.ready
	$(BIN)/python -m tests.parity.parler_speed --reference_python .venv-parler/bin/python

.venv-parler/.ready: requirements-parler.txt
	$(PYTHON) -m venv .venv-parler
	.venv-parler/bin/pip install --quiet torch==2.13.0
	.venv-parler/bin/pip install --quiet -r requirements-parler.txt
	rm -f .venv-parler/lib/python3*/site-packages/torchaudio/lib/*.so
	@touch $@

clean:
	rm -rf $(VENV) .venv-vllm .venv-parler out .pytest_cache .mypy_cache .ruff_cache .hypothesis
