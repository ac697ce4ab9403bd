"""Folders of CT volumes -> slice stores; what is in them, for a task to segment with its organs and splits.

A store is a folder with one .npy of 8-bit slices per volume (any NumPy can memory-map it), a small .json beside
it that says what it was made from, and index.json. Two kinds:
- pretrain: every slice padded to square with air and resampled to one size;
- segment: every slice at its own size, with its label map in a second .npy: classes 0, 1, ..., in the order of the
  task's label ids.
A store belongs to the resolved folder that it was made from; opened for another one it is refused.

    python datasets.py prepare --data data/AbdomenCT-1K
    python datasets.py prepare --data data/BTCV --kind segment
    python datasets.py prepare --data data/Task09_Spleen        any labelled data, as ct/layouts.py lists it
    python datasets.py audit --data data/BTCV
    python datasets.py audit --data data/BTCV --verify          is what was prepared still what was written?

Both commands end with a list of everything skipped or odd, and with exit code 0 only if nothing was skipped;
--skip-bad accepts what was.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from PIL import Image

from ct import layouts, pool, tasks
from ct.command import Parser, command, folder, listed, number, printable, whole
from ct.files import checksum, lock, replacing, write_json
from ct.intake import AIR, SOFT, find_volumes, judge, named, skip
from ct.label_maps import label_ids, read_labels
from ct.tasks import BTCV, Task
from ct.volumes import BadInput, Volume, read_volume

WINDOW = SOFT  # HU
SIZE = 512  # side of the slices kept for pre-training
SHEET = 24  # slices on a contact sheet
FEW = 20  # files of a folder that are left out for one reason: named one by one, more of them by their folder
HEADER = 1024  # bytes of a .npy before its voxels, at most
SPLITS = "splits"  # folder beside those of the slices, for the splits of data that is not BTCV
FORMAT = 4  # of the store; another number means: prepare again
# What the paper says of its data. That 3017 are the slices of 24 of the 30 volumes, to train on, and that the other 6
# have 762, is our inference (README, "What the paper leaves open").
PAPER = {"pretrain": "AbdomenCT-1K: 1,062 volumes, 215,325 slices",
         "segment": "BTCV: 30 volumes, 3,017 slices; by our inference those of 24 to train on, 3,779 in all"}


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
    """What every command makes of a file: (the volume, its 8-bit slices, its lowest and highest HU, what is odd).

    Raises BadInput when it is unreadable, or no CT in HU, or no stack of axial slices.
    """
    read = read_volume(path)
    slices, low, high = levels(read, window)
    return read, slices, (low, high), judge(read, low, high)


def square(slices: np.ndarray, size: int) -> np.ndarray:
    """(Z, H, W) uint8 -> (Z, size, size): padded to square with 0 (air), centred, then resampled, antialiased."""
    z, h, w = slices.shape
    side = max(h, w)
    if h != w:
        padded = np.zeros((z, side, side), np.uint8)
        top, left = (side - h) // 2, (side - w) // 2
        padded[:, top : top + h, left : left + w] = slices
        slices = padded
    if side == size:
        return slices
    return np.stack([np.asarray(Image.fromarray(s).resize((size, size), Image.Resampling.BILINEAR)) for s in slices])


@functools.lru_cache(None)
def _checksum_of(path: Path, size: int, mtime: int) -> str:
    """`checksum`, once in a process for a file of this size and time."""
    return checksum(path)


def _stamp(path: Path | list[Path] | None) -> dict | list[dict] | None:
    if path is None:
        return None
    if isinstance(path, list):
        return [_stamp(p) for p in path]
    file = os.path.abspath(path)
    try:
        found = path.stat()
    except OSError:  # reading it will say why
        return {"file": file, "bytes": None, "mtime": None}
    return {"file": file, "bytes": found.st_size, "mtime": found.st_mtime_ns}


def _source(path: Path | list[Path] | None) -> dict | list[dict] | None:
    """A file's stamp and checksum. Raises BadInput: one file that cannot be read must not stop the others."""
    if isinstance(path, list):
        return [_source(p) for p in path]
    try:
        return _stamp(path) and _stamp(path) | {"checksum": checksum(path)}
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror})") from None


