"""What a run survives: the short forms of tests/stress.py, and what it does about numbers that are not finite.

`make stress` runs the long forms.
"""

import contextlib
import io
from types import SimpleNamespace

import pytest
import torch

import train_ssl
from engine import monitor, runs

PARTS = {"files": "mutated files", "kills": "SIGKILL", "signals": "SIGINT", "terminal": "a closed terminal",
         "processes": "another number of processes", "disk": "full disk", "restarts": "--max-restarts 1",
         "rejoin": "both rejoined"}


@pytest.mark.parametrize("part", PARTS)
def test_short_forms(stress_table, part):
    lines, err = stress_table
    rows = [row for row in lines if row.startswith(f"| {part} | | FAILED") or PARTS[part] in row]
    assert rows and not any("FAILED" in row for row in rows), f"{rows}\n{err}"


def test_a_second_signal_a_second_run_and_no_write_elsewhere(stress_table):
    for start in ("| a second signal | 1 | ended at once", "| a second run on a folder at work | 1 | refused",
                  "| writes outside"):
        assert any(row.startswith(start) for row in stress_table[0]), start


@pytest.fixture
def flags(small_phantom, tmp_path):
    return [str(a) for a in ("--data", small_phantom / "AbdomenCT-1K", "--store", small_phantom.parent / "store",
                             "--out", tmp_path, "--amp", "off", "--init", "random", "--image-size", 32, "--batch-size",
                             8, "--bn-group", 4, "--queue", 32, "--checkpoint-minutes", 0)]


@pytest.mark.parametrize("what", ["loss", "gradient", "weights"])
def test_numbers_that_are_not_finite_end_a_run(flags, tmp_path, monkeypatch, what):
    """At step 5 or 6, with the checkpoint of step 4 behind it: named are the step, its slices and the checkpoint."""
    real = train_ssl.Trainer.step

    def step(self, t, slices):
        told = real(self, t, slices)
        if what == "weights" and t == 5:  # in the last step, where no loss can show it
            self.moco.encoder_q.projector[0].bias.data[7] = torch.nan
        elif what != "weights" and t == 4:
            told[0 if what == "loss" else -1] = torch.inf
        return told

    monkeypatch.setattr(train_ssl.Trainer, "step", step)
    line = refusal_of([*flags, "--steps", "6"])
    saved = runs.load(tmp_path / "phantom-moco" / "checkpoint.pt")
    assert saved["step"] == 4 and all(t.isfinite().all() for t in saved["model"].values())
    assert "the last good checkpoint is" in line and str(tmp_path / "phantom-moco" / "checkpoint.pt") in line
    assert ("step 6: weights" if what == "weights" else f"step 5: the {'loss' if what == 'loss' else 'norm'}") in line
    assert what == "weights" or line.count(" slice ") == 8


def refusal_of(argv):
    """The one line of train_ssl.main's end; notes and progress before it are not counted."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), pytest.raises(SystemExit) as caught:
        train_ssl.main(argv)
    assert caught.value.code == 1 and "Traceback" not in told.getvalue()
    return next(line for line in told.getvalue().splitlines() if "checkpoint" in line)


def test_a_gradient_that_is_not_finite_is_in_the_norm():
    layer = torch.nn.Linear(3, 2)
    layer(torch.randn(4, 3)).square().sum().backward()
    flat = torch.cat([p.grad.flatten() for p in layer.parameters()])
    torch.testing.assert_close(runs.gradient_norm(layer.parameters()), flat.norm())
    layer.bias.grad[1] = torch.nan
    assert not runs.gradient_norm(layer.parameters()).isfinite()


def test_fp16_counts_the_steps_its_scaler_skips(tmp_path):
    records = [{"step": s, "loss": 1.0, "grad_norm": n} for s, n in ((1, 2.0), (2, float("inf")), (3, 1.0))]
    trainer = SimpleNamespace(amp="fp16", skipped=4)
    monitor.count_skipped(trainer, records)
    assert trainer.skipped == 5 and [r["skipped"] for r in records] == [4, 5, 5] and records[1]["grad_norm"] is None
    runs.refuse_non_finite(records, lambda step: [], runs.Run(tmp_path, {}, False, True))  # no reason to stop
