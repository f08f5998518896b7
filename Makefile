# Two commands: `make demo` and `make test`. Each makes the environment in .venv first, once.
PYTHON ?= python3
MARK ?= not slow
OUT ?= demo_output
python := .venv/bin/python

.PHONY: demo test check parity clean
demo: .venv/installed
	$(python) -m flax_vae demo --out "$(OUT)"

test: .venv/installed
	$(python) -m pytest tests parity -n 2 --dist worksteal -m "$(MARK)"

check: .venv/installed
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m pyright

parity: .venv/installed
	$(python) -m pytest parity -n 2 --dist worksteal -m "$(MARK)" --ledger parity-ledger.json
	$(python) -m parity.ledger parity-ledger.json docs/parity.md

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flax_vae needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(python) -m pip install --quiet --disable-pip-version-check -e ".[cli,torch,video,train,demo,test]" -c constraints.txt
	touch .venv/installed

clean:
	rm -rf .venv "$(OUT)"