def _unchanged(source: dict, volume: dict) -> dict | None:
    """The record's source with today's times if the files are still the same, else None.

    Place, size and time decide; where the place or the time differs, the checksum.
    """
    now = {}
    for part in ("image", "label"):
        old, new = source[part], _stamp(volume[part])
        if old is None or new is None:
            if old is not new:
                return None
            now[part] = None
            continue
        several = isinstance(new, list)
        olds, news, paths = ((old, new, volume[part]) if several else ([old], [new], [volume[part]]))
        if len(olds) != len(news) or not all(map(_same_file, olds, news, paths)):
            return None
        files = [new | {"checksum": old["checksum"]} for old, new in zip(olds, news, strict=True)]
        now[part] = files if several else files[0]
    return now


def _same_file(old: dict, new: dict, path: Path) -> bool:
    return old["bytes"] == new["bytes"] and ((old["file"], old["mtime"]) == (new["file"], new["mtime"])
                                             or old["checksum"] == _checksum_of(path, new["bytes"], new["mtime"]))


def _ids(task: Task | None) -> list[int] | None:
    """The ids of a volume's classes as its record has them; those of BTCV go without saying."""
    return None if task is None or task == BTCV else list(task.ids)


def _describe(volume: dict, task: Task | None,
              window: tuple[float, float]) -> tuple[dict, np.ndarray, np.ndarray | None]:
    """(what there is to say about a volume, its 8-bit slices, its labels for segmentation). Raises BadInput."""
    read, slices, (low, high), odd = read_ct(volume["image"], window)
    record = {"id": volume["id"], "file": str(volume["image"]), "phantom": read.is_phantom, "spacing": read.spacing,
              "shape": list(slices.shape), "slices": len(slices), "hu": [low, high],
              "content": hashlib.sha256(slices).hexdigest(), "odd": odd}
    if task is None:
        return record, slices, None
    if volume["label"] is None:
        raise BadInput(f"{volume['image']}: has no label {Path('label', volume['image'].name.replace('img', 'label'))}")
    labels = read_labels(volume["label"], read, task.ids, record["odd"])
    if not labels.any():
        if not task.negatives:
            raise BadInput(f"{volume['label']}: an empty label, all background; it would train nothing")
        record["odd"].append("an empty label, all background; kept as a negative")
    record["voxels"] = np.bincount(labels.ravel(), minlength=len(task.ids)).tolist()
    if ids := _ids(task):
        record["ids"] = ids
    return record, slices, labels


def _base(volume: str) -> str:
    """The name of a volume's files in a store: its id, kept apart from index.json, label-*.npy and hidden files."""
    return "_" * (volume.lower() in ("", "index") or volume.lower().startswith(("label-", "_", "."))) + volume


def array(store: Path, volume: str, label: bool = False) -> Path:
    """The file of a volume's slices in a store, or of its label maps."""
    return store / f"{'label-' * label}{_base(volume)}.npy"


def _record(store: Path, volume: str) -> Path:
    return store / f"{_base(volume)}.json"


def _prepare_volume(volume: dict, store: Path, task: Task | None, window: tuple[float, float], size: int) -> dict:
    """One volume into the store. Returns its record; raises BadInput. The .json is written last: no half volume."""
    # before it is read: a file that changes meanwhile is read again
    source = {part: _source(volume[part]) for part in ("image", "label")}
    record, slices, labels = _describe(volume, task, window)
    arrays = {False: slices, True: labels} if task else {False: square(slices, size)}
    record["slices"], record["height"], record["width"] = arrays[False].shape
    record |= {"format": FORMAT, "window": list(window), "size": size, "source": source, "checksums": {}}
    done = _record(store, volume["id"])
    done.unlink(missing_ok=True)  # from here to the last line there is no such volume
    for label, voxels in arrays.items():
        path = array(store, volume["id"], label)
        with replacing(path) as part:
            np.save(part, voxels)
            record["checksums"][path.name] = checksum(part)
    write_json(done, record)
    return record


