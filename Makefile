# Each target is one command that also works without make: see "Windows" in the README.
BIN := .venv/bin
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

# widget state is needed while a notebook runs, and is not stored: it is megabytes
STRIP := --ExecutePreprocessor.record_timing=False --ClearMetadataPreprocessor.enabled=True \
	--ClearMetadataPreprocessor.clear_cell_metadata=False \
	--ClearMetadataPreprocessor.preserve_nb_metadata_mask=kernelspec \
	--ClearMetadataPreprocessor.preserve_nb_metadata_mask=language_info

# a test has one thread (conftest.py): a process for each core, and the tests of one file in one process
SIDE_BY_SIDE := -n auto --dist loadfile

.PHONY: setup demo test lab notebooks bench lint clean

setup:
	python3 scripts/setup_env.py

demo: setup
	$(BIN)/elign-lab demo

# the browser tests come last, so that the output ends with pytest's own summary
test: lint
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --ignore=tests/browser
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -p tests.notebooks.plugin --nbval-lax --nbval-current-env --nbval-cell-timeout 120 -p no:cacheprovider notebooks assignments/source
	$(BIN)/python -m pytest tests/browser

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lab: setup
	$(BIN)/jupyter lab notebooks

notebooks: setup
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace $(STRIP) $(NOTEBOOKS)
	$(BIN)/python scripts/add_pictures.py $(NOTEBOOKS)
	$(BIN)/python -m tests.notebooks.sources $(NOTEBOOKS)

bench: setup
	$(BIN)/elign-lab bench denoiser --out benchmarks/results/denoiser.json

clean:
	rm -rf .venv demo build dist .pytest_cache .ruff_cache
