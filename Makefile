CONFIG = configs/quickstart.py
RUN    = runs/quickstart
EXTRAS = dev
ARGS   =

PYTHON  = .venv/bin/python
INSTALL = @./venv.sh .venv -e '.[$(EXTRAS)]'
.PHONY: help train test test-oldest lint clean

help:
	@echo "make train         trains $(CONFIG) in $(RUN), or continues it"
	@echo "make test          runs all tests"
	@echo "make test-oldest   runs them with the oldest JAX that is supported"
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
	@$(PYTHON) -m pytest -n 2 $(ARGS)

test-oldest:
	@./venv.sh .venv-oldest -e '.[dev]' jax==0.11.2 jaxlib==0.11.2
	@.venv-oldest/bin/python -m pytest -n 2 $(ARGS)

lint:
	$(INSTALL)
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .

clean:
	rm -rf .venv .venv-oldest .jax_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
