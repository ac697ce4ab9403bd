"""The first author's operations on grey values against PIL's, and what is drawn of them."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import gaussian_filter

import augment
from views import photometric

PIL = {photometric.autocontrast: lambda image, _: ImageOps.autocontrast(image),
       photometric.equalize: lambda image, _: ImageOps.equalize(image),
       photometric.contrast: lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
       photometric.brightness: lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
       photometric.sharpness: lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor)}
FACTORS = np.array([0.0, 0.4, 0.55, 1.0, 1.3, 1.6])


def slices():
    """Of noise, of few levels, of one, of two neighbours, and a body in air with organs and table, as 16 HU a level."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    body = np.where(x**2 + 1.6 * y**2 < 0.7, 62 + 3 * gaussian_filter(rng.normal(size=(64, 64)), 4) * 8, 0)
    body[20:30, 25:40] += 5
    body[60:62] = 190
    return [rng.integers(0, 256, (40, 40)), rng.integers(90, 110, (33, 33)), np.full((20, 20), 7),
            rng.integers(100, 102, (15, 15)), body + rng.normal(0, 1, body.shape), 255 * (body > 30)]


@pytest.mark.parametrize("change", PIL)
def test_each_operation_is_pils_within_a_grey_level(change):
    """PIL cuts its result to whole levels, and rounds the degenerate image before."""
    for levels in slices():
        levels = levels.clip(0, 255).astype(np.uint8)
        images = torch.from_numpy(levels).expand(len(FACTORS), -1, -1).float() / 255
        before = images.clone()
        changed = change(images, torch.from_numpy(FACTORS).float()[:, None, None])
        assert torch.equal(images, before) and changed.min() >= 0 and changed.max() <= 1
        for factor, found in zip(FACTORS, changed, strict=True):
            expected = np.asarray(PIL[change](Image.fromarray(levels), factor), float)
            allowed = 0 if change is photometric.equalize else 1 + 0.5 * abs(1 - factor)
            assert np.abs(255 * found.double().numpy() - expected).max() < allowed + 1e-3, (change.__name__, factor)


def test_all_five_are_there_and_each_image_gets_its_own():
    assert list(photometric.OPERATIONS.values()) == list(PIL)
    images = torch.rand(36, 24, 24, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    operation = np.stack(np.meshgrid(range(6), range(6)), -1).reshape(-1, 2)
    factor = np.random.default_rng(0).uniform(0.5, 1.5, operation.shape)
    found = photometric.apply(images.clone(), operation, factor)
    for i, image in enumerate(images):
        for number, f in zip(operation[i], factor[i], strict=True):
            if number:
                image = photometric.OPERATIONS[number](image[None], torch.full((1, 1, 1), float(f)))[0]
        torch.testing.assert_close(found[i], image, atol=1e-6, rtol=0)
        assert torch.equal(found[i], images[i]) is not operation[i].any()


def test_two_are_drawn_as_the_published_code_draws_them():
    n = 40_000
    drawn = photometric.draw(np.random.default_rng(0), n)
    operation, strength = drawn["operation"], drawn["factor"] - 1
    shares = np.bincount(operation.ravel(), minlength=6) / operation.size
    assert shares == pytest.approx([0.5] + [0.1] * 5, abs=0.006)  # each applied with p = 0.5
    both = operation.all(1)
    assert (operation[both, 0] == operation[both, 1]).mean() == pytest.approx(1 / 5, abs=0.02)  # with replacement
    assert (strength < 0).mean() == pytest.approx(0.5, abs=0.01)
    assert np.abs(strength).mean() == pytest.approx(0.45, abs=0.001)  # level 5 of 10, of 0.9
    assert np.abs(strength).std() == pytest.approx(0.045, abs=0.001)  # 0.5 of 10, of 0.9
    assert np.abs(strength).min() >= 0 and np.abs(strength).max() <= 0.9
    columns = [*operation.T, *strength.T, *np.abs(strength).T]
    assert np.abs(np.corrcoef(columns) - np.eye(6)).max() < 0.03


def test_the_recipes_views_have_moco_v2s_crops_no_flip_and_two_operations():
    """Of the same generator; without geometry the whole slice."""
    ours, plain = (augment.draw(np.random.default_rng(3), 32, True, recipe) for recipe in ("author", "paper"))
    assert np.array_equal(ours["box"], plain["box"]) and not ours["flip"].any() and plain["flip"].any()
    assert ours.keys() == {"box", "flip", "operation", "factor"}
    whole = augment.draw(np.random.default_rng(3), 32, False, "author")
    assert (whole["box"] == [0, 0, 1, 1]).all() and np.array_equal(whole["operation"], ours["operation"])
    again, other = (augment.draw(np.random.default_rng(seed), 32, True, "author") for seed in (3, 4))
    assert all(np.array_equal(again[k], ours[k]) and (k == "flip" or not np.array_equal(other[k], ours[k]))
               for k in ours)

    batch = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (32, 48, 48), dtype=np.uint8))
    views, key = augment.pair(batch, ours, other, 32)
    expected = photometric.apply(augment.resample(batch, ours, 32), ours["operation"], ours["factor"])
    assert views.shape == (32, 1, 32, 32) and torch.equal(views[:, 0], expected) and not torch.equal(views, key)
    for size in (1, 4):  # to the bit: one process and several make the same views
        parts = [{k: v[i : i + size] for k, v in ours.items()} for i in range(0, 32, size)]
        alone = [augment.pair(batch[i * size :][:size], p, p, 32)[0] for i, p in enumerate(parts)]
        assert torch.equal(torch.cat(alone), views), size


def test_a_gpu_waits_for_nothing(fake_gpu):
    device, waits = fake_gpu
    drawn = photometric.draw(np.random.default_rng(0), 32)
    images = torch.empty(32, 24, 24, device=device)
    with waits() as seen:
        photometric.apply(images, **drawn)
    assert seen.copies >= 20 and not seen.found
