"""metrics.py against loops over pixels, numbers worked out by hand, all pairs of surface voxels (MedPy's), MONAI."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

import metrics
from engine import distances, evaluate


def loop_counts(prediction, truth, classes):
    out = np.zeros((3, classes), np.int64)
    for p, t in zip(prediction.flat, truth.flat, strict=True):
        if t != 255:
            out[0, t] += p == t
            out[1, p] += 1
            out[2, t] += 1
    return out


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_counts_against_a_loop(dtype):
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(0, 14, (2, 20, 30)).astype(dtype)
    truth[truth == 4] = 0  # absent organ, predicted
    prediction[prediction == 7] = 0  # empty prediction
    truth[truth == 9], prediction[prediction == 9] = 0, 0  # in neither
    truth[:3] = 255
    prediction[0] = 200  # whatever is predicted where the truth is ignored
    out = metrics.counts(prediction, truth, 14)
    assert out.dtype == np.int64
    np.testing.assert_array_equal(out, loop_counts(prediction, truth, 14))
    assert out[2, 4] == 0 < out[1, 4] and out[1, 7] == 0 < out[2, 7] and not out[:, 9].any()


def test_counts_of_nothing_but_ignored_pixels():
    labels = np.full((2, 2), 255, np.uint8)
    assert not metrics.counts(np.zeros_like(labels), labels, 3).any()


@pytest.mark.parametrize("prediction, truth, message", [
    (np.zeros((2, 3), int), np.zeros((3, 2), int), "shape"),
    (np.full(4, 14), np.zeros(4, int), "prediction has labels 14..14"),
    (np.full(4, -1), np.zeros(4, int), "prediction has labels"),
    (np.zeros(4, int), np.array([0, 1, 14, 255]), "truth has labels 0..14"),
    (np.zeros(4), np.zeros(4, int), "integers"),
])
def test_counts_refuse_what_is_not_a_label(prediction, truth, message):
    with pytest.raises(ValueError, match=message):
        metrics.counts(prediction, truth, 14)


def test_dice():
    np.testing.assert_array_equal(metrics.dice([2, 0, 0, 3], [3, 1, 0, 3], [5, 0, 0, 3]), [0.5, 0, np.nan, 1])


# Five slices of four volumes, out of order; class 3 occurs nowhere. Intersection, prediction, truth by hand:
#           background   organ 1     organ 2
# a         11 13 12     4 4 4       2 3 4      perfect; partial
# b          7  9  8     0 0 2       0 1 0      empty prediction; empty truth
# c          7  7  7     0 0 0       3 3 3      absent; perfect
# d         10 10 10     0 0 0       0 0 0      background only
SLICES = [  # volume, truth, prediction
    ("a", "1111220000", "1111200000"),
    ("c", "2220000000", "2220000000"),
    ("b", "1100000000", "0000000002"),
    ("d", "0000000000", "0000000000"),
    ("a", "2200000000", "0200000002"),
]


@pytest.fixture
def toy():
    def labels(text):
        return np.array([list(map(int, text))], np.uint8)

    table = np.stack([metrics.counts(labels(p), labels(t), 4).T for _, t, p in SLICES])
    return table, np.array([volume for volume, _, _ in SLICES])


def test_volume_counts(toy):
    np.testing.assert_array_equal(metrics.volume_counts(*toy), [
        [[11, 13, 12], [4, 4, 4], [2, 3, 4], [0, 0, 0]],
        [[7, 9, 8], [0, 0, 2], [0, 1, 0], [0, 0, 0]],
        [[7, 7, 7], [0, 0, 0], [3, 3, 3], [0, 0, 0]],
        [[10, 10, 10], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
    ])
    with pytest.raises(ValueError, match="4 volume ids"):
        metrics.volume_counts(toy[0], toy[1][:4])


def test_pooled_dice(toy):
    np.testing.assert_allclose(metrics.pooled_dice(toy[0]), [70 / 76, 8 / 10, 10 / 14, np.nan])


BACKGROUND = (22 / 25 + 14 / 17 + 1 + 1) / 4  # the same in every per-volume convention


@pytest.mark.parametrize("convention, organs, mean", [
    # organ 1: a 1, b 0. organ 2: a 4/7, c 1. Volumes: a (1 + 4/7) / 2, b 0, c 1; d has no organ.
    (metrics.monai, [1 / 2, 11 / 14, np.nan], (11 / 14 + 0 + 1) / 3),
    # organ 1: a 1, b 0. organ 2: a 4/7, b 0, c 1.
    (metrics.nnunet, [1 / 2, 11 / 21, np.nan], (1 / 2 + 11 / 21) / 2),
    # organ 1: 1, 0, 0, 0. organ 2: 4/7, 0, 1, 0. organ 3: 0.
    (metrics.swinunetr, [1 / 4, 11 / 28, 0], (1 / 4 + 11 / 28) / 3),
    # organ 1: 1, 0, 0, 0. organ 2: 4/7, 1, 1, 0. organ 3: 0.
    (metrics.transunet, [1 / 4, 18 / 28, 0], (1 / 4 + 18 / 28) / 3),
])
def test_per_volume_conventions(toy, convention, organs, mean):
    per_class, average = convention(*toy)
    np.testing.assert_allclose(per_class, [BACKGROUND, *organs])
    assert isinstance(average, float) and average == pytest.approx(mean)


def test_summarise(toy):
    summary = metrics.summarise(*toy)
    assert summary.pop("organs") == [pytest.approx(0.8), pytest.approx(5 / 7), None]
    assert summary == pytest.approx({
        "mDS": (8 / 10 + 10 / 14) / 2,
        "mDice_with_background": (70 / 76 + 8 / 10 + 10 / 14) / 3,
        "per_volume_monai": 25 / 42,
        "per_volume_nnunet": 43 / 84,
        "per_volume_swinunetr": 3 / 14,
        "per_volume_transunet": 25 / 84,
    })


def test_an_organ_that_does_not_occur_counts_nowhere_even_where_it_is_predicted(toy):
    """Toolboxes' own conventions stay theirs: mmseg's mDice gives it 0."""
    table = toy[0].copy()
    table[1, 3, 1] = 9  # organ 3, of which there is no truth
    summary = metrics.summarise(table, toy[1])
    assert summary["mDS"] == pytest.approx((8 / 10 + 10 / 14) / 2) and summary["organs"][2] is None
    assert summary["mDice_with_background"] == pytest.approx((70 / 76 + 8 / 10 + 10 / 14 + 0) / 4)


def test_summarise_what_is_undefined_is_none_and_perfect_is_one():
    background = np.array([[[10, 10, 10], [0, 0, 0]]])
    assert json.loads(json.dumps(metrics.summarise(background, ["a"]), allow_nan=False)) == {
        "mDS": None, "mDice_with_background": 1, "per_volume_monai": None, "per_volume_nnunet": None,
        "per_volume_swinunetr": 0, "per_volume_transunet": 0, "organs": [None]}
    perfect = metrics.summarise(np.full((2, 14, 3), 5), [1, 2])
    assert perfect.pop("organs") == [1] * 13 and set(perfect.values()) == {1}
    with pytest.raises(ValueError, match="without slices"):
        metrics.summarise(np.zeros((0, 14, 3), np.int64), [])


def test_join_keeps_rows_and_ids_together(toy):
    table, ids = toy
    joined, names = metrics.join({"c": table[1:2], "a": table[[0, 4]]})
    np.testing.assert_array_equal(joined, table[[1, 0, 4]])
    assert names.tolist() == ["c", "a", "a"]
    both = np.stack([np.arange(12).reshape(2, 6)] * 2).astype(np.uint8)
    np.testing.assert_array_equal(metrics.count_slices(both, both, 12)[1], metrics.counts(both[1], both[1], 12).T)


def test_per_case_rows_are_sorted_and_leave_the_undefined_empty(toy):
    nan = math.nan
    surfaces = {v: np.array([[1.5 if v == "a" else nan, 0, 0.25], [2, 3, 4], [nan, 0, nan]]) for v in "abcd"}
    rows = evaluate.per_case(*toy, surfaces, dict(enumerate(("background", "x", "y", "z"))))
    assert [r[:3] for r in rows[:4]] == [["a", 0, "background"], ["a", 1, "x"], ["a", 2, "y"], ["a", 3, "z"]]
    assert rows[0][3:] == [11, 13, 12, "0.880000", "", "", ""]
    assert rows[1][3:] == [4, 4, 4, "1.000000", "1.500", "0.000", "0.250"]
    assert rows[3][3:] == [0, 0, 0, "", "", "0.000", ""] and len(rows) == 16
    assert rows[5][3:] == [0, 0, 2, "0.000000", "", "0.000", "0.250"]
    assert [len(r) for r in rows] == [len(evaluate.CASE_COLUMNS)] * 16


def test_hd95_means_and_how_many_volumes_they_are_of():
    """Organs in the columns. MONAI: volumes (1 + 4) / 2 and (8 + 2) / 2. TransUNet: all six cells."""
    nan = math.nan
    ours, transunet, monai = ([[1.0, nan, nan], [3.0, 8.0, nan]], [[6, 0, 0], [3, 9, 0]], [[1, 4, nan], [8, nan, 2]])
    told = distances.summarise_hd95(np.stack([ours, transunet, monai], -1))
    assert told == {"hd95_mm": 5.0, "hd95_mm_organs": [2.0, 8.0, None], "hd95_volumes": [2, 1, 0],
                    "hd95_transunet_voxels": 3.0, "hd95_monai_mm": 3.75}
    assert distances.summarise_hd95([[[nan, 0, nan]]]) == {
        "hd95_mm": None, "hd95_mm_organs": [None], "hd95_volumes": [0], "hd95_transunet_voxels": 0,
        "hd95_monai_mm": None}


def test_slices_to_look_at_go_from_worst_to_best():
    """Slices of two organs; slice 3 truly holds none and slice 4 holds one, which is half: it may be shown."""
    def row(*organs):
        return [[0, 0, 0], *organs]

    table = np.array([row([4, 5, 5], [5, 5, 5]), row([0, 2, 5], [0, 0, 3]), row([2, 4, 4], [2, 4, 4]),
                      row([0, 9, 0], [0, 0, 0]), row([1, 1, 1], [0, 0, 0])])
    assert evaluate.spread(table, 9) == [(1, 0.0), (2, 0.5), (0, pytest.approx(0.9)), (4, 1.0)]
    assert [i for i, _ in evaluate.spread(table, 2)] == [1, 4]
    assert evaluate.spread(table[3:4], 3) == []


def surface(mask, spacing):
    """Positions in mm of the voxels with a 6-neighbour outside the mask or the array."""
    inside = set(zip(*np.nonzero(mask), strict=True))
    steps = [s for s in itertools.product((-1, 0, 1), repeat=3) if sum(map(abs, s)) == 1]
    return np.array([v for v in inside if any(tuple(np.add(v, s)) not in inside for s in steps)]) * spacing


def percentile_95(values):
    """With linear interpolation, as numpy's default, which MedPy takes."""
    values = np.sort(values)
    place = 0.95 * (len(values) - 1)
    low = math.floor(place)
    return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def medpy_hd95(a, b):
    """MedPy's `hd95` of two surfaces by its definition: each voxel's distance to the other one, of both together."""
    pairs = np.linalg.norm(a[:, None] - b, axis=2)
    return percentile_95(np.concatenate([pairs.min(1), pairs.min(0)]))


