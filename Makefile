PYTHON ?= python3
BIN := .venv/bin

# Huge pages: XLA:CPU takes the memory of every step anew, page by page; see
# docs/lab/performance.md. Where there is no glibc it means nothing.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: train test test-all lint docs package clean

# Batch norm and Kalman Normalization side by side on the embedded digits.
train: .venv/installed
	$(BIN)/python -m train.compare --config=configs/experiments/digits.py --norms=batch,kalman_wc \
		--micro_batch_sizes=1 --workdir=runs/digits

# A quicker test of each kind; test-all runs the slow ones as well.
test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m ''

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The documents as a site in build/site; a broken link or reference is an error.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The wheel and the source distribution, as a package index would take them.
package: .venv/installed
	rm -rf build/dist
	$(BIN)/python -m build --quiet --outdir build/dist
	$(BIN)/twine check --strict build/dist/*

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv
