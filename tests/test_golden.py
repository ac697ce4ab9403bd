"""What older commits gave, of which golden/make.py kept the numbers: today's code gives the same."""

import json
import math
import shutil
from pathlib import Path

import narrow
import nibabel as nib
import numpy as np
import pytest
import torch

import train_seg
import train_ssl
from engine import runs

GOLDEN = Path(__file__).parent / "golden"
ROWS = ("moco", "moco-local", "moco-zca", "moco-local-zca", "moco-nogeo", "moco-zca-nogeo", "moco-local-aligned",
        "moco-local-zca-aligned")
STOPPED = GOLDEN / "moco-local-zca-aligned"  # a run of 9 steps, stopped at the third
SEGMENTED = GOLDEN / "random-linear-finetune-100-0-labelled"  # a run of 24 iterations, with its checkpoint at the 12th


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
    saved = runs.load(folder / "checkpoint.pt")
    # mmselfsup's SGD by value; a line of the log has the learning rate that its step was made with: the 6th of 9
    (group,) = saved["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"], group["dampening"], group["nesterov"]) == (0.9, 1e-4, 0, False)
    assert group["lr"] == log[-1]["lr"] == pytest.approx(0.001 * (1 + math.cos(math.pi * 5 / 9)))
    weights = narrow.projections(saved["model"])
    assert weights.keys() == expected["weights"].keys()
    for name, numbers in weights.items():
        assert numbers == pytest.approx(expected["weights"][name], abs=1e-5), name


# ------------------------------------------------------------------------------------------------------ segmentation


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """The folder of the labelled volumes, whose slices all these tests share."""
    return tmp_path_factory.mktemp("labelled")


def half_way(out):
    """A folder of runs with the older version's segmentation as it was when half of it was done."""
    folder = out / "seg" / SEGMENTED.name
    folder.mkdir(parents=True)
    for name in ("config.json", "log.jsonl", "validation.jsonl", "checkpoint.pt"):
        shutil.copy(SEGMENTED / name, folder / name)
    return folder


@pytest.mark.parametrize("kind", ["from its start", "from half-way"])
def test_a_segmentation_is_as_it_was(monkeypatch, labelled, tmp_path, capsys, kind):
    """By the command itself, in float32: losses, learning rates, both points of the curve, result, weights.

    Images that differ by 2e-7, as another machine may round them, move the losses by 3e-7 and no Dice; a weight decay
    of 4e-4 instead of 5e-4 moves the losses by 1e-2.
    """
    narrow.without_dropout(monkeypatch)
    folder = half_way(tmp_path) if kind == "from half-way" else tmp_path / "seg" / SEGMENTED.name
    train_seg.main([*narrow.labelled_flags(labelled), "--out", str(tmp_path)])
    capsys.readouterr()
    log, expected = runs.read_log(folder / "log.jsonl"), runs.read_log(SEGMENTED / "log.jsonl")
    assert [r["step"] for r in log] == [r["step"] for r in expected] == list(range(1, 25))
    for found, told in zip(log, expected, strict=True):
        assert found["loss"] == pytest.approx(told["loss"], abs=1e-5) and found["lr"] == pytest.approx(told["lr"])
    curve, expected = (runs.read_log(f / "validation.jsonl") for f in (folder, SEGMENTED))
    assert [r["step"] for r in curve] == [r["step"] for r in expected] == [12, 24]
    result, told = (json.loads((f / "result.json").read_text()) for f in (folder, SEGMENTED))
    for found, before in [*zip(curve, expected, strict=True), (result, told)]:
        for key in ("mDS", "mDice_with_background", "per_volume_nnunet", "organs"):
            assert found[key] == pytest.approx(before[key], abs=1e-3), key
    assert result["hd95_mm"] == pytest.approx(told["hd95_mm"], rel=0.02)
    assert (result["cases"], result["store"]) == (told["cases"], told["store"])
    saved = runs.load(folder / "checkpoint.pt")
    weights = narrow.projections(saved["model"])
    expected = json.loads((SEGMENTED / "after.json").read_text())["weights"]
    assert weights.keys() == expected.keys()
    for name, numbers in weights.items():
        assert numbers == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name
    # mmsegmentation's schedule_40k by value; a line of the log has the learning rate that its step was made with
    (group,) = saved["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"], group["dampening"], group["nesterov"]) == (0.9, 5e-4, 0, False)
    assert group["lr"] == pytest.approx(log[-1]["lr"]) == pytest.approx((0.2 - 1e-4) * (1 / 24) ** 0.9 + 1e-4)


def test_a_model_of_an_older_version_predicts_as_it_did(labelled, tmp_path):
    narrow.labelled_flags(labelled)
    shutil.copy(SEGMENTED / "result.json", half_way(tmp_path))
    train_seg.main(["--predict", str(labelled / "labelled/images/a.nii.gz"), "--run", SEGMENTED.name, "--out",
                    str(tmp_path), "--predict-out", str(tmp_path / "predicted")])
    found = np.asarray(nib.load(tmp_path / "predicted/a.nii.gz").dataobj)
    expected = np.load(SEGMENTED / "prediction.npz")["arr_0"]
    assert found.shape == expected.shape == (64, 64, 8) and set(np.unique(expected)) == {0, 1, 2}
    assert (found != expected).mean() < 1e-3  # where rounding moves a pixel over a border
