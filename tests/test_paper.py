"""tools/paper.py: what `make paper` plans and runs."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from tools import paper


@pytest.fixture
def given(tmp_path, monkeypatch):
    for folder in ("ct", "btcv"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper.intake, "is_phantom", lambda folder: False)
    for name, value in {"SSL": "ct", "SEG": "btcv", "OUT": "out", "SEEDS": "0 1", "INIT": "start", "ARGS": "",
                        "RUN": "torchrun --nproc-per-node 8"}.items():  # an empty one is its default
        monkeypatch.setenv(name, value)
    return tmp_path


def test_the_plan_is_that_of_the_documents(given, monkeypatch, capsys):
    """Ten rows and 87 segmentation runs a seed; what is done, begun and to do."""
    monkeypatch.setenv("PLAN", "1")
    for folder, file, text in (("moco-zca-seed1", "backbone.pth", ""), ("moco-local", "log.jsonl", '{"step": 840}\n'),
                               ("seg/moco-seed1-deeplabv3plus-25-2", "result.json", "{}"),
                               ("seg/random-linear-frozen-12.5-0", "result.json", "{}")):
        (given / "out" / folder).mkdir(parents=True)
        (given / "out" / folder / file).write_text(text)
    paper.main([])
    told = capsys.readouterr().out.splitlines()
    rows = ["moco", "moco-zca", "moco-local", "moco-local-zca", "moco-nogeo", "moco-zca-nogeo", "moco-local-aligned",
            "moco-local-zca-aligned", "author-moco", "author-zca"]
    expected = [f"  pre-train {name}{seed}: to do" for seed in ("", "-seed1") for name in ["start", *rows]]
    expected[3], expected[13] = "  pre-train moco-local: begun, at step 840", "  pre-train moco-zca-seed1: done"
    assert told[1:] == [*expected, "  segmentation: 2 of 174 runs done"]


def test_the_commands_run_in_order_up_to_the_first_that_fails(given, monkeypatch, capsys):
    ran = []

    def run(command):
        ran.append(command)
        return SimpleNamespace(returncode=-9 if "author" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit) as caught:
        paper.main([])
    assert caught.value.code == 137 and len(ran) == 10
    common = ["train_ssl.py", "--data", "ct", "--out", "out", "--seed", "0"]
    several = ["torchrun", "--nproc-per-node", "8"]
    assert ran[0] == [*several, *common, "--init", "random", "--no-geometric", "--name", "start"]
    assert ran[1] == [*several, *common, "--init", "start"]
    assert ran[8] == [*several, *common, "--init", "start", "--local", "--zca", "--geometric"]
    assert ran[9] == [sys.executable, *common, "--init", "start", "--recipe", "author"]  # too few groups for several
    assert "$ torchrun --nproc-per-node 8 train_ssl.py --data ct" in capsys.readouterr().out