def test_hd95_against_all_pairs():
    spacing = (3.0, 0.8, 1.3)
    z, y, x = np.ogrid[:9, :16, :14]
    truth = (z - 3) ** 2 / 9 + (y - 6) ** 2 / 25 + (x - 5) ** 2 / 16 <= 1
    prediction = (z - 4) ** 2 / 9 + (y - 8) ** 2 / 36 + (x - 3) ** 2 / 20 <= 1  # cut off by the array
    prediction[8, 15, 13] = True
    assert prediction[:, :, 0].any()
    pairs = np.linalg.norm(surface(prediction, spacing)[:, None] - surface(truth, spacing), axis=2)
    there, back = pairs.min(1), pairs.min(0)
    expected = percentile_95(np.concatenate([there, back]))
    assert distances.hd95(prediction, truth, spacing) == pytest.approx(expected, rel=1e-12)
    assert distances.hd95(truth, prediction, spacing) == pytest.approx(expected, rel=1e-12)
    assert abs(max(np.percentile(there, 95), np.percentile(back, 95)) - expected) > 0.01  # another definition


def test_hd95_of_single_voxels_equal_masks_and_empty_masks():
    a, b, empty = np.zeros((3, 6, 4, 4), np.uint8)
    a[1, 2, 2] = b[4, 2, 2] = 1
    assert distances.hd95(a, b, (2.5, 1, 1)) == 7.5
    assert distances.hd95(a, a, (2.5, 1, 1)) == 0
    for pair in ((a, empty), (empty, a), (empty, empty)):
        assert math.isnan(distances.hd95(*pair, (1, 1, 1)))
    with pytest.raises(ValueError, match="shape"):
        distances.hd95(a, b[1:], (1, 1, 1))


