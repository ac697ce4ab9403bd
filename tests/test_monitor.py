"""engine/monitor.py: a look at held-out slices by encoders that differ, and what it takes for untrained."""

from types import SimpleNamespace

import narrow
import numpy as np
import pytest
import torch

import augment
from engine import monitor, seeds

FLAGS = ("--data . --init random --arch resnet_basic --image-size 64 --size 96 --batch-size 8 --bn-group 4 --queue 32 "
         "--epochs 1 --lr 0.02 --amp off")


@pytest.fixture
def trainer(monkeypatch):
    """One in float64 whose encoders differ, in every parameter and statistic."""
    narrow.register(monkeypatch)
    narrow.double_views(monkeypatch)
    return narrow.trainer(narrow.settings(FLAGS))


def test_a_look_compares_the_query_encoders_view_with_the_key_encoders(trainer, monkeypatch):
    slices = narrow.slices(SimpleNamespace(batch_size=len(trainer.batches.held_out), size=96), 7)
    store = SimpleNamespace(batch=lambda numbers: slices.numpy())
    monkeypatch.setattr(augment, "apply", lambda batch, params, size, own=augment.apply: own(batch, params,
                                                                                               size).double())
    resized = monitor.resize.whole
    monkeypatch.setattr(monitor.resize, "whole", lambda batch, size: resized(batch, size).double())
    found = monitor.CollapseMonitor(trainer, store).look(3)
    query, key = (augment.apply(slices, augment.draw(seeds.rng(0, seeds.LOOKS, i), len(slices)), 64)
                  for i in (1, 2))
    moco = trainer.moco.eval()
    with torch.no_grad():
        cosines = {}
        for kind, other, view in (("right", moco.encoder_k, key), ("of one encoder", moco.encoder_q, key),
                                  ("of one view", moco.encoder_k, query)):
            q, k = moco.encoder_q(query)[1], other(view)[1]
            cosines[kind] = np.array([[float(a @ b / a.norm() / b.norm()) for b in k] for a in q])
    count = len(slices)
    own = {kind: np.trace(c) / count for kind, c in cosines.items()}
    others = (cosines["right"].sum() - np.trace(cosines["right"])) / (count * (count - 1))
    assert min(abs(own["right"] - own[kind]) for kind in ("of one encoder", "of one view")) > 1e-3
    assert found["held_out_positive"] == pytest.approx(own["right"], abs=1e-6)
    assert found["held_out_negative"] == pytest.approx(others, abs=1e-6)
    assert found["held_out_gap"] == pytest.approx(own["right"] - others, abs=1e-6)
    nearest = [row.argmax() == i for i, row in enumerate(cosines["right"])]
    assert found["instance_accuracy"] == pytest.approx(sum(nearest) / count) and found["instance_chance"] == 1 / count
    assert found["queue_filled"] == pytest.approx(3 * 8 / 32)


def test_few_directions_are_those_under_a_hundredth_of_what_there_could_be(trainer):
    """Of 32 features on 12 slices 0.32; of fewer slices a tenth of what these could span: 10 x 2 / 100 on three."""
    slices = narrow.slices(SimpleNamespace(batch_size=12, size=96), 7)
    for count, limit in ((12, 0.32), (3, 0.2)):
        trainer.batches.held_out = trainer.batches.held_out[:count]
        store = SimpleNamespace(batch=lambda numbers: slices[: len(numbers)].numpy())
        collapse = monitor.CollapseMonitor(trainer, store)
        found = {"held_out_gap": 0.3, "instance_accuracy": 0.5, "instance_chance": 0.1}
        assert "dimensional collapse" in collapse.warning(found | {"effective_rank": limit - 0.01}, 1000)
        assert collapse.warning(found | {"effective_rank": limit + 0.01}, 1000) == ""


def test_what_calls_a_run_untrained_is_a_stated_number():
    """A gap of 0.02: docs/training.md; from a tenth of the steps on, the 50th at the earliest."""
    assert monitor.metrics.LEAST_GAP == 0.02
    judged = [monitor.judged_from(SimpleNamespace(horizon=h)) for h in (20, 500, 501, 2000)]
    assert judged == [50, 50, 51, 200]
