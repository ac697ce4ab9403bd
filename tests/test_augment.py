"""The views against torchvision's functions, one step at a time and all together."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

import augment
from local_loss import pool_boxes
from views import resize

SIDE = 96
# with what each may differ by, of 255 grey levels: float32's rounding, and half precision's
RESAMPLERS = [(resize.crops_one_by_one, 0.001), (resize.crops_by_products, 0.125)]
BOXES = [  # top, left, height, width in pixels of a slice of SIDE
    (0, 0, 96, 96),  # the whole
    (10, 3, 50, 50),
    (5, 40, 80, 56),  # tall
    (40, 0, 30, 96),  # wide, over the full width
    (60, 66, 36, 30),  # in the lower right corner
    (17, 80, 9, 7),  # much enlarged
    (95, 95, 1, 1),  # a single pixel
]


def noise(n, side=SIDE, seed=0):
    """Slices of noise, the hardest to resample: uint8 (n, side, side)."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, side, side), dtype=np.uint8))


def images(n, size=32, seed=0):
    return torch.rand(n, size, size, generator=torch.Generator().manual_seed(seed))


def part(params, index):
    return {name: values[index] for name, values in params.items()}


@pytest.mark.parametrize("resample, levels", RESAMPLERS)
@pytest.mark.parametrize("size", [24, 64, 160])
def test_resamplers_equal_torchvision(resample, levels, size):
    batch = noise(len(BOXES))
    crops = resample(batch, np.array(BOXES), size)
    assert crops.shape == (len(BOXES), size, size) and crops.dtype == torch.float32
    for crop, image, box in zip(crops, batch, BOXES, strict=True):
        expected = TF.resized_crop(image[None].float() / 255, *box, [size, size], antialias=True)
        torch.testing.assert_close(crop[None], expected, atol=levels / 255, rtol=0)


@pytest.mark.parametrize("resample, levels", RESAMPLERS)
def test_resamplers_equal_torchvision_at_full_size(resample, levels):
    batch, boxes = noise(4, 512), resize.pixel_boxes(augment.draw(np.random.default_rng(2), 4)["box"], 512)
    for crop, image, box in zip(resample(batch, boxes, 224), batch, boxes.tolist(), strict=True):
        expected = TF.resized_crop(image[None].float() / 255, *box, [224, 224], antialias=True)
        torch.testing.assert_close(crop[None], expected, atol=levels / 255, rtol=0)


@pytest.mark.parametrize("resample, levels", RESAMPLERS)
@pytest.mark.parametrize("size", [24, 64, 160])
@pytest.mark.parametrize("smooth", [0, 3])
def test_resamplers_equal_pillows_within_a_grey_level(resample, levels, size, smooth):
    batch = np.stack([gaussian_filter(image, smooth) for image in noise(len(BOXES), seed=1).numpy()])
    crops = resample(torch.from_numpy(batch), np.array(BOXES), size)
    for crop, image, (top, left, height, width) in zip(crops, batch, BOXES, strict=True):
        box = Image.fromarray(image).crop((left, top, left + width, top + height))  # resize's own looks beyond the box
        expected = np.asarray(box.resize((size, size), Image.Resampling.BILINEAR), np.float32)
        # half a level when Pillow rounds its columns, half when it rounds its rows, and what is ours
        assert np.abs(255 * crop.numpy() - expected).max() < 1 + levels


def test_pixel_boxes_are_rounded_and_inside():
    box = np.array([[0.101, 0.249, 0.5049, 0.3051], [0.999, 0.999, 1e-3, 1e-3], [6e-3, 6e-3, 0.994, 0.994]])
    assert resize.pixel_boxes(box, 100).tolist() == [[10, 25, 50, 31], [99, 99, 1, 1], [1, 1, 99, 99]]
    boxes = resize.pixel_boxes(augment.draw(np.random.default_rng(0), 5000)["box"], 7)
    starts, lengths = boxes[:, :2], boxes[:, 2:]
    assert (starts >= 0).all() and (lengths >= 1).all() and (starts + lengths <= 7).all()


