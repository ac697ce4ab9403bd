"""metrics' spectrum and svd_spectrum.py's features against independent computations."""

import csv
import math

import numpy as np
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

from engine import figures, methods
from metrics import effective_rank, rankme, singular_values
from svd_spectrum import Row, features, write


def test_effective_rank_of_known_spectra():
    assert math.isclose(effective_rank(np.ones(7)), 7)
    assert math.isclose(effective_rank(np.array([1.0, 0, 0])), 1)
    p = np.array([0.5, 0.25, 0.25])
    assert math.isclose(effective_rank(10 * p), 2**1.5)  # entropy 1.5 bits


def test_singular_values_are_those_of_the_covariance_matrix():
    x = np.random.default_rng(0).normal(size=(40, 6)) @ np.diag([5, 4, 3, 2, 1, 0.1]) + 3
    expected = np.linalg.svd(np.cov(x.T), compute_uv=False)
    np.testing.assert_allclose(singular_values(x), expected, rtol=1e-9)
    few = singular_values(x[:4])
    assert len(few) == 6 and (few[3:] < 1e-12).all()  # 4 vectors span 3 dimensions at most


def test_rankme_is_of_the_vectors_themselves():
    x = np.random.default_rng(0).normal(size=(40, 6)) + 3  # its mean counts
    share = np.sqrt(np.linalg.eigvalsh(x.T @ x))
    share = share / share.sum()
    assert math.isclose(rankme(x.astype(np.float32)), math.exp(-sum(p * math.log(p) for p in share)), rel_tol=1e-5)
    assert math.isclose(rankme(np.eye(5)), 5) and not math.isclose(rankme(x), effective_rank(singular_values(x)))


def test_features_are_torchvisions_pooled_features():
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None).eval()
    slices = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (slices[:, None].expand(-1, 3, -1, -1) / 255 - mean[:, None, None]) / std[:, None, None]
    stock = create_feature_extractor(net, {"avgpool": "a", "layer4": "b"})
    with torch.no_grad():
        out = stock(images)
    device = torch.device("cpu")
    np.testing.assert_allclose(features(net, slices, 64, False, device), out["a"].flatten(1), rtol=1e-4, atol=1e-5)
    positions = features(net, slices, 64, True, device)
    np.testing.assert_allclose(positions, out["b"].movedim(1, -1).reshape(-1, 512), rtol=1e-4, atol=1e-5)


def test_each_curve_has_its_methods_look_and_its_marks(tmp_path, monkeypatch):
    """Of both seeds of a method the same; what makes it doubtful stands beside its name, and in the file."""
    values, drawn = np.array([2.0, 1.0]), []
    rows = [Row("start", "Initial checkpoint", "Initial checkpoint", 9, values, 1.9, 1.5, []),
            Row("moco-seed1", "MoCo v2", "MoCo v2, seed 1", 9, values, 1.9, 1.5, ["**did not train**: it does not ...",
                                                                                "**unfinished: step 9 of 184**", "x"]),
            Row("moco-seed2", "MoCo v2", "MoCo v2, seed 2", 9, values, 1.9, 1.5, [])]
    monkeypatch.setattr(figures, "attempt", lambda draw, *args: draw(*args) or True)
    monkeypatch.setattr(figures, "_save", lambda plt, figure, path: (drawn.append(figure), plt.close(figure)))
    assert [p.name for p in write(tmp_path / "spectrum", "BTCV", "a title", rows)] == ["spectrum.png", "spectrum.csv"]
    lines = drawn[0].axes[0].lines
    assert [line.get_label() for line in lines] == [
        "Initial checkpoint", "MoCo v2, seed 1\ndid not train\nunfinished: step 9 of 184", "MoCo v2, seed 2"]
    assert [(line.get_color(), line.get_marker()) for line in lines] == [
        (methods.LOOKS[run].colour, methods.LOOKS[run].marker) for run in ("start", "moco", "moco")]
    with open(tmp_path / "spectrum.csv", newline="") as f:
        remarks = [row["remarks"] for row in csv.DictReader(f)]
    assert remarks == ["", "did not train: it does not ...; unfinished: step 9 of 184; x", ""]
