"""A data folder read: its volumes as 8-bit slices with their records, and the task of its labels."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ct import layouts, maps, pool, repeats, tasks
from ct.intake import find_volumes, judge
from ct.judgement import SOFT, bulk
from ct.label_maps import label_ids, read_labels
from ct.organs import measure
from ct.stores import SPLITS, name_of, recorded_label_ids
from ct.tasks import BTCV, Task
from ct.volumes import BadInput, Volume, read_volume


def window_to_uint8(hu: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """HU -> 0..255 over the window, rounded to the nearest level; float32 in, uint8 out."""
    low, high = window
    levels = np.subtract(hu, np.float32(low))
    levels *= np.float32(255 / (high - low))
    levels += np.float32(0.5)
    return np.clip(levels, 0, 255, out=levels).astype(np.uint8)


def levels(volume: Volume, window: tuple[float, float]) -> tuple[np.ndarray, float, float]:
    """A volume's 8-bit slices (Z, Y, X) over a window of HU, its lowest and its highest HU.

    Slice by slice: each stays in the processor's cache, and there is no whole volume in float32.
    """
    out, ends = np.empty(volume.stored.shape, np.uint8), []
    for z, level in enumerate(out):
        hu = volume.slice(z)
        ends.append((hu.min(), hu.max()))
        level[:] = window_to_uint8(hu, window)
    lows, highs = zip(*ends, strict=True)
    return out, float(min(lows)), float(max(highs))


def read_ct(path: Path, window: tuple[float, float]) -> tuple[Volume, np.ndarray, tuple[float, float], list[str]]:
    """What every command makes of a file: (the volume, its 8-bit slices, its lowest and highest HU, its warnings).

    Raises BadInput when it is unreadable, or no CT in HU, or no stack of axial slices.
    """
    read = read_volume(path)
    slices, low, high = levels(read, window)
    odd = judge(read)
    maps.refuse_smooth(read)
    return read, slices, (low, high), odd


def over_soft(volume: Volume, slices: np.ndarray, window: tuple[float, float]) -> Iterable[np.ndarray]:
    """A volume's 8-bit slices over SOFT: its `slices`, if theirs is that window."""
    if tuple(window) == SOFT:
        return slices
    return (window_to_uint8(volume.slice(z), SOFT) for z in range(len(slices)))


def describe(volume: dict, task: Task | None,
             window: tuple[float, float]) -> tuple[dict, np.ndarray, np.ndarray | None]:
    """(a volume's record, its 8-bit slices, its labels for segmentation; both (Z, Y, X) uint8). Raises BadInput."""
    read, slices, (low, high), odd = read_ct(volume["image"], window)
    record = {"id": volume["id"], "file": str(volume["image"]), "phantom": read.is_phantom, "spacing": read.spacing,
              "shape": list(slices.shape), "slices": len(slices), "hu": [low, high],
              "bulk": list(bulk(read.sample)), "slice_sums": repeats.slice_sums(over_soft(read, slices, window)),
              "odd": odd}
    if task is None:
        odd += repeats.within(record["slice_sums"], slices, None, read.path)
        return record, slices, None
    if volume["label"] is None:
        raise BadInput(f"{volume['image']}: has no label {Path('label', volume['image'].name.replace('img', 'label'))}")
    labels = read_labels(volume["label"], read, task.ids, record["odd"])
    odd += repeats.within(record["slice_sums"], slices, labels, read.path)
    if not labels.any():
        if not task.negatives:
            raise BadInput(f"{volume['label']}: an empty label, all background; it would train nothing")
        record["odd"].append("an empty label, all background; kept as a negative")
    record["voxels"], record["organs"] = measure(read, labels, len(task.ids))
    if ids := task.recorded_ids:
        record["ids"] = ids
    return record, slices, labels


def find(data: Path, kind: str, names: Path | None = None, organs: Sequence[str] | None = None,
         images: Sequence[str] | None = None) -> layouts.Found:
    """What a data folder holds: as `layouts.find` says, or for "pretrain" `intake.find_volumes`. Raises BadInput."""
    if kind == "pretrain":
        return layouts.Found("images", None, *find_volumes(data, kind, images))
    return layouts.find(data, names, organs)


def task_in(data: Path, store: Path, found: layouts.Found, folder: Path, workers: int | None) -> Task:
    """What there is to segment in `data`; where the labels have no names, every id that its label files hold.

    The ids of what is in the store's `folder` are known; other label files are read. Raises BadInput where there are
    none but the background's.
    """
    if found.layout == "BTCV":
        return BTCV
    labels = found.labels
    if labels is None:
        ids, bad, unread = {0}, [], []
        for volume in found.volumes:
            known = recorded_label_ids(volume, folder)
            ids.update(known or ())
            if known is None:
                unread.append(volume)
        for _, outcome in pool.in_processes(_read_ids, unread, workers, f"reading the labels of {data}"):
            if isinstance(outcome, BadInput):  # once more, and by its name, when the volume is read
                bad.append(outcome)
            else:
                ids.update(outcome)
        if ids == {0}:
            raise bad[0] if bad else BadInput(f"{data}: no label file there holds an organ; all are background")
        labels = layouts.check_labels([(i, f"label {i}" if i else "background") for i in ids], data)
    return tasks.of(name_of(data), labels, store / SPLITS, found.listed)


def _read_ids(volume: dict) -> list[int]:
    return label_ids(volume["label"])