@pytest.mark.parametrize("contrast_first", [False, True])
def test_jitter_equals_torchvision(contrast_first):
    factors = np.array([(0.6, 1.4), (1.4, 0.6), (1.4, 1.4), (0.9, 1.2), (1.0, 1.0)])
    brightness, contrast = factors.T
    before = images(len(factors))
    after = augment.jitter(before.clone(), brightness, contrast, np.full(len(factors), contrast_first))
    for image, jittered, b, c in zip(before, after, brightness, contrast, strict=True):
        expected = image[None]
        steps = [(TF.adjust_brightness, b), (TF.adjust_contrast, c)]
        for adjust, factor in reversed(steps) if contrast_first else steps:
            expected = adjust(expected, factor)
        torch.testing.assert_close(jittered[None], expected, atol=1e-6, rtol=0)
    assert torch.equal(after[-1], before[-1])  # factors of 1 change nothing


def test_blur_is_gaussian():
    sigma = np.array([0.1, 0.5, 1.0, 1.7, 2.0])
    before = images(len(sigma))
    after = augment.blur(before, sigma)
    for image, blurred, s in zip(before, after, sigma, strict=True):
        by_scipy = gaussian_filter(image.double().numpy(), s, mode="mirror", truncate=augment.RADIUS / s)
        np.testing.assert_allclose(blurred.numpy(), by_scipy, atol=1e-6)
        by_torchvision = TF.gaussian_blur(image[None], [2 * augment.RADIUS + 1] * 2, [s, s])
        torch.testing.assert_close(blurred[None], by_torchvision, atol=1e-6, rtol=0)
    assert 3 * augment.SIGMA[1] <= augment.RADIUS


@pytest.mark.parametrize("shape", [(3, 8, 9), (3, 1, 8, 9)])
def test_normalise(shape):
    grey = torch.rand(shape)
    channels = grey.reshape(3, 1, 8, 9).repeat(1, 3, 1, 1)
    expected = TF.normalize(channels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(resize.normalise(grey), expected, atol=1e-6, rtol=0)


def test_views_equal_torchvisions_step_by_step():
    batch, params, size = noise(24), augment.draw(np.random.default_rng(3), 24), 40
    views = augment.apply(batch, params, size)
    assert views.shape == (24, 3, size, size) and views.dtype == torch.float32 and views.is_contiguous()
    boxes = resize.pixel_boxes(params["box"], SIDE).tolist()
    for n, view in enumerate(views):
        image = TF.resized_crop(batch[n][None].float() / 255, *boxes[n], [size, size], antialias=True)
        steps = [(TF.adjust_brightness, params["brightness"][n]), (TF.adjust_contrast, params["contrast"][n])]
        for adjust, factor in reversed(steps) if params["contrast_first"][n] else steps:
            image = adjust(image, factor)
        if params["sigma"][n] > 0:
            image = TF.gaussian_blur(image, [13, 13], [float(params["sigma"][n])] * 2)
        if params["flip"][n]:
            image = image.flip(2)
        image = TF.normalize(image.repeat(3, 1, 1), resize.IMAGENET_MEAN, resize.IMAGENET_STD)
        torch.testing.assert_close(view, image, atol=1e-3, rtol=0)  # 1e-4 before the division by 0.22


def test_channels_are_equal_and_in_the_unit_interval_before_normalisation():
    views = augment.apply(noise(8), augment.draw(np.random.default_rng(0), 8), 32)
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (resize.IMAGENET_MEAN, resize.IMAGENET_STD))
    grey = views * std + mean
    torch.testing.assert_close(grey, grey[:, :1].expand_as(grey), atol=1e-6, rtol=0)
    assert grey.min() >= -1e-6 and grey.max() <= 1 + 1e-6 and grey.std() > 0.05


@pytest.mark.parametrize("geometric", [True, False])
def test_a_pair_is_the_two_views_before_normalisation(geometric):
    batch, params = noise(16), [augment.draw(np.random.default_rng(seed), 16, geometric) for seed in (3, 4)]
    views = augment.pair(batch, *params, 40)
    for view, drawn in zip(views, params, strict=True):
        assert view.shape == (16, 1, 40, 40) and view.dtype == torch.float32 and view.is_contiguous()
        assert view.min() >= 0 and view.max() <= 1
        assert torch.equal(resize.normalise(view), augment.apply(batch, drawn, 40))
    assert not torch.equal(*views) and torch.equal(batch, noise(16))
    kept = views[1].clone()
    views[0].zero_()
    assert torch.equal(views[1], kept)


def test_a_pair_of_equal_crops_is_resampled_once(monkeypatch):
    calls, plain = [], resize.crops_one_by_one
    monkeypatch.setattr(augment, "crops_one_by_one", lambda *args: calls.append(args) or plain(*args))
    for geometric, times in ((False, 1), (True, 2)):
        params = [augment.draw(np.random.default_rng(seed), 4, geometric) for seed in (3, 4)]
        augment.pair(noise(4), *params, 32)
        assert len(calls) == times
        calls.clear()
    params[1]["box"][:3] = params[0]["box"][:3]  # all but one are equal: not enough
    augment.pair(noise(4), *params, 32)
    assert len(calls) == 2


