"""Label maps: the ids of a file -> classes on the grid of its volume."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from ct.command import counted
from ct.volumes import BadInput, Volume, corner_shift, display, load, scaled

UNKNOWN = 255  # no class: in a label map, ids that the task does not have
HIGHEST_ID = 65535  # of a label: predictions are written with 16 bits at most
ROUNDED = 0.05  # by how much a label may lie beside a whole number (editing in floats leaves 2.9999)


def check_labels(pairs: Iterable[tuple[object, object]], path: Path) -> dict[int, str]:
    """{id: name} ascending, of (id, name) as `path` has them. Raises BadInput where they are not one name for one id,
    with the background at 0, or too many.
    """
    labels: dict[int, str] = {}
    for key, name in pairs:
        if not re.fullmatch("[0-9]{1,9}", str(key)) or int(key) > HIGHEST_ID:
            raise BadInput(f"{path}: {key} is not a label id; ids are whole numbers from 0 to {HIGHEST_ID}")
        if not isinstance(name, str) or not name.strip() or not name.strip().isprintable():
            raise BadInput(f"{path}: label id {key} has no name; found {name!r}, expected text")
        key, name = int(key), name.strip()
        if key in labels:
            raise BadInput(f"{path}: two names for label id {key}, {labels[key]} and {name}")
        if name in labels.values():
            raise BadInput(f"{path}: label id {key} has the same name as another, {name}")
        labels[key] = name
    if labels.get(0, "").lower() != "background":
        raise BadInput(f"{path}: label id 0 is {labels.get(0, 'missing')}; it must be there, and be the background")
    if len(labels) > UNKNOWN:
        raise BadInput(f"{path}: {len(labels) - 1} labels beside the background; at most {UNKNOWN - 1} are possible")
    return dict(sorted(labels.items())) | {0: "background"}


def read_labels(path: Path | list[Path], volume: Volume, ids: int | Sequence[int],
                odd: list[str] | None = None) -> np.ndarray:
    """Read the label map of a volume: (Z, Y, X) uint8, class c where the file has the c-th of `ids` (n: 0..n-1).

    Several files are masks of 0 and 1, the first that of class 1; where two overlap, the later has the voxel. Values
    within ROUNDED of a whole number are rounded. A line on each of these is appended to `odd`. Raises BadInput when a
    file is unreadable, lies on another grid than the volume (shape, or an affine that moves a corner by over a tenth
    of a voxel), or holds anything but those ids.
    """
    if isinstance(path, list):
        labels, several = np.zeros(volume.stored.shape, np.uint8), np.zeros(volume.stored.shape, bool)
        for c, part in enumerate(path, 1):
            mask = read_labels(part, volume, 2, odd).view(bool)
            several |= mask & (labels > 0)
            labels[mask] = c
        if odd is not None and several.any():
            odd.append(f"{counted(int(several.sum()), 'voxel')} in several organs; the later in the list keeps them")
        return labels
    path = Path(path)
    data, header, affine = load(path)
    # a volume is the file's grid with its axes permuted and flipped: compare in the file's own order
    own = tuple(int(d) for d in volume.header["dim"][1:4])
    if data.shape != own:
        raise BadInput(f"{path}: label of {data.shape} voxels for an image of {own} ({volume.path.name}); "
                       "they must be on one grid")
    shift = corner_shift(own, affine, volume.affine)
    if shift > 0.1 * min(volume.spacing):
        raise BadInput(f"{path}: its affine differs from that of {volume.path.name} by up to {shift:.2f} mm; "
                       "label and image must be on one grid")
    ids = range(ids) if isinstance(ids, int) else ids
    classes = np.full(max(ids) + 1, UNKNOWN, np.uint8)
    classes[list(ids)] = range(len(ids))
    stored = display(data, affine)
    labels, away = np.empty(stored.shape, np.uint8), 0
    for out, (whole, rounded) in zip(labels, _whole(path, stored, header), strict=True):
        low, high = whole.min(), whole.max()
        unknown = [low] if low < 0 else [high] if high >= len(classes) else []  # infinity, too
        if not unknown and len(classes) == len(ids):
            out[:] = whole
        elif not unknown:
            out[:] = classes[whole.astype(np.intp)]
            unknown = whole[out == UNKNOWN]
        if len(unknown):
            expected = f"0 to {max(ids)}" if len(classes) == len(ids) else ", ".join(map(str, ids))
            raise BadInput(f"{path}: unknown label id {unknown[0]:.0f}; expected {expected}")
        away += rounded
    if away and odd is not None:
        odd.append(f"{counted(away, 'voxel')} of {path.name} hold nearly whole numbers, which were rounded")
    return labels


def label_ids(path: Path) -> list[int]:
    """The ids that a label map holds, ascending. Raises BadInput when it is unreadable, or no label map."""
    data, header, affine = load(path)
    seen = np.zeros(HIGHEST_ID + 1, bool)
    for whole, _ in _whole(path, display(data, affine), header):
        low, high = whole.min(), whole.max()
        if low < 0 or high > HIGHEST_ID:
            raise BadInput(f"{path}: label ids {low:.0f} to {high:.0f}; expected 0 to {HIGHEST_ID}")
        seen[whole.astype(np.intp)] = True
    return np.flatnonzero(seen).tolist()


def _whole(path: Path, stored: np.ndarray, header: nib.Nifti1Header) -> Iterator[tuple[np.ndarray, int]]:
    """Of each slice of a label map: its values as whole numbers, and how many were rounded. Raises BadInput."""
    for part in stored:
        part = scaled(part, header)
        if part.dtype.kind != "f":
            yield part, 0
            continue
        whole = np.rint(part)
        if not np.isclose(part, whole, rtol=0, atol=ROUNDED).all():
            raise BadInput(f"{path}: label values are not all whole numbers; resample labels by nearest neighbour")
        yield whole, int((part != whole).sum())
