# Everything that a fresh machine needs is made here: Python 3.11 or later with its venv module, and make, are enough.
# Each target installs into a virtual environment of its own, once; the stamp inside says for which pins.

PYTHON ?= $(shell command -v python3 || command -v python)
# ~ where no HOME is set, as the tests and the command read it
export PEFT_DYNAMIC_CACHE ?= $(or $(HOME),$(shell $(PYTHON) -c "import os; print(os.path.expanduser('~'))"))/.cache/peft_dynamic
export PIP_DISABLE_PIP_VERSION_CHECK = 1

TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
ifdef PIP_FIND_LINKS # uv reads none of pip's settings
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif

.PHONY: help test test-matrix test-floor test-latest lint pytest models demo bench docs format dist release-check clean

help:
	@echo "make test    lint, type-check and test, in .venv-test"
	@echo "make test-matrix  the tests on other kernels, threads, locales, folders and orders, and fresh examples: an hour"
	@echo "make test-floor   the tests on the oldest versions that pyproject.toml takes; torch is that of constraints.txt, or TORCH=2.7.0"
	@echo "make test-latest  the tests on the newest versions; torch likewise"
	@echo "make demo    train and look at a small adapter, in .venv-demo"
	@echo "make bench   list the studies of benchmarks/; STUDY=name runs one, ARGS='--data DATA --models MODELS' is passed on"
	@echo "make docs    build the documentation site into site/; open site/index.html, or serve it with 'mkdocs serve'"
	@echo "make lint    ruff, mypy and the order of the rooms alone"
	@echo "make pytest  the tests alone; ARGS='-k name' is passed on"
	@echo "make format  let ruff mend and format the code"
	@echo "make models  fetch the models that some tests need, into $(PEFT_DYNAMIC_CACHE)"
	@echo "make dist    build the sdist and the wheel, and check what an index shows of them, into dist/"
	@echo "make release-check  TAG=v1.2.3: whether it can be released, and the wheel at work in a fresh environment"
	@echo "make clean   remove the environments, builds and caches, but no models"

.venv-test/.stamp: EXTRA := dev
.venv-demo/.stamp: EXTRA := demo
.venv-%/.stamp: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRA)]"
	@touch $@

test: lint pytest

lint: .venv-test/.stamp
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy
	.venv-test/bin/lint-imports

pytest: .venv-test/.stamp models
	.venv-test/bin/python -m pytest -n 2 $(ARGS)

test-matrix: .venv-test/.stamp models
	.venv-test/bin/python -m tests.matrix $(ARGS)

# Resolved anew each time. torch comes first and stays, as builds without CUDA have no place in every index. A warning
# is no error here: an old release of one library knows nothing of a new one of another.
test-floor: RESOLUTION := lowest-direct
test-latest: RESOLUTION := highest
test-floor test-latest: test-%:
	test -x .venv-$*/bin/uv || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet uv
	.venv-$*/bin/uv pip install --quiet --python .venv-$*/bin/python "torch==$(TORCH)"
	.venv-$*/bin/uv pip freeze --python .venv-$*/bin/python | grep ^torch== > .venv-$*/torch.txt
	.venv-$*/bin/uv pip install --quiet --python .venv-$*/bin/python --upgrade --resolution $(RESOLUTION) \
		--constraint .venv-$*/torch.txt --editable ".[test]"
	.venv-$*/bin/uv pip freeze --python .venv-$*/bin/python
	.venv-$*/bin/peft-dynamic models smollm2 minilm t5
	.venv-$*/bin/python -m pytest -n 2 -W default $(ARGS)

models: .venv-test/.stamp
	.venv-test/bin/peft-dynamic models smollm2 minilm t5

demo: .venv-demo/.stamp
	OMP_WAIT_POLICY=PASSIVE .venv-demo/bin/peft-dynamic train --demo

bench: .venv-test/.stamp
	.venv-test/bin/python -m benchmarks $(STUDY) $(ARGS)

docs: .venv-test/.stamp
	.venv-test/bin/python -m mkdocs build --strict $(ARGS)

format: .venv-test/.stamp
	.venv-test/bin/ruff check --fix .
	.venv-test/bin/ruff format .

dist: .venv-test/.stamp
	rm -rf build dist
	.venv-test/bin/python -m build
	.venv-test/bin/python -m twine check --strict dist/*

release-check:
	$(PYTHON) .ci/release_check.py $(TAG)
	$(MAKE) dist
	rm -rf .venv-release
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	.venv-release/bin/peft-dynamic --version
	.venv-release/bin/python examples/plain_loop.py --output build/plain

clean:
	rm -rf .venv-test .venv-demo .venv-floor .venv-latest .venv-release build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
