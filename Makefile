# make demo: everything on the built-in phantom, from volumes to table and figure.   make test: the test suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test lint stress clean

setup: $(BIN)/.ready

# Before Python 3.12.7, argparse takes a script's --local for an abbreviation of torchrun's own --local-addr and
# stops. The torchrun written here is the stock one with abbreviations off.
$(BIN)/.ready: requirements.txt requirements-dev.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	printf '%s\n' '#!$(abspath $(BIN))/python' 'import sys' 'from torch.distributed import run' \
	  'stock = run.get_args_parser' 'def exact():' '    parser = stock()' '    parser.allow_abbrev = False' \
	  '    return parser' 'run.get_args_parser = exact' 'sys.exit(run.main())' > $(BIN)/torchrun
	touch $@

# Two of Table 2's rows, one draw of one split of Table 1, Fig. 1, the report: all in demo/. The phantom's preset, with
# under half of its pre-training, half of its iterations, smaller crops: two cores without bf16 need under ten minutes.
SEGMENT = $(BIN)/python train_seg.py --split 25 --draw 0 --iterations 50 --crop-size 96 --out demo
demo: setup
	$(BIN)/torchrun --standalone train_ssl.py --steps 28 --out demo
	$(BIN)/torchrun --standalone train_ssl.py --local --zca --steps 28 --out demo
	$(BIN)/python svd_spectrum.py --out demo
	$(SEGMENT) --backbone all --protocol linear-frozen
	$(SEGMENT) --backbone all --protocol linear-finetune
	$(SEGMENT) --protocol deeplabv3plus
	$(BIN)/python train_seg.py --report --out demo

test: setup
	$(BIN)/python -m pytest

# The long forms of the reliability tests: kills, fuzzing, full disk, signals, two nodes, soak. About an hour.
stress: setup
	$(BIN)/python tests/stress.py

lint: setup
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) demo
