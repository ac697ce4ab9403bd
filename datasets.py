"""Folders of CT volumes -> slice stores -> batches; BTCV's organs, splits and draws.

A store is a folder with one .npy of 8-bit slices per volume (any NumPy can memory-map it), a small .json beside
it that says what it was made from, and index.json. Two kinds:
- pretrain: every slice padded to square with air and resampled to one size;
- segment: every slice at its own size, with its label map in a second .npy.

    python datasets.py prepare --data data/AbdomenCT-1K
    python datasets.py prepare --data data/BTCV --kind segment
    python datasets.py audit --data data/BTCV
    python datasets.py audit --data data/BTCV --verify          is what was prepared still what was written?

Both commands end with a list of everything skipped or odd, and with exit code 0 only if nothing was skipped;
--skip-bad accepts what was.
"""

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import signal
import sys
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import figures
import phantom
import volumes
from volumes import SUFFIXES, BadInput, Volume, read_labels, read_volume, stem

ORGANS = ("background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach",
          "aorta", "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland",
          "left adrenal gland")  # BTCV's label ids 0 to 13
WINDOW = (-175.0, 250.0)  # HU
SIZE = 512  # side of the slices kept for pre-training
SHEET = 24  # slices on a contact sheet
SPLITS = Path(__file__).parent / "splits"
FORMAT = 3  # of the store; another number means: prepare again
PAPER = {"pretrain": (1062, 215_325), "segment": (30, 3017 + 762)}  # volumes, slices


# ------------------------------------------------------------------------------------------- what is in a folder


def find_volumes(data: Path, kind: str) -> tuple[list[dict], list[dict]]:
    """What a folder holds: ({id, image, label or None} sorted by id, skipped {file, reason, no_image}).

    Known layouts: BTCV's RawData/Training/{img,label}, AbdomenCT-1K's Case_00001_0000.nii.gz in one folder or
    in part folders, and for pre-training any folder of NIfTI volumes. no_image: the file's name says that it is
    none, so nothing is missed. Raises BadInput for a missing or empty folder, and for segmentation without
    BTCV's layout.
    """
    if not data.is_dir():
        raise BadInput(f"{data}: no such folder; give --data the folder of the CT volumes")
    for root in (data / "RawData" / "Training", data / "Training", data):
        if (root / "img").is_dir():
            return _find_btcv(root, kind)
    if kind == "segment":
        raise BadInput(f"{data}: no RawData/Training/img there; unpack BTCV's RawData.zip into it")
    files, skipped = [], []
    for path in _nifti_files(data):
        if path.name.startswith("."):
            skipped.append(_skip(path, "hidden file", no_image=True))
        elif not path.is_file():
            skipped.append(_skip(path, "a broken link, or no file"))
        else:
            files.append(path)
    if any(_is_case(p) and p.name.count("_") == 2 for p in files):  # AbdomenCT-1K: masks lack the _0000
        skipped += [_skip(p, "a label map by its name", no_image=True) for p in files
                    if not stem(p).endswith("_0000")]
        files = [p for p in files if stem(p).endswith("_0000")]
    if not files:
        raise BadInput(f"{data}: no .nii or .nii.gz volumes in this folder or below it")
    found: dict[str, dict] = {}
    for p in files:
        name = (stem(p).removesuffix("_0000") if _is_case(p) else
                "__".join([*p.relative_to(data).parts[:-1], stem(p)]))
        if name in found:
            skipped.append(_skip(p, f"same case as {found[name]['image']}"))
        else:
            found[name] = {"id": name, "image": p, "label": None}
    return [found[name] for name in sorted(found)], skipped


def _skip(path: Path, reason: str, no_image: bool = False) -> dict:
    return {"file": str(path), "reason": reason, "no_image": no_image}


def _nifti_files(folder: Path) -> list[Path]:
    """All files named as NIfTI in a folder and below it, in linked folders too, each folder once; sorted."""
    files, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        files += [Path(root, name) for name in names if name.endswith(SUFFIXES)]
    return sorted(files)


def _is_case(path: Path) -> bool:
    return path.name.startswith("Case_")


