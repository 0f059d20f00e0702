# make demo   set everything up and run the embedded study into runs/demo
# make test   set everything up and run ruff, mypy and pytest on all cores; 15 minutes on two
# make study  five methods in every variant with its controls, three seeds, into runs/study, and
#             every method and edit, into runs/comparison, what hides, into runs/hiding, and one seed
#             of relearned copies, into runs/copies; from there docs/study.md, docs/comparison.md,
#             docs/hiding.md and docs/copies.md with their pictures; hours on two cores, cut short at
#             will: make study ARGS=--resume goes on
# make edu_relat DATA=DIR
#             the study of the family whose data are in DIR, into runs/edu_relat, and from there
#             docs/edu_relat.md; five minutes on two cores
# make docs   the site, into build/docs/html; executes the gallery and the notebooks, three minutes
# make stress a writer killed, and a training of every kind interrupted, more than two hundred times
# make fuzz   ten thousand run files damaged, each to be read right or refused; five minutes
# make bench  what recording costs, in ratios, into runs/bench.json, and from there docs/costs.md, the
#             figures of README and what geffect estimate knows; fifteen minutes on an idle machine

PYTHON ?= python3
VENV := .venv
# Tests take seconds to compile, in every process: what is compiled is kept.
export PYTHONDONTWRITEBYTECODE :=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo study edu_relat test types suite docs stress fuzz bench clean

demo: $(VENV)/installed
	$(BIN)/geffect demo $(ARGS)

study: $(VENV)/installed
	$(BIN)/geffect demo --out runs/study --seeds 0,1,2 --all-variants --controls --audit $(ARGS)
	cp runs/study/study.md docs/study.md
	cp runs/study/figures/tradeoff.png docs/images/tradeoff.png
	$(BIN)/geffect demo --out runs/comparison --seeds 0,1,2 --methods all --audit $(ARGS)
	sed 's|(figures/|(images/|' runs/comparison/study.md > docs/comparison.md
	cp runs/comparison/figures/comparison.png docs/images/comparison.png
	$(BIN)/geffect demo --out runs/hiding --seeds 0,1,2 --methods wga --audit --variants \
		plain,gru-update,gru-coordinate,select,select-70,select-relearned,last-block,name-rows $(ARGS)
	sed 's|(figures/|(images/|' runs/hiding/study.md > docs/hiding.md
	cp runs/hiding/figures/recognition.png docs/images/recognition.png
	$(BIN)/geffect demo --out runs/copies --seeds 0 --methods wga,tnpo,ga-capped --variants \
		select-70,select-relearned,select-coordinate-relearned,gru-coordinate-relearned,gru-update-relearned \
		$(ARGS)
	sed 's|(figures/recognition|(images/copies|' runs/copies/study.md > docs/copies.md
	cp runs/copies/figures/recognition.png docs/images/copies.png

edu_relat: $(VENV)/installed
	$(BIN)/geffect demo --data edu_relat --data-folder $(DATA) --out runs/edu_relat $(ARGS)
	cp runs/edu_relat/edu_relat.md docs/edu_relat.md

test:
	$(MAKE) --no-print-directory --jobs=2 types suite

# Beside the suite, whose last tests leave cores idle.
types: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

suite: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

docs: $(VENV)/installed-test
	$(BIN)/python docs/site/build.py build/docs $(ARGS)

bench: $(VENV)/installed-test
	$(BIN)/python -m tests.bench $(ARGS)
	$(BIN)/python -m tests.bench.page
	$(BIN)/python -m tests.bench.constants runs/bench.json

stress: $(VENV)/installed-test
	GEFFECT_KILLS=216 $(BIN)/python -m pytest -n auto --dist worksteal tests/store/test_kill.py \
		tests/capture/test_recorder_interrupted.py tests/trainers/test_interrupted.py \
		tests/projection/test_rectifier_interrupted.py $(ARGS)

fuzz: $(VENV)/installed-test
	$(BIN)/python -W ignore -m tests.fuzz $(ARGS)

# The stamps are newer than what they were made from, so a second `make` installs nothing.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "geffect needs Python 3.11 or newer; found " + sys.version.split()[0] + ". Run: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=25.1"
	$(PIP) --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) --constraint constraints.txt --group test --group docs --editable ".[trainers,peft,datasets,torchjd,gguf,deepspeed,bitsandbytes]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