def test_flip_mirrors_left_and_right():
    params = augment.draw(np.random.default_rng(0), 2, geometric=False)
    plain = augment.apply(noise(2), params, 32)
    flipped = augment.apply(noise(2), params | {"flip": np.array([True, False])}, 32)
    assert torch.equal(flipped[0], plain[0].flip(2)) and torch.equal(flipped[1], plain[1])


def test_boxes_are_distributed_as_torchvisions():
    top, left, height, width = augment.draw(np.random.default_rng(0), 20000)["box"].T
    area, ratio = height * width, width / height
    assert 0.2 <= area.min() < 0.21 and 0.98 < area.max() <= 1
    assert 0.75 <= ratio.min() < 0.76 and 1.32 < ratio.max() <= 4 / 3
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 1).all() and (left + width <= 1).all()

    torch.manual_seed(0)
    dummy = torch.empty(1, 10000, 10000, device="meta")
    theirs = [RandomResizedCrop.get_params(dummy, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    their_top, their_left, their_height, their_width = np.array(theirs).T / 10000
    for mine, their in [(top, their_top), (left, their_left), (height, their_height), (width, their_width),
                        (area, their_height * their_width), (ratio, their_width / their_height)]:
        assert abs(mine.mean() - their.mean()) < 0.015
        assert ks_2samp(mine, their).pvalue > 1e-3


class Scripted:
    """A generator whose uniform numbers are given."""

    def __init__(self, *candidates):
        self.row = np.full(29, 0.5)
        for n, (area, ratio) in enumerate(candidates):
            self.row[[n, augment.CANDIDATES + n]] = area, ratio

    def random(self, shape):
        return np.broadcast_to(self.row, shape)


def test_the_first_candidate_that_fits_is_the_box_else_the_whole_slice():
    too_wide, too_tall, fits, fits_too = (1.0, 1.0), (1.0, 0.0), (0.0, 0.5), (0.5, 0.5)
    box = augment.draw(Scripted(too_wide, too_tall, fits, fits_too), 1)["box"][0]
    np.testing.assert_allclose(box[2:], np.sqrt(0.2))
    np.testing.assert_allclose(box[:2], (1 - np.sqrt(0.2)) / 2)
    assert augment.draw(Scripted(*[too_wide] * 10), 1)["box"].tolist() == [[0, 0, 1, 1]]
    _, _, height, width = augment.draw(Scripted((0.5, 1.0)), 1)["box"][0]
    assert height * width == pytest.approx(0.6) and width / height == pytest.approx(4 / 3)


def test_probabilities_and_ranges():
    n = 20000
    params = augment.draw(np.random.default_rng(1), n)
    jittered, blurred = params["brightness"] != 1, params["sigma"] > 0
    close = dict(abs=4 * 0.5 / n**0.5)  # four standard errors at most
    assert params["flip"].mean() == pytest.approx(0.5, **close)
    assert jittered.mean() == pytest.approx(0.8, **close) and blurred.mean() == pytest.approx(0.5, **close)
    assert params["contrast_first"].mean() == pytest.approx(0.5, **close)
    assert ((params["contrast"] != 1) == jittered).all()  # both or neither
    brightness, contrast = params["brightness"][jittered], params["contrast"][jittered]
    sigma = params["sigma"][blurred]
    for values, low, high in [(brightness, 0.6, 1.4), (contrast, 0.6, 1.4), (sigma, 0.1, 2.0)]:
        assert low <= values.min() and values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.02)
        assert values.std() == pytest.approx((high - low) / 12**0.5, abs=0.02)  # uniform
    assert abs(np.corrcoef(brightness, contrast)[0, 1]) < 0.03
    top, left, height, width = params["box"].T
    place = top / (1 - height), left / (1 - width)
    choices = [params["flip"], jittered, params["contrast_first"], blurred, *place]
    correlation = np.corrcoef(choices) - np.eye(len(choices))
    assert np.abs(correlation).max() < 0.03  # each is drawn for itself


def test_draws_are_reproducible():
    first, again, other = (augment.draw(np.random.default_rng(seed), 16) for seed in (5, 5, 6))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in first)
    assert all(len(values) == 16 for values in first.values())