def _find_btcv(root: Path, kind: str) -> tuple[list[dict], list[dict]]:
    def numbered(part: str, name: str) -> dict[str, Path]:
        found = sorted(p for p in (root / part).glob(f"{name}*") if p.name.endswith(SUFFIXES))
        return {stem(p).removeprefix(name): p for p in found}

    images, labels = numbered("img", "img"), numbered("label", "label") if kind == "segment" else {}
    if not images:
        raise BadInput(f"{root / 'img'}: no img0001.nii.gz and so on in it")
    return ([{"id": case, "image": image, "label": labels.get(case)} for case, image in sorted(images.items())],
            [_skip(label, "a label without its image") for case, label in labels.items() if case not in images])


def locate(data: Path | None, name: str) -> tuple[Path, bool]:
    """The data folder and whether it is the phantom: `data`, else data/NAME where it exists, else the phantom.

    The phantom is made when it is needed and missing.
    """
    if data is None:
        data = Path("data") / name
        if not data.is_dir():
            data = phantom.ensure() / name
    return data, is_phantom(data)


def is_phantom(data: Path) -> bool:
    """True when the folder's first volume was generated by phantom.py (its header says so)."""
    return volumes.is_phantom(find_volumes(data, "pretrain")[0][0]["image"])


def cases(split: str, draw: int = 0) -> list[str]:
    """BTCV case numbers of a split: '12.5' and '25' (draws 0 to 2), '100', or 'val'. Raises BadInput."""
    name = {"100": "btcv_train", "val": "btcv_val"}.get(split, f"btcv_{split}_{draw}")
    path = SPLITS / f"{name}.txt"
    if not path.exists():
        known = sorted(p.stem for p in SPLITS.glob("btcv_*.txt"))
        raise BadInput(f"{path}: no such split; there are {', '.join(known)}")
    return path.read_text().split()


# ----------------------------------------------------------------------------------------------------- preparing


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


def _checksum(path: Path) -> str:
    """CRC-32 of a file, as gzip and zip have it: against damage, at a third of the time of SHA-256."""
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def _stamp(path: Path | None) -> dict | None:
    if path is None:
        return None
    return {"file": str(path), "bytes": path.stat().st_size, "mtime": path.stat().st_mtime_ns}


def _unchanged(source: dict, volume: dict) -> dict | None:
    """The record's source with today's times if the files are still the same, else None.

    Size and time decide; where the time differs, the checksum.
    """
    now = {}
    for part in ("image", "label"):
        old, new = source[part], _stamp(volume[part])
        if old is None or new is None:
            if old is not new:
                return None
            now[part] = None
            continue
        if old["bytes"] != new["bytes"] or (old["mtime"] != new["mtime"]
                                            and old["checksum"] != _checksum(volume[part])):
            return None
        now[part] = new | {"checksum": old["checksum"]}
    return now


def _describe(volume: dict, kind: str, window: tuple[float, float]) -> tuple[dict, np.ndarray, np.ndarray | None]:
    """(what there is to say about a volume, its 8-bit slices, its labels for segmentation). Raises BadInput."""
    read = read_volume(volume["image"])
    slices, low, high = levels(read, window)
    record = {"id": volume["id"], "file": str(volume["image"]), "phantom": read.is_phantom, "spacing": read.spacing,
              "shape": list(slices.shape), "slices": len(slices), "hu": [low, high],
              "content": hashlib.sha256(slices).hexdigest(), "odd": []}
    if read.spacing == (1.0, 1.0, 1.0):
        record["odd"].append("spacing (1, 1, 1) mm, most likely a placeholder")
    if low > -200 or high < 200:
        record["odd"].append(f"HU from {low:.0f} to {high:.0f} only")
    if not int(read.header["sform_code"]) and not int(read.header["qform_code"]):
        record["odd"].append("no orientation in its header; NIfTI's default was assumed")
    if kind == "pretrain":
        return record, slices, None
    if volume["label"] is None:
        raise BadInput(f"{volume['image']}: has no label {Path('label', volume['image'].name.replace('img', 'label'))}")
    labels = read_labels(volume["label"], read, len(ORGANS))
    if not labels.any():
        raise BadInput(f"{volume['label']}: an empty label, all background; it would train nothing")
    record["voxels"] = np.bincount(labels.ravel(), minlength=len(ORGANS)).tolist()
    return record, slices, labels