def _kept(volume: dict, store: Path, task: Task | None, window: tuple[float, float], size: int,
          renew: bool) -> dict | None:
    """The record of a volume that an earlier preparation finished and that is still right, else None."""
    path = _record(store, volume["id"])
    try:
        record = json.loads(path.read_text())
        source = _unchanged(record["source"], volume)
        right = (record["format"] == FORMAT and record["window"] == list(window) and record["size"] == size
                 and record.get("ids") == _ids(task) and source and all(sizes_agree(store, record)))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if right and source != record["source"]:  # copied or touched: spare the next start the checksum
        record["source"] = source
        if renew:
            write_json(path, record)
    return record if right else None


def _read_index(folder: Path) -> dict:
    """A store's index.json; where it is missing or damaged an empty one, which the next preparation replaces."""
    try:
        index = json.loads((folder / "index.json").read_bytes())
    except (OSError, ValueError):
        index = None
    usable = isinstance(index, dict) and {"volumes", "skipped"} <= index.keys()
    return index if usable else {"volumes": [], "skipped": []}


def _accepted(store: Path) -> dict[str, dict]:
    """What `prepare --skip-bad` left out before, by image."""
    return {e["file"]: e for e in _read_index(store)["skipped"] if "stamps" in e}


def _refuse_unusable(skipped: list[dict], store: Path) -> None:
    """Raise BadInput for what is unusable in the data folder, but for what `prepare --skip-bad` accepted before."""
    index = _read_index(store)
    before = index["skipped"] if index.get("format") == FORMAT else []
    if unusable := [s for s in skipped if not s["no_image"] and s not in before]:
        _refuse(unusable)


def _refuse(unusable: list[dict]) -> None:
    """Raise BadInput with the first of these, the others on stderr."""
    first, *others = map(named, unusable)
    for line in others:
        print(printable(line), file=sys.stderr)
    raise BadInput(first + f" ({len(unusable)} such volumes or files, all named here)" * bool(others))


def _stamps(volume: dict) -> list:
    return [_stamp(volume["image"]), _stamp(volume["label"])]


def sizes_agree(store: Path, record: dict) -> Iterator[bool]:
    for name in record["checksums"]:
        path = store / name
        voxels = record["slices"] * record["height"] * record["width"]
        yield path.exists() and 0 < path.stat().st_size - voxels <= HEADER


