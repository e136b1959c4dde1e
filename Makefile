# make search | test | check | bench | clean: `make help` says what each does.

PYTHON ?= python3
SPACE ?= rebuild
BIN := .venv/bin
STAMP := .venv/installed
REFERENCE := .venv/mamba-ssm

.DEFAULT_GOAL := help
.PHONY: help search test check bench clean

help:
	@echo "make search   search the hyperparameters of a space: make search SPACE=rebuild ARGS='--trials 8'"
	@echo "make test     every test that can run on this machine"
	@echo "make check    lint, format, types and the quick tests without Ray, in a few minutes"
	@echo "make bench    what the search costs beside the documented pattern of Ray Tune and Ray Train"
	@echo "make clean    remove the environment and the caches; results/ stays"

search: $(STAMP)
	$(BIN)/python launch.py --space $(SPACE) $(ARGS)

test: $(STAMP) $(REFERENCE)
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

check: $(STAMP) $(REFERENCE)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -q -n 2 --dist loadfile -m "not ray and not slow"

bench: $(STAMP)
	PYTHONPATH=. $(BIN)/python benchmarks/overhead.py $(ARGS)

# The environment, made again when the dependencies change.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed and $(PYTHON) is not: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "Setting up .venv: once, a few minutes ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# mamba-ssm's own reference, for tests/test_mamba.py and benchmarks/scan.py: its Python files, built in seconds without a
# compiler. Not among the packages, where they would pass for the kernels of the extra `gpu`. Where there is no network
# the tests go on without it, and say what they skip.
$(REFERENCE): | $(STAMP)
	@MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(BIN)/python -m pip install -qq --disable-pip-version-check \
		--retries 1 --no-build-isolation --no-deps --target $@ -c constraints.txt mamba-ssm einops || \
		echo "mamba-ssm's reference could not be installed: the tests that compare with it are skipped" >&2

clean:
	rm -rf .venv *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
