# make demo: everything on the built-in phantom, from volumes to table and figure.   make test: the test suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

export SSL SEG OUT SEEDS INIT ARGS SEG_ARGS RUN

.PHONY: setup demo paper test test-lowest lint stress clean

setup: $(BIN)/.ready

# Before Python 3.12.7, argparse takes a script's --local for an abbreviation of torchrun's own --local-addr and
# stops. The torchrun written here is the stock one with abbreviations off, and without its traceback of 30 lines behind
# a script that has said itself why it ended (a signal's victim has not). sh starts it, with the Python beside it: a first
# line of #! cannot name a Python in a folder with a space.
$(BIN)/.ready: requirements.txt requirements-dev.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	printf '%s\n' '#!/bin/sh' "'''exec' \"\$$(dirname \"\$$0\")/python\" \"\$$0\" \"\$$@\"" "' '''" 'import sys' \
	  'from torch.distributed import run' 'from torch.distributed.elastic.multiprocessing.errors import ChildFailedError' \
	  'stock = run.get_args_parser' 'def exact():' '    parser = stock()' \
	  '    parser.allow_abbrev = False' '    return parser' 'run.get_args_parser = exact' 'try:' '    sys.exit(run.main())' \
	  'except ChildFailedError as e:' '    sys.exit(1 if e.get_first_failure()[1].exitcode > 0 else str(e))' > $(BIN)/torchrun
	chmod +x $(BIN)/torchrun
	touch $@

# The phantom, from volumes to Fig. 1 and a table: the start (trained first), plain MoCo v2, local + ZCA by the paper's words
# and with crops and flips; the frozen linear head on each and on random weights. All in demo/.
demo: setup
	$(BIN)/torchrun --standalone train_ssl.py --out demo
	$(BIN)/torchrun --standalone train_ssl.py --local --zca --out demo
	$(BIN)/torchrun --standalone train_ssl.py --local --zca --geometric --out demo
	$(BIN)/python svd_spectrum.py --out demo random start moco moco-local-zca moco-local-zca-aligned
	$(BIN)/python train_seg.py --split 100 --protocol linear-frozen --backbone all --out demo
	$(BIN)/python train_seg.py --report --out demo
	@echo "Look at demo/spectrum.png (Fig. 1), demo/report.png (each organ's Dice) and, slice by slice,"
	@echo "demo/seg/phantom-moco-local-zca-aligned-linear-frozen-100-0/overlays.png"

# Every row of Tables 1 and 2, the controls, the aligned rows, Fig. 1, the report. SSL, SEG: the data; OUT; SEEDS="0 1 2";
# INIT=start trains a start instead of using ImageNet's weights; ARGS: flags of train_ssl.py, SEG_ARGS: of train_seg.py;
# RUN="torchrun --nproc-per-node 8". The same command continues.
paper: setup
	@$(BIN)/python -m tools.paper

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The suite with the oldest versions that requirements.txt allows, in an environment of its own (6 GB with CUDA's wheels).
# Without timm, MONAI and SimpleITK, which want newer ones: what compares with them is skipped.
LOWEST ?= python3.10
test-lowest:
	$(LOWEST) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10) and "Python 3.10 is needed: make LOWEST=...")'
	$(LOWEST) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt matplotlib pytest \
	  pytest-xdist -c constraints-lowest.txt
	.venv-lowest/bin/python -m pytest -n 2 --dist loadfile

# The long forms of the reliability tests: kills, fuzzing, full disk, signals, two nodes, soak. About half an hour.
stress: setup
	$(BIN)/python tests/stress.py

lint: setup
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) .venv-lowest demo