def _prepare_volume(volume: dict, store: Path, kind: str, window: tuple[float, float], size: int) -> dict:
    """One volume into the store. Returns its record; raises BadInput. The .json is written last: no half volume."""
    source = {part: _stamp(volume[part]) and _stamp(volume[part]) | {"checksum": _checksum(volume[part])}
              for part in ("image", "label")}  # before it is read: a file that changes meanwhile is read again
    record, slices, labels = _describe(volume, kind, window)
    arrays = {"": slices, "label-": labels} if kind == "segment" else {"": square(slices, size)}
    record["slices"], record["height"], record["width"] = arrays[""].shape
    record |= {"format": FORMAT, "window": list(window), "size": size, "source": source, "checksums": {}}
    done = store / f"{volume['id']}.json"
    done.unlink(missing_ok=True)  # from here to the last line there is no such volume
    for prefix, array in arrays.items():
        path = store / f"{prefix}{volume['id']}.npy"
        with _part(path) as part:
            np.save(part, array)
            record["checksums"][path.name] = _checksum(part)
    _write_json(done, record)
    return record


@contextlib.contextmanager
def _part(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, of this process alone, that is renamed to it in the end."""
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_json(path: Path, value: object) -> None:
    with _part(path) as part:
        part.write_text(json.dumps(value, indent=1))


def _kept(volume: dict, store: Path, window: tuple[float, float], size: int) -> dict | None:
    """The record of a volume that an earlier preparation finished and that is still right, else None."""
    path = store / f"{volume['id']}.json"
    try:
        record = json.loads(path.read_text())
        source = _unchanged(record["source"], volume)
        right = (record["format"] == FORMAT and record["window"] == list(window) and record["size"] == size
                 and source and all(_sizes_agree(store, record)))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if right and source != record["source"]:  # copied or touched: spare the next start the checksum
        record["source"] = source
        _write_json(path, record)
    return record if right else None


def _accepted(store: Path) -> dict[str, dict]:
    """What `prepare --skip-bad` left out before, by image."""
    try:
        return {e["file"]: e for e in json.loads((store / "index.json").read_text())["skipped"] if "stamps" in e}
    except (OSError, ValueError, KeyError):
        return {}


def _stamps(volume: dict) -> list:
    return [_stamp(volume["image"]), _stamp(volume["label"])]


def _sizes_agree(store: Path, record: dict) -> Iterator[bool]:
    for name in record["checksums"]:
        path = store / name
        voxels = record["slices"] * record["height"] * record["width"]
        yield path.exists() and 0 < path.stat().st_size - voxels <= 1024  # one .npy header


def prepare(data: Path, store: Path, kind: str, window: tuple[float, float] = WINDOW, size: int = SIZE,
            workers: int = 2, skip_bad: bool = False) -> "Store":
    """Make or complete the store of `kind` (pretrain, segment) below the folder `store`, and open it.

    Volumes are read in `workers` processes. What an earlier call finished is kept if its source and settings are
    unchanged. A second process waits for the first. Raises BadInput when volumes cannot be
    used, all named on stderr, unless `skip_bad`: then they are left out, by later calls too, and listed.
    """
    window = tuple(float(w) for w in window)
    if not window[0] < window[1]:
        raise BadInput(f"--window {window[0]} {window[1]}: the lower HU must come first")
    size = size if kind == "pretrain" else 0
    name = f"pretrain-{size}" if kind == "pretrain" else "segment"
    # a folder of its own for another window: a run that reads this one must not find its slices exchanged
    folder = store / (name if window == WINDOW else f"{name}-{window[0]:g}-{window[1]:g}")
    found, skipped = find_volumes(data, kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{folder}: waiting for another process that prepares it", file=sys.stderr)
                fcntl.lockf(lock, fcntl.LOCK_EX)
            records, left_out = _complete(found, folder, kind, window, size, workers, skip_bad)
            if not records:
                raise BadInput(f"{data}: not one volume there can be used; see python datasets.py audit --data {data}")
            index = {"format": FORMAT, "kind": kind, "data": str(data.resolve()), "window": list(window), "size": size,
                     "volumes": [records[k] for k in sorted(records)], "skipped": skipped + left_out}
            if not (folder / "index.json").exists() or json.loads((folder / "index.json").read_text()) != index:
                _write_json(folder / "index.json", index)
    except OSError as e:
        raise BadInput(f"{e.filename or folder}: {e.strerror or e} (while preparing {folder}); run the same command "
                       "again when that is mended") from None
    except (BrokenProcessPool, MemoryError):
        raise BadInput(f"{folder}: a process that prepares it ran out of memory or was killed; run the same command "
                       "again, with fewer --workers") from None
    return Store(folder, index)


def _complete(found: list[dict], folder: Path, kind: str, window: tuple[float, float], size: int, workers: int,
              skip_bad: bool) -> tuple[dict[str, dict], list[dict]]:
    """Prepare what is missing in a store that this process has locked: (records by id, left out)."""
    for part in folder.glob(".[0-9]*.*"):  # of a process that was killed while it wrote
        part.unlink(missing_ok=True)
    records = {v["id"]: r for v in found if (r := _kept(v, folder, window, size))}
    accepted = _accepted(folder)
    left_out = [e for v in found if v["id"] not in records and (e := accepted.get(str(v["image"])))
                and e["stamps"] == _stamps(v)]
    known = {e["file"] for e in left_out}
    todo = [v for v in found if v["id"] not in records and str(v["image"]) not in known]
    if changed := [v["id"] for v in todo if (folder / f"{v['id']}.json").exists()]:
        print(f"{folder}: {len(changed)} volumes changed since, or are damaged there; preparing them again: "
              f"{', '.join(changed[:5])}{' ...' if len(changed) > 5 else ''}", file=sys.stderr)
    bad = []
    work = partial(_prepare_volume, store=folder, kind=kind, window=window, size=size)
    for volume, outcome in _in_processes(work, todo, workers, f"preparing {folder}"):
        if isinstance(outcome, BadInput):
            bad.append(_skip(volume["image"], str(outcome)) | {"stamps": _stamps(volume)})
        else:
            records[volume["id"]] = outcome
    if bad and not skip_bad:
        for b in bad[1:]:
            print(b["reason"], file=sys.stderr)
        raise BadInput(bad[0]["reason"] + (f" ({len(bad)} such volumes, all named here)" if len(bad) > 1 else ""))
    return records, left_out + bad


def _in_processes(work: Callable, items: list, workers: int, title: str) -> Iterator[tuple[dict, object]]:
    """(item, result or the BadInput it raised) for every item, in the order they finish."""
    if not items:
        return
    # fork: a spawned process would import the calling script, and with it PyTorch, for nothing
    context = get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(max(1, min(workers, len(items))), context, _end_with_parent) as pool:
        futures = {pool.submit(work, item): item for item in items}
        try:
            for future in tqdm(as_completed(futures), title, len(items), unit="volume", disable=None):
                try:
                    yield futures[future], future.result()
                except BadInput as e:
                    yield futures[future], e
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """A worker of a killed preparation must neither wait for work for ever nor write on beside the next one."""
    if sys.platform == "linux":  # at once: before anyone can see that the parent is gone
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        return

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ------------------------------------------------------------------------------------------------------- reading


class Store:
    """The slices of a prepared folder, numbered 0..N-1 through its volumes in order of id."""

    def __init__(self, folder: Path, index: dict):
        self.folder, self.kind, self.skipped = folder, index["kind"], index["skipped"]
        self.volumes, self.size, self.window = index["volumes"], index["size"], index["window"]
        self.data = index["data"]
        self.is_phantom = any(v["phantom"] for v in self.volumes)
        self.ends = np.cumsum([v["slices"] for v in self.volumes])
        for v in self.volumes:
            if not all(_sizes_agree(folder, v)):
                raise BadInput(f"{folder}: the slices of {v['id']} are damaged; delete that folder and prepare again")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def of(self, ids: list[str]) -> np.ndarray:
        """The slice numbers of these volumes, in the store's order. Raises BadInput when one is missing."""
        absent = sorted(set(ids) - {v["id"] for v in self.volumes})
        if absent:
            raise BadInput(f"{self.data}: case {', '.join(absent)} is missing there; the split needs it")
        return np.concatenate([np.arange(end - v["slices"], end)
                               for v, end in zip(self.volumes, self.ends, strict=True) if v["id"] in set(ids)])

    def place(self, index: int) -> tuple[int, int]:
        """Slice number -> (volume's position in `volumes`, slice in that volume)."""
        volume = int(np.searchsorted(self.ends, index, side="right"))
        return volume, int(index - (self.ends[volume - 1] if volume else 0))

    def where(self, volume: int, z: int) -> str:
        return f"{self.volumes[volume]['id']} slice {z}"

    def slice(self, index: int, label: bool = False, out: np.ndarray | None = None) -> np.ndarray:
        """One slice, or its label map, (H, W) uint8. Read, not mapped: mapped pages would count as memory in use."""
        volume, z = self.place(index)
        v = self.volumes[volume]
        out = np.empty((v["height"], v["width"]), np.uint8) if out is None else out
        path = self.folder / f"{'label-' if label else ''}{v['id']}.npy"
        try:
            with open(path, "rb", buffering=0) as f:
                f.seek(-(v["slices"] - z) * out.size, os.SEEK_END)
                whole = f.readinto(out) == out.size
        except OSError as e:
            raise BadInput(f"{path}: cannot be read ({e.strerror})") from None
        if not whole:
            raise BadInput(f"{path}: ends too early; delete its folder and prepare it again")
        return out

    def batch(self, indices: np.ndarray) -> np.ndarray:
        """Slices of a pretrain store: (B,) slice numbers -> (B, size, size) uint8."""
        out = np.empty((len(indices), self.size, self.size), np.uint8)
        for i, o in zip(indices, out, strict=True):
            self.slice(int(i), out=o)
        return out


def prefetch(fetch: Callable, steps: range, workers: int) -> Iterator[tuple]:
    """(step, fetch(step)) for every step, in order, computed ahead in `workers` threads."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        ahead: deque = deque()
        try:
            for step in steps:
                ahead.append((step, pool.submit(fetch, step)))
                if len(ahead) > 2 * max(1, workers):
                    yield ahead[0][0], ahead.popleft()[1].result()
            while ahead:
                yield ahead[0][0], ahead.popleft()[1].result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# ------------------------------------------------------------------------------------------------------ commands


def audit(data: Path, kind: str, workers: int, store: Path) -> int:
    """Print what a data folder holds against the paper's counts; the middle slices go to a picture in `store`.

    Returns the number of files it cannot use.
    """
    found, skipped = find_volumes(data, kind)
    good, bad = [], []
    for volume, outcome in _in_processes(partial(_inspect, kind=kind), found, workers, f"reading {data}"):
        if isinstance(outcome, BadInput):
            bad.append(_skip(volume["image"], str(outcome)))
        else:
            good.append(outcome)
    good.sort(key=lambda r: r["id"])
    name, (wanted_volumes, wanted_slices) = {"pretrain": "AbdomenCT-1K", "segment": "BTCV"}[kind], PAPER[kind]
    print(f"{data}: {len(good)} volumes, {sum(r['slices'] for r in good):,} slices   (the paper's {name}: "
          f"{wanted_volumes:,} volumes, {wanted_slices:,} slices)")
    if good and all(r["phantom"] for r in good):
        print("every volume is generated: this is the phantom")
    if good:
        print(f"HU {min(r['hu'][0] for r in good):.0f} to {max(r['hu'][1] for r in good):.0f}, slices per volume "
              f"{min(r['slices'] for r in good)} to {max(r['slices'] for r in good)}")
    if kind == "segment":
        _tell_organs(good)
    picked = good[:: -(-len(good) // SHEET) or 1]
    _contact_sheet(store / f"audit-{kind}.png", [r["middle"] for r in picked],
                   [f"{r['id']} slice {r['slices'] // 2}" for r in picked],
                   [r["labels"] for r in picked] if kind == "segment" else None)
    return _tell_skipped(good, skipped + bad)


def _inspect(volume: dict, kind: str) -> dict:
    record, slices, labels = _describe(volume, kind, WINDOW)
    middle = len(slices) // 2
    return record | {"middle": slices[middle], "labels": None if labels is None else labels[middle]}


def _contact_sheet(path: Path, slices: list[np.ndarray], titles: list[str], labels: list[np.ndarray] | None) -> None:
    if slices:
        path.parent.mkdir(parents=True, exist_ok=True)
        if figures.attempt(figures.contact_sheet, path, slices, titles, labels):
            print(f"{path}: {len(slices)} slices to look at")


def _tell_organs(good: list[dict]) -> None:
    found = {r["id"]: r["slices"] for r in good}
    for split, paper in (("100", (24, 3017)), ("val", (6, 762))):
        present = [found[c] for c in cases(split) if c in found]
        print(f"  {'train' if split == '100' else 'val'}: {len(present)} volumes, {sum(present):,} slices   "
              f"(the paper's: {paper[0]}, {paper[1]:,})")
    for organ, voxels in zip(ORGANS, np.reshape([r["voxels"] for r in good], (-1, len(ORGANS))).T, strict=True):
        print(f"  {ORGANS.index(organ):2d} {organ:26s} {voxels.sum():14,d} voxels in {(voxels > 0).sum()} volumes")


def _tell_skipped(records: list[dict], skipped: list[dict]) -> int:
    """The list that ends both commands: unusable, odd, no image. Returns the number of the unusable."""
    odd = [f"{r['file']}: {reason}" for r in records for reason in r["odd"]]
    first: dict[str, str] = {}
    for r in records:
        if r["content"] in first:
            known = " (a known one)" if {r["id"], first[r["content"]]} == {"Case_00297", "Case_00928"} else ""
            odd.append(f"{r['id']}: the same image as {first[r['content']]}{known}")
        first.setdefault(r["content"], r["id"])
    # a reason that comes from reading begins with the file's name
    lines = {kind: [s["reason"] if s["file"] in s["reason"] else f"{s['file']}: {s['reason']}" for s in skipped
                    if s["no_image"] == kind] for kind in (False, True)}
    for title, named in (("unusable", lines[False]), ("odd", odd), ("no image by its name", lines[True])):
        print(f"{title}: {len(named)}")
        for line in sorted(named):
            print(f"  {line}")
    return len(lines[False])


def verify(store: Path) -> int:
    """Compare every array below a store's folder with the checksum it was written with; returns the damaged ones."""
    indices = sorted(store.glob("*/index.json"))
    if not indices:
        raise BadInput(f"{store}: nothing was prepared there; give --store")
    damaged = [path for index in indices for record in json.loads(index.read_text())["volumes"]
               for name, checksum in record["checksums"].items()
               if not (path := index.parent / name).exists() or _checksum(path) != checksum]
    for path in damaged:
        print(f"{path}: damaged; delete it, and it will be prepared again")
    print(f"{store}: {len(damaged)} damaged arrays")
    return len(damaged)


def default_store(data: Path) -> Path:
    """Where a data folder's slices go unless --store says otherwise: stores/NAME (with the phantom's parent's)."""
    data = data.resolve()
    return Path("stores") / (f"{data.parent.name}-{data.name}" if data.parent.name == "phantom" else data.name)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="datasets.py", description="Prepare or audit a folder of CT volumes.")
    parser.add_argument("command", choices=("prepare", "audit"))
    parser.add_argument("--data", type=Path, required=True, help="folder of the CT volumes")
    parser.add_argument("--kind", choices=("pretrain", "segment"),
                        help="default: segment for BTCV's layout, else pretrain")
    parser.add_argument("--store", type=Path, help="folder of the slices (default stores/NAME_OF_DATA)")
    parser.add_argument("--size", type=int, default=SIZE, help="prepare: side of the pre-training slices")
    parser.add_argument("--window", type=float, nargs=2, default=WINDOW, metavar=("LOW", "HIGH"), help="HU window")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--skip-bad", action="store_true", help="leave out unusable volumes: listed, but no failure")
    parser.add_argument("--verify", action="store_true", help="audit: compare the store with its checksums instead")
    args = parser.parse_args(argv)
    btcv = any((args.data / p / "img").is_dir() for p in ("RawData/Training", "Training", "."))
    kind = args.kind or ("segment" if btcv else "pretrain")
    folder = args.store or default_store(args.data)
    try:
        if args.command == "audit" and args.verify:
            raise SystemExit(1 if verify(folder) else 0)
        if args.command == "audit":
            skipped = audit(args.data, kind, args.workers, folder)
        else:
            store = prepare(args.data, folder, kind, args.window, args.size, args.workers, args.skip_bad)
            print(f"{store.folder}: {len(store.volumes)} volumes, {len(store):,} slices")
            picked = np.linspace(0, len(store) - 1, min(SHEET, len(store))).astype(int)
            _contact_sheet(store.folder / "contact_sheet.png", [store.slice(int(i)) for i in picked],
                           [store.where(*store.place(int(i))) for i in picked],
                           [store.slice(int(i), label=True) for i in picked] if kind == "segment" else None)
            skipped = _tell_skipped(store.volumes, store.skipped)
    except BadInput as e:
        raise SystemExit(f"datasets.py: {e}") from None
    if skipped and not args.skip_bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
