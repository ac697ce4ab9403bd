"""Every Dice from one table of counts, the effective rank, and the means of Tables 1 and 2.

The table is int64 (slices, classes, 3): of each slice and class the pixels of the intersection, of the
prediction and of the truth; class 0 is background. "Mean Dice" differs between toolboxes by as much as the
methods compared with it, so each convention is a reduction of this one table, named after its source. They
differ in the unit (the whole set, or a volume), in whether background is averaged in, and in what an organ
absent from a volume's truth is worth. All Dice lie in [0, 1]; NaN is "undefined".
"""

import statistics
from collections.abc import Sequence

import numpy as np

IGNORE = 255  # the label of pixels that count nowhere
LEAST_GAP = 0.02  # similarity margin, cosine of two views of a slice less that of two slices; below it all look alike

# -------------------------------------------------------------------------------------------------------- counts


def counts(prediction: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Labels of equal shape, one slice or more -> int64 (3, classes): intersection, prediction, truth.

    Its transpose is a row of the table. Pixels whose truth is 255 are left out of all three.
    Raises ValueError for differing shapes, labels that are not integers, and labels outside 0..classes-1.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in shape")
    for name, labels in (("prediction", prediction), ("truth", truth)):
        if labels.dtype.kind not in "iu":
            raise ValueError(f"{name} has labels of type {labels.dtype}; expected integers")
    counted = truth != IGNORE
    prediction, truth = prediction[counted].astype(np.int64), truth[counted].astype(np.int64)  # (pixels,)
    for name, labels in (("prediction", prediction), ("truth", truth)):
        if labels.size and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(f"{name} has labels {labels.min()}..{labels.max()}; expected 0..{classes - 1}")
    confusion = np.bincount(truth * classes + prediction, minlength=classes**2).reshape(classes, classes)  # (T, P)
    return np.stack([confusion.diagonal(), confusion.sum(0), confusion.sum(1)])  # (3, classes)


def count_slices(prediction: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Labels (Z, H, W) of a volume -> its rows of the table, (Z, classes, 3). Raises as `counts`."""
    return np.stack([counts(p, t, classes).T for p, t in zip(prediction, truth, strict=True)])  # (Z, classes, 3)


def dice(intersection: np.ndarray, prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """2 I / (P + T), elementwise, float64 of the arguments' shape; NaN where P + T is zero."""
    total = np.asarray(prediction) + np.asarray(truth)  # P + T
    undefined = np.full(total.shape, np.nan)
    return np.divide(2.0 * np.asarray(intersection), total, out=undefined, where=total > 0)


def volume_counts(table: np.ndarray, volumes: Sequence) -> np.ndarray:
    """Table (slices, classes, 3) and each slice's volume id -> (V, classes, 3), sorted by id.

    Raises ValueError when the ids are not one per slice.
    """
    if len(volumes) != len(table):
        raise ValueError(f"{len(volumes)} volume ids for a table of {len(table)} slices")
    ids, index = np.unique(np.asarray(volumes), return_inverse=True)  # (V,), (slices,)
    summed = np.zeros((len(ids), *table.shape[1:]), np.int64)  # (V, classes, 3)
    np.add.at(summed, index, table)
    return summed


def join(tables: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Volume id -> its rows, (Z, classes, 3) each -> the table of them all and, in the same order, each slice's id."""
    return np.concatenate(list(tables.values())), np.repeat(list(tables), [len(t) for t in tables.values()])


def pooled_dice(table: np.ndarray) -> np.ndarray:
    """Dice of the counts summed over the whole set: (classes,); NaN for a class that occurs nowhere.

    mmsegmentation's unit: its `mDice` (IoUMetric) is the nan-mean of all classes, background included. The
    mean Dice score (mDS) reported here is the nan-mean of the organs alone.
    """
    return dice(*np.moveaxis(table.sum(0), -1, 0))  # (classes, 3) -> three of (classes,) -> (classes,)


def monai(table: np.ndarray, volumes: Sequence) -> tuple[np.ndarray, float]:
    """MONAI's DiceMetric by default: a volume whose truth lacks a class is left out for that class.

    Returns the means over volumes (classes,), its reduction "mean_batch", and the scalar of its default
    reduction "mean": over the organs of each volume first, then over volumes. Where nothing is defined both
    are NaN, MONAI's are 0. MONAI's default also averages background in; here, as in the others, it is not.
    """
    intersection, prediction, truth = np.moveaxis(volume_counts(table, volumes), -1, 0)  # (V, classes) each
    scores = np.where(truth > 0, dice(intersection, prediction, truth), np.nan)  # (V, classes)
    return nan_mean(scores, 0), float(nan_mean(nan_mean(scores[:, 1:], 1)))  # (classes,); (V, organs) -> (V,) -> ()


def nnunet(table: np.ndarray, volumes: Sequence) -> tuple[np.ndarray, float]:
    """nnU-Net's `compute_metrics_on_folder`: NaN if both truth and prediction are empty, else Dice.

    So 0 if one of them is. Returns the nan-means over volumes (classes,) and their mean over the organs, from
    which an organ that is NaN in every volume is dropped; nnU-Net's own `foreground_mean` is then NaN.
    """
    per_class = nan_mean(dice(*np.moveaxis(volume_counts(table, volumes), -1, 0)), 0)  # (V, classes) -> (classes,)
    return per_class, float(nan_mean(per_class[1:]))


def swinunetr(table: np.ndarray, volumes: Sequence) -> tuple[np.ndarray, float]:
    """The test script of SwinUNETR for BTCV: 0 wherever the truth is empty, even if the prediction is too.

    Returns the means over volumes (classes,) and their mean over the organs; nothing is left out, so the
    order of averaging does not matter.
    """
    intersection, prediction, truth = np.moveaxis(volume_counts(table, volumes), -1, 0)  # (V, classes) each
    per_class = np.where(truth > 0, dice(intersection, prediction, truth), 0.0).mean(0)  # (V, classes) -> (classes,)
    return per_class, float(per_class[1:].mean())


def transunet(table: np.ndarray, volumes: Sequence) -> tuple[np.ndarray, float]:
    """TransUNet's `calculate_metric_percase`, copied by many: an organ predicted where none is scores 1 (!).

    Dice where truth and prediction are both non-empty, 1 where only the truth is empty, 0 where the
    prediction is empty (both empty included). Returns as `swinunetr`.
    """
    intersection, prediction, truth = np.moveaxis(volume_counts(table, volumes), -1, 0)  # (V, classes) each
    scores = np.where(truth > 0, dice(intersection, prediction, truth), 1.0)  # (V, classes)
    per_class = np.where(prediction > 0, scores, 0.0).mean(0)  # (classes,)
    return per_class, float(per_class[1:].mean())


def summarise(table: np.ndarray, volumes: Sequence) -> dict[str, float | list[float | None] | None]:
    """Every convention's mean, in [0, 1], as plain numbers for a log; None where undefined.

    `mDS`, the headline: counts pooled over the set, mean over the organs that occur in its truth (one that does not
    has no Dice, whatever is predicted): MONAI's DiceMetric without background of the whole set as one volume.
    `mDice_with_background`: mmseg's, where an organ that does not occur, predicted, is worth 0.
    `per_volume_{monai,nnunet,swinunetr,transunet}`: means over organs. `organs`: the pooled Dice of classes 1, 2, ...,
    None for those that do not occur. Raises ValueError as `volume_counts`, and for an empty table.
    """
    if not len(table):
        raise ValueError("a table without slices has no Dice")
    pooled = pooled_dice(table)  # (classes,)
    organs = np.where(table[:, 1:, 2].sum(0) > 0, pooled[1:], np.nan)  # (classes - 1,)
    means = {"mDS": nan_mean(organs), "mDice_with_background": nan_mean(pooled)}
    means |= {f"per_volume_{convention.__name__}": convention(table, volumes)[1]
              for convention in (monai, nnunet, swinunetr, transunet)}
    return {**{name: plain(mean) for name, mean in means.items()}, "organs": [plain(d) for d in organs]}


# ------------------------------------------------------------------------------------------------------- spectrum


def singular_values(vectors: np.ndarray) -> np.ndarray:
    """Descending singular values of the centred covariance (1 / (n - 1)) of vectors (n, d): (d,) float64.

    The covariance is symmetric and has no negative eigenvalue, so these are its eigenvalues.
    """
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)  # (n, d)
    values = np.linalg.svd(centred, compute_uv=False) ** 2 / (len(vectors) - 1)  # (min(n, d),)
    return np.pad(values, (0, vectors.shape[1] - len(values)))  # (d,)


def effective_rank(values: np.ndarray) -> float:
    """exp(-sum p ln p), p = l / sum(l), for the eigenvalues l >= 0 of a covariance (Roy and Vetterli, 2007)."""
    share = values[values > 0] / values.sum()  # p (r,), r values above 0; sums to one
    return float(np.exp(-(share * np.log(share)).sum()))


def rankme(vectors: np.ndarray) -> float:
    """The same of the singular values of the vectors (n, d) themselves, neither centred nor squared (Garrido et al.,
    RankMe, ICML 2023): what others mean by it. Of one backbone the two are different numbers.
    """
    return effective_rank(np.linalg.svd(vectors.astype(np.float64), compute_uv=False))


# --------------------------------------------------------------------------------------------------------- tables


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation with n - 1, as over the draws of Table 1; None for a single value.

    Raises ValueError for no value.
    """
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def nan_mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """numpy's nanmean, silent where every value is NaN (the result is NaN there)."""
    defined = ~np.isnan(values)
    number = np.asarray(defined.sum(axis))  # of the values without `axis`, as all below
    total = np.where(defined, values, 0).sum(axis)
    return np.divide(total, number, out=np.full(number.shape, np.nan), where=number > 0)


def plain(value: float) -> float | None:
    """A number for a log; None for NaN."""
    return None if np.isnan(value) else float(value)
