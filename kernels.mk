# The kernels' own targets; the Makefile includes them.

# One thread per BLAS call: OpenBLAS makes the interpreter's small matmuls an order of magnitude slower otherwise.
export OPENBLAS_NUM_THREADS ?= 1
PYTHON ?= python3
TORCH = $(shell $(PYTHON) -c 'import torch; print(torch.__version__.split("+")[0])')
KERNEL_TESTS = tests/test_kernels.py tests/test_compile.py tests/test_counts.py tests/test_choice.py

.PHONY: mutants test-oldest gpu-test

mutants: # breaks each mask, index and term of the kernels once; the tests must see it
	$(PYTHON) tests/mutants.py

test-oldest: # the kernels under the oldest Triton that is supported
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q torch==$(TORCH) triton==3.6.0 "numpy<2.4" safetensors tqdm tabulate pytest setuptools
	.venv-oldest/bin/python -m pytest -q $(KERNEL_TESTS)

gpu-test: # from an uninstalled checkout, on a machine with a card
	$(PYTHON) -m pytest -q -m gpu tests
