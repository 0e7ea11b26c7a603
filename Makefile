# make demo | test | check: each creates the environment it needs in .venv and nothing outside it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-long check env format clean

env: $(READY)

# torch goes first and pinned: a bare requirement would take a CUDA build of several gigabytes.
$(READY): pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[all]'
	$(BIN)/spiked warmup
	touch $@

demo: $(READY)
	$(BIN)/spiked demo --folder out/demo --json out/demo.json

# Four at a time, because most of the time a test waits for a stream: what only computes, niced, in two parts, beside two that keep up with a
# stream. All must pass. test-long has what takes minutes each. tests/conftest.py says what is where.
PATIENTLY := nice -n 15 $(BIN)/python -m pytest -p no:cacheprovider --durations=15
test: $(READY)
	@mkdir -p out; \
	$(PATIENTLY) -m "patient and not long" > out/test-patient.log 2>&1 & patient=$$!; \
	$(PATIENTLY) -m "offline and not long" > out/test-offline.log 2>&1 & offline=$$!; \
	$(BIN)/python -m pytest -m "beside and not long" -p no:cacheprovider --durations=15 > out/test-beside.log 2>&1 & beside=$$!; \
	$(BIN)/python -m pytest -m "not patient and not offline and not beside and not long" --durations=15; first=$$?; \
	wait $$beside; second=$$?; \
	wait $$patient; third=$$?; \
	wait $$offline; fourth=$$?; \
	cat out/test-beside.log out/test-patient.log out/test-offline.log; \
	test $$first = 0 && test $$second = 0 && test $$third = 0 && test $$fourth = 0

test-long: $(READY)
	$(BIN)/python -m pytest -m long --durations=15

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