def prepare(data: Path, store: Path, kind: str, window: tuple[float, float] = WINDOW, size: int = SIZE,
            workers: int | None = None, skip_bad: bool = False, names: Path | None = None,
            organs: Sequence[str] | None = None) -> tuple[Path, dict]:
    """Make or complete the store of `kind` (pretrain, segment) below the folder `store`: (its folder, its index).

    Volumes are read in `workers` processes, by default one a core. What an earlier call finished is kept if its source
    and settings are unchanged; where that is all, nothing is locked or written. A second process waits for the first.
    Raises BadInput for a store of another folder, and when volumes, or other files of the folder, cannot be used, all
    named on stderr, unless `skip_bad`: then they are left out, by later calls too, and listed. names, organs: those of
    `layouts.find`.
    """
    window = tuple(float(w) for w in window)
    if not window[0] < window[1]:
        raise BadInput(f"--window {window[0]} {window[1]}: the lower HU must come first")
    size = size if kind == "pretrain" else 0
    labels, found, skipped = _find(data, kind, names, organs)
    name = f"pretrain-{size}" if kind == "pretrain" else "segment"
    # a folder of its own for another choice of labels or window: a run that reads this one must not find its slices
    # exchanged
    if names or organs:
        name += f"-{hashlib.sha256(json.dumps(labels).encode()).hexdigest()[:8]}"
    folder = store / (name if window == WINDOW else f"{name}-{window[0]:g}-{window[1]:g}")
    if not skip_bad:
        _refuse_unusable(skipped, folder)
    owner, complete = str(data.resolve()), None

    def index_of(records: dict[str, dict], left_out: list[dict]) -> dict:
        index = {"format": FORMAT, "kind": kind, "data": owner, "window": list(window), "size": size,
                 "volumes": [records[k] for k in sorted(records)], "skipped": skipped + left_out}
        if _ids(task):
            index["task"] = {"name": task.name, "labels": {str(i): organ for i, organ in task.labels.items()}}
        return index

    try:
        there = _index(folder, owner)
        task = _task(data, store, labels, found, folder, workers) if kind == "segment" else None
        records, left_out, todo = _survey(found, folder, task, window, size)
        if records and not todo:  # complete: opened without a lock, and where nothing can be written
            complete = index_of(records, left_out)
            if there == complete:
                return folder, complete
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder) as alone:
            there = _index(folder, owner)  # again: who was waited for may have made it, from another folder
            records, left_out = _complete(found, folder, task, window, size, workers, skip_bad, alone)
            if not records:
                raise BadInput(f"{data}: not one volume there can be used; see python datasets.py audit --data {data}")
            index = index_of(records, left_out)
            if there != index:
                write_json(folder / "index.json", index)
    except OSError as e:
        if complete:
            return folder, complete
        raise BadInput(f"{e.filename or folder}: {e.strerror or e} (while preparing {folder}); run the same command "
                       "again when that is mended") from None
    except (BrokenProcessPool, MemoryError):
        raise BadInput(f"{folder}: a process that prepares it ran out of memory or was killed; run the same command "
                       "again, with fewer --workers") from None
    return folder, index


def _find(data: Path, kind: str, names: Path | None,
          organs: Sequence[str] | None) -> tuple[dict[int, str] | None, list[dict], list[dict]]:
    """(labels of a task, where they are known without reading; volumes; skipped) of a data folder."""
    if kind == "pretrain":
        return None, *find_volumes(data, kind)
    found = layouts.find(data, names, organs)
    return found.labels, found.volumes, found.skipped


def _task(data: Path, store: Path, labels: dict[int, str] | None, found: list[dict], folder: Path,
          workers: int | None) -> Task:
    """What there is to segment in `data`; without `labels`, every id that its label files hold."""
    if layouts.btcv_root(data):
        return BTCV
    if labels is None:
        ids, bad, unread = {0}, [], []
        for volume in found:
            known = _known_ids(volume, folder)
            ids.update(known or ())
            unread += [volume] * (known is None)
        for _, outcome in pool.in_processes(_read_ids, unread, workers, f"reading the labels of {data}"):
            if isinstance(outcome, BadInput):  # once more, and by its name, when the volume is read
                bad.append(outcome)
            else:
                ids.update(outcome)
        if ids == {0}:
            raise bad[0] if bad else BadInput(f"{data}: not one label file there holds an organ, only background")
        labels = layouts.check_labels([(i, f"label {i}" if i else "background") for i in ids], data)
    return tasks.of(name_of(data), labels, store / SPLITS)


def _known_ids(volume: dict, folder: Path) -> list[int] | None:
    """The ids in a volume's label file by the record of a store that has it as it is, else None."""
    try:
        record = json.loads(_record(folder, volume["id"]).read_text())
        voxels = zip(record["ids"], record["voxels"], strict=True)
        return [i for i, count in voxels if count] if _unchanged(record["source"], volume) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_ids(volume: dict) -> list[int]:
    return label_ids(volume["label"])