def test_a_slice_of_a_batch_gives_its_views():
    batch, params = noise(8), augment.draw(np.random.default_rng(4), 8)
    views = augment.apply(batch, params, 32)
    assert torch.equal(views, augment.apply(batch, params, 32))
    torch.testing.assert_close(augment.apply(batch[2:5], part(params, slice(2, 5)), 32), views[2:5])
    boxes = resize.pixel_boxes(params["box"], SIDE)  # to the bit: groups in one process are those of several
    assert torch.equal(resize.crops_one_by_one(batch[2:5], boxes[2:5], 32),
                       resize.crops_one_by_one(batch, boxes, 32)[2:5])
    order = np.random.default_rng(0).permutation(8)
    torch.testing.assert_close(augment.apply(batch[order], part(params, order), 32), views[order])


def test_however_many_are_blurred_each_gets_its_own():
    batch, params = noise(40), augment.draw(np.random.default_rng(4), 40)
    params["sigma"] = np.where(np.arange(40) == 5, 0, np.linspace(0.3, 2, 40))  # 39, more than go at once on a CPU
    views = augment.pair(batch, params, params, 32)[0]
    for n in range(40):
        alone = augment.resample(batch[n : n + 1], part(params, [n]), 32)
        alone = augment.jitter(alone, *(params[k][[n]] for k in ("brightness", "contrast", "contrast_first")))
        expected = alone if n == 5 else TF.gaussian_blur(alone, [13, 13], [float(params["sigma"][n])] * 2)
        expected = expected.flip(2) if params["flip"][n] else expected
        torch.testing.assert_close(views[n], expected, atol=1e-5, rtol=0)


def test_without_geometry_location_is_fixed_and_the_rest_is_as_drawn():
    with_geometry, without = (augment.draw(np.random.default_rng(7), 64, geometric=g) for g in (True, False))
    for name in ("brightness", "contrast", "contrast_first", "sigma"):
        assert np.array_equal(with_geometry[name], without[name])
    assert (without["box"] == [0, 0, 1, 1]).all() and not without["flip"].any()
    assert with_geometry["flip"].any() and (with_geometry["box"] != without["box"]).any()

    dot = torch.zeros(64, SIDE, SIDE, dtype=torch.uint8)
    dot[:, 30:33, 60:63] = 255  # its centre is at (31, 61); of 32 pixels a side at (10, 20)
    brightest = augment.apply(dot, without, 32)[:, 0].flatten(1).argmax(1)
    assert (brightest == 10 * 32 + 20).all()


def test_the_batch_is_left_as_it_was():
    batch = noise(4)
    augment.apply(batch, augment.draw(np.random.default_rng(0), 4), 32)
    assert torch.equal(batch, noise(4))


@pytest.mark.parametrize("height, width, side, shape", [(96, 96, 32, (32, 32)), (60, 96, 40, (40, 64)),
                                                        (96, 50, 70, (134, 70))])
def test_whole_slices_are_resized_as_by_torchvision(height, width, side, shape):
    slices = noise(3)[:, :height, :width]
    resized = TF.resize(slices[:, None].float() / 255, list(shape), antialias=True).expand(-1, 3, -1, -1)
    expected = TF.normalize(resized, resize.IMAGENET_MEAN, resize.IMAGENET_STD)
    torch.testing.assert_close(resize.whole(slices, side), expected, atol=1e-4, rtol=0)


