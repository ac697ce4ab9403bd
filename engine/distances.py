"""HD95: the 95th percentile of the distances between two surfaces, as three conventions have it.

MedPy's in mm is the headline; published tables also mean MedPy's without spacing (TransUNet) and MONAI's.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from metrics import nan_mean, plain

HD95 = ("hd95_mm", "hd95_transunet_voxels", "hd95_monai_mm")  # see hd95_organs
ABSENT = (math.nan, 0.0, math.nan)  # what each is for an organ that is missing in truth or prediction


def surface_distances(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> list[np.ndarray]:
    """Distances of all surface voxels of one mask (Z, Y, X) to the other's surface: from the prediction, and back.

    A surface is a mask minus its erosion by the 6-neighbourhood, outside the array being background. In the unit of
    spacing (z, y, x); a lone NaN each when either mask is empty. Raises ValueError for differing shapes.
    """
    masks = np.asarray(prediction, bool), np.asarray(truth, bool)
    if masks[0].shape != masks[1].shape:
        raise ValueError(f"prediction {masks[0].shape} and truth {masks[1].shape} differ in shape")
    if not (masks[0].any() and masks[1].any()):
        return [np.array([math.nan])] * 2
    # (surface voxels, 3) of each mask, in the unit of spacing
    surfaces = [np.argwhere(mask & ~ndimage.binary_erosion(mask)) * np.asarray(spacing) for mask in masks]
    return [KDTree(other).query(surface)[0] for surface, other in (surfaces, surfaces[::-1])]


def hd95(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> float:
    """95th percentile of the surface distance, in mm, of two masks (Z, Y, X), spacing (z, y, x) in mm.

    MedPy's definition: the percentile is that of both directions' distances together, not the larger of two.
    NaN when either mask is empty. Raises ValueError for differing shapes.
    """
    return float(np.percentile(np.concatenate(surface_distances(prediction, truth, spacing)), 95))


def hd95_organs(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float], classes: int) -> np.ndarray:
    """Of the organs 1..classes-1 of one volume's labels (Z, H, W), spacing (z, y, x) in mm: (organs, 3), see HD95.

    `hd95_mm`: `hd95`. `hd95_transunet_voxels`: TransUNet's `calculate_metric_percase`, copied by many, which calls
    MedPy without spacing; an organ missing in truth or prediction is worth 0, the best there is (!).
    `hd95_monai_mm`: MONAI's `compute_hausdorff_distance`, the larger of the two directions' percentiles.
    """
    found = np.tile(ABSENT, (classes - 1, 1))
    boxes = (ndimage.find_objects(labels, classes - 1) for labels in (prediction, truth))
    for c, both in enumerate(zip(*boxes, strict=True), 1):
        if None not in both:  # nothing outside of the two boxes is on a surface
            box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(*both, strict=True))
            masks = prediction[box] == c, truth[box] == c
            directed = surface_distances(*masks, spacing)
            found[c - 1] = (np.percentile(np.concatenate(directed), 95), hd95(*masks, (1, 1, 1)),
                            max(np.percentile(d, 95) for d in directed))
    return found


def summarise_hd95(distances: np.ndarray) -> dict[str, float | list | None]:
    """`hd95_organs` of each volume, (V, organs, 3) -> every convention's mean, and how many volumes `hd95_mm` is of.

    `hd95_mm`: the mean over organs of `hd95_mm_organs`. An organ that is not predicted at all has no surface: its
    volume is left out, so a distance is to be read together with `hd95_volumes` and with the Dice. MONAI leaves it
    out, too, and means over the organs of each volume first; TransUNet leaves nothing out.
    """
    medpy, transunet, monai = np.moveaxis(np.asarray(distances, float), -1, 0)  # (V, organs) each
    organs = nan_mean(medpy, 0)
    means = (nan_mean(organs), transunet.mean(), nan_mean(nan_mean(monai, 1)))
    return {**{name: plain(mean) for name, mean in zip(HD95, means, strict=True)},
            "hd95_mm_organs": [plain(d) for d in organs], "hd95_volumes": (~np.isnan(medpy)).sum(0).tolist()}
