"""metrics.py against loops over pixels, numbers worked out by hand, and all pairs of surface voxels."""

import itertools
import json
import math

import numpy as np
import pytest

import metrics


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
    distances = {v: [1.5 if v == "a" else math.nan, 2.0, math.nan] for v in "abcd"}
    rows = metrics.per_case(*toy, distances, ("background", "x", "y", "z"))
    assert [r[:3] for r in rows[:4]] == [["a", 0, "background"], ["a", 1, "x"], ["a", 2, "y"], ["a", 3, "z"]]
    assert rows[0][3:] == [11, 13, 12, "0.880000", ""] and rows[1][3:] == [4, 4, 4, "1.000000", "1.500"]
    assert rows[3][3:] == [0, 0, 0, "", ""] and rows[5][3:] == [0, 0, 2, "0.000000", ""] and len(rows) == 16


def test_hd95_means_and_how_many_volumes_they_are_of():
    nan = math.nan
    told = metrics.summarise_hd95([[1.0, nan, nan], [3.0, 8.0, nan]])
    assert told == {"hd95_mm": 5.0, "hd95_mm_organs": [2.0, 8.0, None], "hd95_volumes": [2, 1, 0]}
    assert metrics.summarise_hd95([[nan]]) == {"hd95_mm": None, "hd95_mm_organs": [None], "hd95_volumes": [0]}


def test_slices_to_look_at_go_from_worst_to_best():
    """Slices of two organs; slice 3 truly holds none and slice 4 holds one, which is half: it may be shown."""
    def row(*organs):
        return [[0, 0, 0], *organs]

    table = np.array([row([4, 5, 5], [5, 5, 5]), row([0, 2, 5], [0, 0, 3]), row([2, 4, 4], [2, 4, 4]),
                      row([0, 9, 0], [0, 0, 0]), row([1, 1, 1], [0, 0, 0])])
    assert metrics.spread(table, 9) == [(1, 0.0), (2, 0.5), (0, pytest.approx(0.9)), (4, 1.0)]
    assert [i for i, _ in metrics.spread(table, 2)] == [1, 4]
    assert metrics.spread(table[3:4], 3) == []


def surface(mask, spacing):
    """Positions in mm of the voxels with a 6-neighbour outside the mask or the array."""
    inside = set(zip(*np.nonzero(mask), strict=True))
    steps = [s for s in itertools.product((-1, 0, 1), repeat=3) if sum(map(abs, s)) == 1]
    return np.array([v for v in inside if any(tuple(np.add(v, s)) not in inside for s in steps)]) * spacing


def test_hd95_against_all_pairs():
    spacing = (3.0, 0.8, 1.3)
    z, y, x = np.ogrid[:9, :16, :14]
    truth = (z - 3) ** 2 / 9 + (y - 6) ** 2 / 25 + (x - 5) ** 2 / 16 <= 1
    prediction = (z - 4) ** 2 / 9 + (y - 8) ** 2 / 36 + (x - 3) ** 2 / 20 <= 1  # cut off by the array
    prediction[8, 15, 13] = True
    assert prediction[:, :, 0].any()
    pairs = np.linalg.norm(surface(prediction, spacing)[:, None] - surface(truth, spacing), axis=2)
    there, back = pairs.min(1), pairs.min(0)
    distances = np.sort(np.concatenate([there, back]))
    place = 0.95 * (len(distances) - 1)
    low = math.floor(place)
    expected = distances[low] + (place - low) * (distances[low + 1] - distances[low])
    assert metrics.hd95(prediction, truth, spacing) == pytest.approx(expected, rel=1e-12)
    assert metrics.hd95(truth, prediction, spacing) == pytest.approx(expected, rel=1e-12)
    assert abs(max(np.percentile(there, 95), np.percentile(back, 95)) - expected) > 0.01  # another definition


def test_hd95_of_single_voxels_equal_masks_and_empty_masks():
    a, b, empty = np.zeros((3, 6, 4, 4), np.uint8)
    a[1, 2, 2] = b[4, 2, 2] = 1
    assert metrics.hd95(a, b, (2.5, 1, 1)) == 7.5
    assert metrics.hd95(a, a, (2.5, 1, 1)) == 0
    for pair in ((a, empty), (empty, a), (empty, empty)):
        assert math.isnan(metrics.hd95(*pair, (1, 1, 1)))
    with pytest.raises(ValueError, match="shape"):
        metrics.hd95(a, b[1:], (1, 1, 1))


def test_mean_std():
    assert metrics.mean_std([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)))
    assert metrics.mean_std([4.5]) == (4.5, None)
    with pytest.raises(ValueError):
        metrics.mean_std([])