# Masks of 7 x 9 x 8 voxels that meet in all pairs: nothing, one voxel, a corner, all, a slab at the border, a ball that
# the border cuts, the same with islands, noise
MASKS = ("empty", "voxel", "corner", "full", "slab", "ball", "islands", "noise")


def mask(kind, seed=0):
    rng, out = np.random.default_rng(seed), np.zeros((7, 9, 8), bool)
    if kind in ("ball", "islands"):
        z, y, x = np.ogrid[:7, :9, :8]
        out = (z - 2 - seed) ** 2 / 9 + (y - 4) ** 2 / 12 + (x - 5) ** 2 / 8 <= 1
    where = {"voxel": (3, 4 + seed, 5), "corner": (0, 0, 0), "full": ..., "slab": np.s_[:, : 2 + seed],
             "islands": (6, 8)}
    if kind in where:
        out[where[kind]] = True
    return rng.random(out.shape) < 0.2 if kind == "noise" else out


def monai_input(labels, classes):
    return torch.from_numpy(np.stack([labels == c for c in range(classes)])[None])


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.7, 0.9)])
def test_hd95_is_medpys(spacing):
    shells = {(kind, seed): surface(mask(kind, seed), 1) for kind in MASKS for seed in (0, 1)}  # in voxels
    for pair in itertools.product(MASKS, MASKS):
        p, t = mask(pair[0]), mask(pair[1], 1)
        a, b = shells[pair[0], 0], shells[pair[1], 1]
        told = distances.hd95_organs(3 * p.astype(np.uint8), 3 * t.astype(np.uint8), spacing, 5)
        assert np.isnan(told[[0, 1, 3]][:, [0, 2]]).all() and not told[[0, 1, 3], 1].any()
        # TransUNet's rule around MedPy: 0 for what is missing
        assert told[2, 1] == pytest.approx(0 if "empty" in pair else medpy_hd95(a, b), rel=1e-12), pair
        if "empty" in pair:
            assert math.isnan(told[2, 0]) and math.isnan(distances.hd95(p, t, spacing))
        else:
            assert told[2, 0] == pytest.approx(medpy_hd95(a * spacing, b * spacing), rel=1e-12), pair
            assert distances.hd95(p, t, spacing) == pytest.approx(told[2, 0], rel=1e-12)