def test_autocast_changes_nothing():
    batch, params = noise(4), augment.draw(np.random.default_rng(0), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = augment.apply(batch, params, 32)
    assert params["sigma"].any() and torch.equal(views, augment.apply(batch, params, 32))


@pytest.mark.parametrize("batch, size, message", [
    (noise(4).float(), 32, r"not torch.float32 \(4, 96, 96\)"),
    (noise(4)[:, None], 32, r"\(4, 1, 96, 96\)"),
    (noise(4)[:, :90], 32, r"\(4, 90, 96\)"),
    (noise(5), 32, "4 samples were drawn for a batch of 5"),
    (noise(4), 6, "6 pixels is too small"),
])  # fmt: skip
def test_wrong_input_is_refused_in_one_line(batch, size, message):
    with pytest.raises(ValueError, match=message) as error:
        augment.apply(batch, augment.draw(np.random.default_rng(0), 4), size)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("counts", [(5, 4), (4, 5)])
def test_a_pair_needs_both_views_drawn_for_the_batch(counts):
    params = (augment.draw(np.random.default_rng(0), n, geometric=False) for n in counts)
    with pytest.raises(ValueError, match="5 samples were drawn for a batch of 4"):
        augment.pair(noise(4), *params, 32)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_views_without_a_wait():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    batch, params = noise(16, 512), augment.draw(np.random.default_rng(0), 16)
    other = augment.draw(np.random.default_rng(1), 16)
    on_device = batch.cuda()
    augment.apply(on_device, params, 224)  # the first call may set libraries up
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = augment.apply(on_device, params, 224)
        pair = augment.pair(on_device, params, other, 224)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(views.cpu(), augment.apply(batch, params, 224), atol=0.005, rtol=0)
    for view, expected in zip(pair, augment.pair(batch, params, other, 224), strict=True):
        torch.testing.assert_close(view.cpu(), expected, atol=0.125 * 1.4**2 / 255, rtol=0)  # jitter stretches


@pytest.mark.parametrize("side", [192, 512])
def test_common_parts_show_the_same_places(side):
    """Maps that hold the slice's coordinates: the cells of two random views agree to under half a feature pixel."""
    n, stride, size = 64, 4, 64
    query, key = (augment.draw(np.random.default_rng(seed), n) for seed in (1, 2))
    # pairs that drawn crops hardly ever give: apart, touching at a corner, with a strip in common that is too thin
    for i, (a, b) in enumerate((((0, 0, 0.45, 0.4), (0.5, 0.55, 0.45, 0.4)), ((0, 0, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)),
                                ((0.1, 0, 0.6, 0.54), (0.2, 0.46, 0.6, 0.54)), ((0, 0, 1, 1), (0.3, 0.3, 0.05, 0.6)))):
        query["box"][i], key["box"][i] = a, b
    *boxes, usable = augment.common_parts(query, key, side)
    assert not usable[:4].any() and all((box[~usable] == [0, 0, 1, 1]).all() for box in boxes)  # whole views instead
    usable = usable.nonzero()[0]
    assert 50 < len(usable) <= n - 4
    cells, pixels = [], []
    for params, box in zip((query, key), boxes, strict=True):
        top, left, height, width = (resize.pixel_boxes(params["box"], side) / side).T[..., None]
        at = (np.arange(size // stride) + 0.5) * stride / size  # centres of the feature map's pixels in the view
        rows, columns = top + at * height, left + np.where(params["flip"][:, None], 1 - at, at) * width
        maps = np.stack(np.broadcast_arrays(rows[:, :, None], columns[:, None, :]), 1)
        cells.append(pool_boxes(torch.from_numpy(maps), torch.from_numpy(box), torch.from_numpy(params["flip"])))
        pixels.append(np.concatenate([height, width], 1) * stride / size)
    pixel = torch.from_numpy(np.maximum(*pixels))[usable, None]
    assert ((cells[0] - cells[1]).abs()[usable] < 0.5 * pixel).all()
    # and they are those of the intersection, computed by hand
    for i in usable:
        ends = [resize.pixel_boxes(p["box"], side)[i] / side for p in (query, key)]
        for axis in (0, 1):
            low, high = max(e[axis] for e in ends), min(e[axis] + e[axis + 2] for e in ends)
            assert high - low >= 0.1
            expected = low + (np.arange(7) + 0.5) / 7 * (high - low)
            seen = cells[0][i].reshape(7, 7, 2)[..., axis].numpy()
            seen = seen[:, 3] if axis == 0 else seen[3]
            assert np.abs(seen - expected).max() < 0.5 * float(pixel[list(usable).index(i), 0, axis])
    for i in set(range(n)) - set(usable.tolist()):
        ends = [resize.pixel_boxes(p["box"], side)[i] / side for p in (query, key)]
        overlap = [min(e[a] + e[a + 2] for e in ends) - max(e[a] for e in ends) for a in (0, 1)]
        assert min(overlap) < 0.1


def test_a_view_does_not_depend_on_its_company():
    """Bit for bit, also where only one image of a part is blurred: one process and several make the same views."""
    batch, params = noise(8), augment.draw(np.random.default_rng(0), 8)
    params["sigma"] = np.array([0, 0, 0, 0.91, 1.7, 0.2, 2.0, 0])
    whole, _ = augment.pair(batch, params, params, 64)
    for size in (1, 2, 4):
        parts = [slice(i, i + size) for i in range(0, 8, size)]
        views = [augment.pair(batch[p], part(params, p), part(params, p), 64)[0] for p in parts]
        assert torch.equal(torch.cat(views), whole), size
