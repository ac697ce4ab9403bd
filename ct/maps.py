"""A CT, or a map of labels, distances or doses: what the voxels say, whatever the name.

A CT has noise: going along a row it turns up and down all the time. What was drawn or computed on its grid does not: it
is blocky or smooth, and a label map has few values.
"""

from pathlib import Path

import numpy as np

from ct import volumes
from ct.judgement import GREYS
from ct.volumes import BadInput

# The share of pixels that are a peak or a trough of their row, `turns`: 0.3 to 0.6 in real CT and in the phantom, also
# where it was JPEG-compressed or resampled to 3 mm, and 0.11 when smoothed by a Gaussian of 3 pixels; 0.02 to 0.05 in
# label maps, 0.02 in distances from one of their organs.
TURNS = 0.1
PLANES = 16  # that are not constant, of a file whose name is unsure


def turns(rows: np.ndarray) -> float:
    """Of the pixels of (..., X), where a row is not constant, the share that is a peak or a trough of its row; of every
    second pixel, if that is more: a CT may have been doubled by nearest neighbour.

    Scaling changes nothing. 0 where every row is constant.
    """
    shares = [0.0]
    for part in (rows, rows[..., ::2]):
        steps = np.sign(np.diff(part.astype(np.float32), axis=-1))
        before, after = steps[..., :-1], steps[..., 1:]
        if moving := np.count_nonzero((before != 0) | (after != 0)):
            shares.append(np.count_nonzero(before * after < 0) / moving)
    return max(shares)


def shows_ct(path: Path) -> bool | None:
    """Whether the first planes of a file that are not constant are those of a CT; None where they cannot be read.

    A CT is known after a plane or two; of a label map PLANES are looked at.
    """
    seen, values = [], np.empty(0)
    try:
        for plane in volumes.planes(path):
            if plane.min() == plane.max():
                continue
            seen.append(turns(plane.T))  # (Y, X)
            values = np.union1d(values, plane)
            if len(values) >= GREYS and np.median(seen) >= TURNS:
                return True
            if len(seen) == PLANES:
                break
    except BadInput:
        return None
    return False


def refuse_smooth(read: volumes.Volume) -> None:
    """Raise BadInput for a volume that is as smooth as no CT is, by four of its slices."""
    slices, rows, _ = read.stored.shape
    share = turns(read.stored[:: 1 + slices // 4, :: 1 + rows // 256])
    if share < TURNS / 2:
        raise BadInput(f"{read.path}: no CT by its voxels, as smooth as a distance, a dose or a label map: {share:.1%} "
                       f"of them are a peak or a trough of their row, in a CT over {TURNS:.0%}; leave it out")