@pytest.mark.filterwarnings("ignore:.*is all 0:UserWarning")
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.7, 0.9)])
def test_hd95_monai_is_monais(spacing):
    monai = pytest.importorskip("monai.metrics", reason="MONAI is not installed: pip install monai")
    apart = 0
    for pair in itertools.product(MASKS, MASKS):
        p, t = mask(pair[0]).astype(np.uint8), mask(pair[1], 1).astype(np.uint8)
        ours, _, told = distances.hd95_organs(p, t, spacing, 2)[0]
        expected = monai.compute_hausdorff_distance(monai_input(p, 2), monai_input(t, 2), percentile=95,
                                                    spacing=spacing).item()
        assert told == pytest.approx(expected, rel=1e-6, nan_ok=True), pair
        apart = max(apart, abs(told - ours))
    assert apart > 1  # no two names for one thing


def volumes_of_labels(classes=6):
    """Eight volumes of noise, (prediction, truth) each, of which some lack organs: in truth, prediction or both."""
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, classes, (8, 2, 6, 7, 8)).astype(np.uint8)
    pairs[:, 0][rng.random((8, 6, 7, 8)) < 0.5] = 0
    for volume, side, organ in ((0, 1, 1), (1, 0, 1), (2, 0, 2), (2, 1, 2), (3, 1, 3), (4, 0, 4)):
        pairs[volume, side][pairs[volume, side] == organ] = 0
    pairs[5, 1] = pairs[6] = pairs[:, 1][pairs[:, 1] == 5] = 0  # no organ in truth; in neither; none of organ 5's truth
    return pairs