def task_of(folder: Path, index: dict) -> Task | None:
    """The task of a store, by its folder and index; None of one for pre-training."""
    if index["kind"] == "pretrain":
        return None
    if (told := index.get("task")) is None:
        return BTCV
    return tasks.of(told["name"], {int(i): organ for i, organ in told["labels"].items()}, folder.parent / SPLITS)


def _index(folder: Path, data: str) -> dict | None:
    """A store's index, None where it has none that is whole. Raises BadInput where it was made from another folder."""
    index = _read_index(folder)
    if "data" not in index:
        return None
    if (owner := index["data"]) != data:
        raise BadInput(f"{folder}: was made from {owner}, not from {data}; give another --store (or, if that folder "
                       f"has moved, delete {folder / 'index.json'}: each volume is then compared by its checksum)")
    return index


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a store's lock, waited for if need be; False where there are no locks."""
    with open(folder / ".lock", "w") as file:
        try:
            alone = lock(file)
        except BlockingIOError:
            print(f"{folder}: waiting for another process that prepares it", file=sys.stderr)
            alone = lock(file, wait=True)
        yield alone


def _survey(found: list[dict], folder: Path, task: Task | None, window: tuple[float, float], size: int,
            renew: bool = False) -> tuple[dict[str, dict], list[dict], list[dict]]:
    """What a store has and lacks: (records by id, what --skip-bad left out before, volumes to prepare).

    With `renew`, the record of a volume whose file was only copied or touched is written anew; else nothing is.
    """
    records = {v["id"]: r for v in found if (r := _kept(v, folder, task, window, size, renew))}
    accepted = _accepted(folder)
    left_out = [e for v in found if v["id"] not in records and (e := accepted.get(str(v["image"])))
                and e["stamps"] == _stamps(v)]
    known = {e["file"] for e in left_out}
    return records, left_out, [v for v in found if v["id"] not in records and str(v["image"]) not in known]


def _complete(found: list[dict], folder: Path, task: Task | None, window: tuple[float, float], size: int,
              workers: int | None, skip_bad: bool, alone: bool) -> tuple[dict[str, dict], list[dict]]:
    """Prepare what is missing in a store: (records by id, left out). alone: this process has locked it."""
    for part in folder.glob(".[0-9]*.*") if alone else ():  # of a process that was killed while it wrote
        part.unlink(missing_ok=True)
    records, left_out, todo = _survey(found, folder, task, window, size, renew=True)
    if changed := [v["id"] for v in todo if _record(folder, v["id"]).exists()]:
        print(f"{folder}: {len(changed)} volumes changed since, or are damaged there; preparing them again: "
              f"{', '.join(changed[:5])}{' ...' if len(changed) > 5 else ''}", file=sys.stderr)
    bad = []
    work = functools.partial(_prepare_volume, store=folder, task=task, window=window, size=size)
    for volume, outcome in pool.in_processes(work, todo, workers, f"preparing {folder}"):
        if isinstance(outcome, BadInput):
            bad.append(skip(volume["image"], str(outcome)) | {"stamps": _stamps(volume)})
        else:
            records[volume["id"]] = outcome
    if bad and not skip_bad:
        _refuse(bad)
    return records, left_out + bad


def remarks(volumes: list[dict], skipped: list[dict], task: Task = BTCV) -> list[str]:
    """What a command tells at its start about a store's volumes: how many things are odd, intensities, organs."""
    see = "(python datasets.py audit names them)"
    lines = [f"odd: {len(odd)} {see}"] if (odd := _odd(volumes)) else []
    if bright := [v for v in volumes if v["hu"][0] > AIR]:
        low, high = bright[0]["hu"]
        lines.append(f"intensities: {len(bright)} of {len(volumes)} volumes never go under {AIR} HU "
                     f"({bright[0]['id']}: {low:.0f} to {high:.0f}); exported to 0..255, or stored without the "
                     "intercept? They are used as they are")
    if left := sum(s["no_image"] and not _lacks_label(s) for s in skipped):
        lines.append(f"left out, no images by their names: {left} {see}")
    if unlabelled := sum(map(_lacks_label, skipped)):
        lines.append(f"left out, without a label: {unlabelled} {see}")
    if unusable := len(skipped) - left - unlabelled:
        lines.append(f"left out, unusable: {unusable} {see}")
    if absent := absent_organs(volumes, task):
        more = f" ... ({len(absent)} organs)" * (len(absent) > FEW)
        lines.append(f"no volume has: {', '.join(absent[:FEW])}{more}; mean Dice is over the organs that occur")
    return lines


