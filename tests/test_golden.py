"""What commit 31b420e gave, of which golden/make.py kept the numbers: today's code gives the same."""

import json
import shutil
from pathlib import Path

import narrow
import pytest
import torch

import train_ssl
from engine import runs

GOLDEN = Path(__file__).parent / "golden"
ROWS = ("moco", "moco-local", "moco-zca", "moco-local-zca", "moco-nogeo", "moco-zca-nogeo", "moco-local-aligned",
        "moco-local-zca-aligned")
STOPPED = GOLDEN / "moco-local-zca-aligned"  # a run of 9 steps, stopped at the third


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    narrow.register(monkeypatch)


@pytest.mark.parametrize("row", ROWS)
def test_twenty_steps_of_a_row_are_as_they_were(monkeypatch, row):
    """Losses, queue's accuracy, similarities and gradient in float64.

    A relative change of the weights by 1e-15 moves them by 3e-14 at most in 20 steps, in any row: 1e-9 leaves room for
    sums in another order, and for nothing else.
    """
    narrow.dyadic_boxes(monkeypatch)
    narrow.plain_views(monkeypatch)
    told = json.loads((GOLDEN / f"{row}.json").read_text())
    args = narrow.settings(told["flags"])
    assert args.name == row
    trainer = narrow.trainer(args)
    steps = torch.stack([trainer.step(t, narrow.slices(args, t)) for t in range(len(told["steps"]))])
    expected = torch.tensor(told["steps"], dtype=torch.float64)
    assert expected.shape == (20, 7)
    torch.testing.assert_close(steps, expected, rtol=1e-9, atol=1e-10)


def test_a_run_of_an_older_version_is_continued(tmp_path, capsys):
    """By the command itself, in float32: it logs the losses, and ends with the weights, that the older version gave.

    Views that differ by 1e-7, as another machine may round them, move the losses by 1e-6 and the weights by 7e-7;
    SGD's momentum left behind moves them by 4e-3 and 1e-2.
    """
    flags, folder = narrow.ct_flags(tmp_path), tmp_path / "out" / STOPPED.name
    shutil.copytree(STOPPED, folder)
    train_ssl.main([*flags, "--out", str(tmp_path / "out"), "--steps", "6"])
    assert "continuing after step 3" in capsys.readouterr().out
    expected, log = json.loads((GOLDEN / "continued.json").read_text()), runs.read_log(folder / "log.jsonl")
    assert log[:3] == runs.read_log(STOPPED / "log.jsonl")
    assert [r["step"] for r in log[3:]] == [r["step"] for r in expected["log"]] == [4, 5, 6]
    for found, told in zip(log[3:], expected["log"], strict=True):
        for key in ("loss", "loss_global", "loss_local", "similarity_positive", "similarity_negative", "lr"):
            assert found[key] == pytest.approx(told[key], abs=1e-5), key
        assert found["grad_norm"] == pytest.approx(told["grad_norm"], abs=1e-4)
    weights = narrow.projections(runs.load(folder / "checkpoint.pt")["model"])
    assert weights.keys() == expected["weights"].keys()
    for name, numbers in weights.items():
        assert numbers == pytest.approx(expected["weights"][name], abs=1e-5), name