@pytest.mark.filterwarnings("ignore:.*is all 0:UserWarning")
def test_means_of_hd95_are_monais():
    monai = pytest.importorskip("monai.metrics", reason="MONAI is not installed: pip install monai")
    metric = monai.HausdorffDistanceMetric(percentile=95)  # by default without background, reduction "mean"
    spacing, found = (3.0, 0.7, 0.9), []
    for p, t in volumes_of_labels():
        metric(monai_input(p, 6), monai_input(t, 6), spacing=spacing)
        found.append(distances.hd95_organs(p, t, spacing, 6))
    told = distances.summarise_hd95(found)
    assert told["hd95_monai_mm"] == pytest.approx(metric.aggregate().item(), rel=1e-6)
    assert told["hd95_volumes"] == [4, 5, 5, 5, 0]


def test_dice_of_the_csv_is_that_of_monai():
    """From the counts in dice.csv, as its readers would: what equals which settings of DiceMetric."""
    monai = pytest.importorskip("monai.metrics", reason="MONAI is not installed: pip install monai")
    pairs, names = volumes_of_labels(), tuple("012345")
    table, ids = metrics.join({v: metrics.count_slices(p, t, 6) for v, (p, t) in enumerate(pairs)})
    rows = evaluate.per_case(table, ids, dict(enumerate(np.zeros((8, 5, 3)))), dict(enumerate(names)))
    table = np.array([r[3:6] for r in rows]).reshape(8, 6, 3)  # a row a volume is a table, too

    def theirs(together=False, **settings):
        metric = monai.DiceMetric(**settings)
        given = [np.concatenate(pairs, 1)] if together else pairs  # the whole set as one volume
        for p, t in given:
            metric(monai_input(p, 6), monai_input(t, 6))
        return metric.aggregate().numpy()

    def close(value):
        return pytest.approx(value, rel=1e-6, nan_ok=True)

    told = metrics.summarise(table, range(8))
    per_class, mean = metrics.monai(table, range(8))
    assert mean == told["per_volume_monai"] == close(theirs(include_background=False).item())
    assert per_class[:5] == close(theirs(reduction="mean_batch")[:5])
    assert math.isnan(per_class[5]) and theirs(reduction="mean_batch")[5] == 0  # organ 5: nothing defined
    scores = theirs(include_background=False, reduction="none")
    assert told["per_volume_swinunetr"] == close(np.nan_to_num(scores).mean())  # 0 where theirs is NaN
    assert told["mDS"] == close(theirs(True, include_background=False).item())
    assert [math.nan if d is None else d for d in told["organs"]] == close(
        theirs(True, include_background=False, reduction="none")[0])
    ignored = theirs(True, ignore_empty=False)  # organ 5 is predicted: 0, as in mmseg
    assert told["mDice_with_background"] == close(ignored.item())
    # 1 where both are empty and 0 where the truth is, in each volume: a convention of MONAI's that is none of ours
    others = theirs(include_background=False, ignore_empty=False).item()
    assert all(abs(others - v) > 1e-3 for v in told.values() if isinstance(v, float))


def test_dice_of_transunet_is_their_rule_around_medpy():
    pairs = volumes_of_labels()
    table, ids = metrics.join({v: metrics.count_slices(p, t, 6) for v, (p, t) in enumerate(pairs)})

    def rule(p, t):
        """1 where only the prediction has the organ, 0 where it has none, else MedPy's `dc`, counted voxel by voxel."""
        p, t = (set(map(tuple, np.argwhere(m).tolist())) for m in (p, t))
        return (2 * len(p & t) / (len(p) + len(t)) if t else 1) if p else 0

    scores = np.array([[rule(p == c, t == c) for c in range(1, 6)] for p, t in pairs])
    assert metrics.summarise(table, ids)["per_volume_transunet"] == pytest.approx(scores.mean(), rel=1e-12)
    np.testing.assert_allclose(metrics.transunet(table, ids)[0][1:], scores.mean(0), rtol=1e-12)


def test_mean_std():
    assert metrics.mean_std([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)))
    assert metrics.mean_std([4.5]) == (4.5, None)
    with pytest.raises(ValueError):
        metrics.mean_std([])