def _lacks_label(skipped: dict) -> bool:
    return skipped["reason"] == layouts.NO_LABEL


def absent_organs(volumes: list[dict], task: Task = BTCV) -> list[str]:
    """The organs of which no labelled volume has a voxel; [] where none is labelled."""
    voxels = [v["voxels"] for v in volumes if "voxels" in v]
    return [task.organs[i] for i in np.flatnonzero(np.sum(voxels, 0) == 0)] if voxels else []


def audit(data: Path, kind: str, workers: int | None, store: Path, draw: Callable | None = None,
          names: Path | None = None, organs: Sequence[str] | None = None) -> int:
    """Print what a data folder holds, against the paper's counts where it is the paper's data; the middle slices go to
    a picture in `store`.

    Returns the number of files it cannot use.
    """
    labels, found, skipped = _find(data, kind, names, organs)
    task = _task(data, store, labels, found, store / kind, workers) if kind == "segment" else None
    good, bad = [], []
    for volume, outcome in pool.in_processes(functools.partial(_inspect, task=task), found, workers, f"reading {data}"):
        if isinstance(outcome, BadInput):
            bad.append(skip(volume["image"], str(outcome)))
        else:
            good.append(outcome)
    good.sort(key=lambda r: r["id"])
    paper = f"   (the paper's {PAPER[kind]})" if task in (None, BTCV) else ""
    print(f"{data}: {len(good)} volumes, {sum(r['slices'] for r in good):,} slices{paper}")
    if good and all(r["phantom"] for r in good):
        print("every volume is generated: this is the phantom")
    if good:
        print(f"HU {min(r['hu'][0] for r in good):.0f} to {max(r['hu'][1] for r in good):.0f}, slices per volume "
              f"{min(r['slices'] for r in good)} to {max(r['slices'] for r in good)}")
    if task:
        _tell_task(good, task)
    picked = good[:: -(-len(good) // SHEET) or 1]
    _contact_sheet(draw, store / f"audit-{kind}.png", [r["middle"] for r in picked],
                   [f"{r['id']} slice {r['slices'] // 2}" for r in picked],
                   [r["labels"] for r in picked] if task else None, task)
    return _tell_skipped(good, skipped + bad)


def _inspect(volume: dict, task: Task | None) -> dict:
    record, slices, labels = _describe(volume, task, WINDOW)
    middle = len(slices) // 2
    return record | {"middle": slices[middle], "labels": None if labels is None else labels[middle]}


def _contact_sheet(draw: Callable | None, path: Path, slices: list[np.ndarray], titles: list[str],
                   labels: list[np.ndarray] | None, task: Task | None) -> None:
    if slices and draw and draw(path, slices, titles, labels, task.organs if task else ()):
        print(f"{path}: {len(slices)} slices to look at")


def _tell_task(good: list[dict], task: Task) -> None:
    """The slices of each split, where they are drawn; the voxels of each organ; scans that seem to be one patient's."""
    found = {r["id"]: r["slices"] for r in good}
    for split, paper in (("100", (24, 3017)), ("val", (6, 762))):
        if task.file(split).exists():
            present = [found[c] for c in task.cases(split) if c in found]
            print(f"  {'train' if split == '100' else 'val'}: {len(present)} volumes, {sum(present):,} slices"
                  + f"   (the paper's, by our inference: {paper[0]}, {paper[1]:,})" * (task == BTCV))
    counts = np.array([r["voxels"] for r in good], np.int64).reshape(-1, len(task.ids))
    for (label, organ), voxels in zip(task.labels.items(), counts.T, strict=True):
        print(f"  {label:2d} {organ:26s} {voxels.sum():14,d} voxels in {(voxels > 0).sum()} volumes")
    if absent := absent_organs(good, task):
        print(f"  no volume has: {', '.join(absent)}")
    for patient, group in tasks.siblings(found).items():
        print(f"  one patient, it seems, {patient}: {', '.join(group)}")


def _odd(records: list[dict]) -> list[str]:
    """What is odd about volumes, a line each, and which are the same image."""
    odd = [f"{r['file']}: {reason}" for r in records for reason in r["odd"]]
    first: dict[str, str] = {}
    for r in records:
        if r["content"] in first:
            known = " (a known one)" if {r["id"], first[r["content"]]} == {"Case_00297", "Case_00928"} else ""
            odd.append(f"{r['id']}: the same image as {first[r['content']]}{known}")
        first.setdefault(r["content"], r["id"])
    return odd


def _tell_skipped(records: list[dict], skipped: list[dict]) -> int:
    """The list that ends both commands: unusable, odd, no image, no label. Returns the number of the unusable."""
    unusable = sorted(named(s) for s in skipped if not s["no_image"])
    unlabelled = [s for s in skipped if _lacks_label(s)]
    others = [s for s in skipped if s["no_image"] and not _lacks_label(s)]
    parts = [("unusable", len(unusable), unusable), ("odd", len(odd := sorted(_odd(records))), odd),
             ("no image by its name", len(others), _by_folder(others))]
    for title, count, told in parts + [("without a label", len(unlabelled), _by_folder(unlabelled))] * bool(unlabelled):
        print(f"{title}: {count}")
        for line in told:
            print(f"  {printable(line)}")
    return len(unusable)


def _by_folder(skipped: list[dict]) -> list[str]:
    """A line for each, sorted; where a folder has many that are skipped for one reason, a line for all of them."""
    folders: dict[tuple, list] = {}
    for s in sorted(skipped, key=lambda s: s["file"]):
        folders.setdefault((Path(s["file"]).parent, s["reason"]), []).append(s)
    told = [named(s) for group in folders.values() if len(group) <= FEW for s in group]
    return sorted(told + [f"{folder}: {len(group)} files, each {reason} ({Path(group[0]['file']).name} ...)"
                          for (folder, reason), group in folders.items() if len(group) > FEW])


def verify(store: Path) -> int:
    """Compare every array below a store's folder with the checksum it was written with; returns the damaged ones."""
    indices = sorted(store.glob("*/index.json"))
    if not indices:
        raise BadInput(f"{store}: nothing was prepared there; give --store")
    if lost := [index for index in indices if not _read_index(index.parent)["volumes"]]:
        raise BadInput(f"{lost[0]}: damaged; prepare that store again")
    damaged = [path for index in indices for record in _read_index(index.parent)["volumes"]
               for name, written in record["checksums"].items()
               if not (path := index.parent / name).exists() or checksum(path) != written]
    for path in damaged:
        print(f"{path}: damaged; delete it, and it will be prepared again")
    print(f"{store}: {len(damaged)} damaged arrays")
    return len(damaged)


def name_of(data: Path) -> str:
    """A data folder's own name; `.` and links have that of the folder they stand for."""
    return data.resolve().name or "root"


def default_store(data: Path) -> Path:
    """Where a data folder's slices go unless --store says otherwise: stores/NAME-HASH, the hash that of its whole path.

    The phantom's folders have its name before their own.
    """
    data = data.resolve()
    name = f"{data.parent.name}-{data.name}" if data.parent.name == "phantom" else name_of(data)
    return Path("stores") / f"{name}-{hashlib.sha256(os.fsencode(data)).hexdigest()[:8]}"


def task_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is segmented, and on which volumes, in data that does not say so itself."""
    add = parser.add_argument
    add("--labels", type=Path, metavar="FILE", help="names of labels that have none, `id name` a line")
    add("--organs", type=listed, metavar="A,B", help="which of TotalSegmentator's masks; where two overlap, the later "
        "in this list has the voxel (default: all, sorted)")
    add("--val", type=number(above=0, most=0.9), help="share of the patients to validate on, drawn once (default "
        f"{tasks.HELD_OUT:g})")
    add("--val-cases", type=Path, metavar="FILE", help="the volumes to validate on instead, an id a line")
    add("--patient-regex", metavar="REGEX", help="what of a volume's id is the patient, whose volumes stay together")


@command
def main(argv: list[str] | None = None, draw: Callable | None = None) -> None:
    """The commands. draw(path, slices, titles, labels, names) -> bool: what draws a contact sheet, if anything."""
    parser = Parser(description="Prepare or audit a folder of CT volumes.")
    parser.add_argument("command", choices=("prepare", "audit"))
    parser.add_argument("--data", type=Path, required=True, help="folder of the CT volumes")
    parser.add_argument("--kind", choices=("pretrain", "segment"), help="default: segment for BTCV's layout, a "
                        "dataset.json or with --labels or --organs, else pretrain")
    parser.add_argument("--store", type=folder, help="folder of the slices (default stores/NAME-HASH of --data)")
    parser.add_argument("--size", type=whole(1), default=SIZE, help="prepare: side of the pre-training slices")
    parser.add_argument("--window", type=number(), nargs=2, default=WINDOW, metavar=("LOW", "HIGH"), help="HU window")
    parser.add_argument("--workers", type=whole(0), help="processes (default: one a core)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out unusable volumes: listed, but no failure")
    parser.add_argument("--verify", action="store_true", help="audit: compare the store with its checksums instead")
    task_flags(parser)
    args = parser.parse_args(argv)
    labelled = layouts.is_labelled(args.data) or args.labels or args.organs
    kind = args.kind or ("segment" if labelled else "pretrain")
    if kind == "pretrain" and (args.labels or args.organs or args.val or args.val_cases or args.patient_regex):
        parser.error("--labels, --organs, --val, --val-cases and --patient-regex are of --kind segment")
    target = args.store or default_store(args.data)
    if args.command == "audit" and args.verify:
        raise SystemExit(1 if verify(target) else 0)
    if args.command == "audit":
        skipped = audit(args.data, kind, args.workers, target, draw, args.labels, args.organs)
    else:
        store, index = prepare(args.data, target, kind, args.window, args.size, args.workers, args.skip_bad,
                               args.labels, args.organs)
        places = [(v["id"], z) for v in index["volumes"] for z in range(v["slices"])]
        print(f"{store}: {len(index['volumes'])} volumes, {len(places):,} slices")
        picked = [places[i] for i in np.linspace(0, len(places) - 1, min(SHEET, len(places))).astype(int)]
        slices, labels = ([np.load(array(store, name, label), mmap_mode="r")[z] for name, z in picked]
                          if not label or kind == "segment" else None for label in (False, True))
        _contact_sheet(draw, store / "contact_sheet.png", slices, [f"{n} slice {z}" for n, z in picked], labels,
                       task_of(store, index))
        skipped = _tell_skipped(index["volumes"], index["skipped"])
        if task := task_of(store, index):
            told = tasks.draw_splits(task, [v["id"] for v in index["volumes"]], args.val, args.val_cases,
                                     args.patient_regex)
            for line in [f"splits: {task.file('val')} and those beside it"] * (task != BTCV) + told:
                print(printable(line))
    if skipped and not args.skip_bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
