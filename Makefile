CONFIG = configs/quickstart.py
RUN    = runs/quickstart
EXTRAS = dev
ARGS   =
TESTS  = not exhaustive and not reliability

PYTHON  = .venv/bin/python
INSTALL = @./venv.sh .venv -e '.[$(EXTRAS)]'
# The TPU compiler, for tests. In an environment, JAX would look for TPUs with it.
LIBTPU  = @test -e .libtpu/libtpu/libtpu.so \
	|| $(PYTHON) -m pip install -qq --retries=1 --no-deps --target=.libtpu libtpu==0.0.52 \
	|| echo "libtpu could not be installed: the tests that compile for TPUs are skipped."
.PHONY: help train test test-all test-oldest test-reliability test-gpu lint clean

help:
	@echo "make train         trains $(CONFIG) in $(RUN), or continues it"
	@echo "make test          runs the tests"
	@echo "make test-all      runs more cases of kernels, schedules and sweeps too"
	@echo "make test-oldest   runs them with the oldest JAX that is supported"
	@echo "make test-reliability ends, damages and fuzzes training jobs, for an hour"
	@echo "make test-gpu      runs those that need a Hopper GPU, with EXTRAS=dev,cuda"
	@echo "make lint          checks style and formatting"
	@echo "make clean         removes environments and caches, not data/ and runs/"
	@echo
	@echo "Each installs what it needs into .venv the first time. Variables:"
	@echo "  CONFIG=$(CONFIG) RUN=$(RUN)"
	@echo "  EXTRAS=$(EXTRAS)          add cuda, tpu or gcs: EXTRAS=dev,cuda"
	@echo "  ARGS=                further arguments: ARGS=--config.run.steps=100"

train:
	$(INSTALL)
	@$(PYTHON) experiments/train.py --config=$(CONFIG) --run=$(RUN) $(ARGS)

test:
	$(INSTALL)
	$(LIBTPU)
	@$(PYTHON) -m pytest -n 2 --dist=worksteal -m "$(TESTS)" $(ARGS)

test-all:
	@$(MAKE) --no-print-directory test TESTS=

test-oldest: PYTHON = .venv-oldest/bin/python
test-oldest:
	@./venv.sh .venv-oldest -e '.[dev]' jax==0.11.2 jaxlib==0.11.2
	$(LIBTPU)
	@$(PYTHON) -m pytest -n 2 -m "$(TESTS)" $(ARGS)

test-reliability:
	@$(MAKE) --no-print-directory test TESTS=reliability

test-gpu: EXTRAS = dev,cuda
test-gpu:
	$(INSTALL)
	@BLOCKJAX_TEST_PLATFORM=cuda $(PYTHON) -m pytest -n 8 -m gpu tests/kernels $(ARGS)

lint:
	$(INSTALL)
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .

clean:
	rm -rf .venv .venv-oldest .libtpu .jax_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
