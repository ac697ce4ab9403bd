"""Folders of CT volumes -> slice stores -> batches; BTCV's organs, splits and draws.

A store is a folder with one .npy of 8-bit slices per volume (any NumPy can memory-map it), a small .json beside
it that says what it was made from, and index.json. Two kinds:
- pretrain: every slice padded to square with air and resampled to one size;
- segment: every slice at its own size, with its label map in a second .npy.

    python datasets.py prepare --data data/AbdomenCT-1K
    python datasets.py prepare --data data/BTCV --kind segment
    python datasets.py audit --data data/BTCV
"""

import argparse
import fcntl
import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from tqdm import tqdm

import phantom
from volumes import SUFFIXES, BadInput, read_labels, read_volume, stem

ORGANS = ("background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach",
          "aorta", "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland",
          "left adrenal gland")  # BTCV's label ids 0 to 13
WINDOW = (-175.0, 250.0)  # HU
SIZE = 512  # side of the slices kept for pre-training
SPLITS = Path(__file__).parent / "splits"
FORMAT = 1  # of the store; another number means: prepare again
PAPER = {"pretrain": (1062, 215_325), "segment": (30, 3017 + 762)}  # volumes, slices


# ------------------------------------------------------------------------------------------- what is in a folder


def find_volumes(data: Path, kind: str) -> tuple[list[dict], list[dict]]:
    """What a folder holds: ({id, image, label or None} sorted by id, skipped {file, reason}).

    Known layouts: BTCV's RawData/Training/{img,label}, AbdomenCT-1K's Case_00001_0000.nii.gz in one folder or
    in part folders, and for pre-training any folder of NIfTI volumes. Raises BadInput for a missing or empty
    folder, and for segmentation without BTCV's layout or with an image that has no label.
    """
    if not data.is_dir():
        raise BadInput(f"{data}: no such folder; give --data the folder of the CT volumes")
    for root in (data / "RawData" / "Training", data / "Training", data):
        if (root / "img").is_dir():
            return _find_btcv(root, kind)
    if kind == "segment":
        raise BadInput(f"{data}: no RawData/Training/img there; unpack BTCV's RawData.zip into it")
    files, skipped = [], []
    for path in sorted(p for p in data.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file()):
        if path.name.startswith("."):
            skipped.append({"file": str(path), "reason": "hidden file"})
        else:
            files.append(path)
    if any(_is_case(p) and p.name.count("_") == 2 for p in files):  # AbdomenCT-1K: masks lack the _0000
        skipped += [{"file": str(p), "reason": "a label map by its name"} for p in files
                    if not stem(p).endswith("_0000")]
        files = [p for p in files if stem(p).endswith("_0000")]
    if not files:
        raise BadInput(f"{data}: no .nii or .nii.gz volumes in this folder or below it")
    volumes = [{"id": stem(p).removesuffix("_0000") if _is_case(p) else
                "__".join([*p.relative_to(data).parts[:-1], stem(p)]), "image": p, "label": None} for p in files]
    first = {}
    for v in list(volumes):
        if v["id"] in first:
            volumes.remove(v)
            skipped.append({"file": str(v["image"]), "reason": f"same case as {first[v['id']]}"})
        first.setdefault(v["id"], v["image"])
    return sorted(volumes, key=lambda v: v["id"]), skipped


def _is_case(path: Path) -> bool:
    return path.name.startswith("Case_")


def _find_btcv(root: Path, kind: str) -> tuple[list[dict], list[dict]]:
    volumes = []
    for image in sorted((root / "img").glob("img*")):
        if not image.name.endswith(SUFFIXES):
            continue
        case = stem(image).removeprefix("img")
        label = next((p for s in SUFFIXES if (p := root / "label" / f"label{case}{s}").exists()), None)
        if kind == "segment" and label is None:
            raise BadInput(f"{image}: has no label {root / 'label' / f'label{case}.nii.gz'}")
        volumes.append({"id": case, "image": image, "label": label if kind == "segment" else None})
    if not volumes:
        raise BadInput(f"{root / 'img'}: no img0001.nii.gz and so on in it")
    return volumes, []


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
    try:
        header = nib.load(find_volumes(data, "pretrain")[0][0]["image"]).header
        return bytes(header["descrip"]).strip(b"\0 ") == b"phantom"
    except (OSError, KeyError, nib.filebasedimages.ImageFileError):
        return False  # read_volume will say what is wrong with it


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
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _stamp(path: Path | None) -> dict | None:
    if path is None:
        return None
    return {"file": str(path), "bytes": path.stat().st_size, "mtime": path.stat().st_mtime_ns}


def _same_source(record: dict, volume: dict) -> bool:
    """Is the record's source still the file it was? Size and time decide; where the time differs, the checksum."""
    for part in ("image", "label"):
        old, path = record["source"][part], volume[part]
        if (old is None) != (path is None):
            return False
        if path is not None:
            now = _stamp(path)
            if old["bytes"] != now["bytes"] or (old["mtime"] != now["mtime"] and old["checksum"] != _checksum(path)):
                return False
    return True


def _prepare_volume(volume: dict, store: Path, kind: str, window: tuple[float, float], size: int) -> dict:
    """One volume into the store. Returns its record; raises BadInput. The .json is written last: no half volume."""
    read = read_volume(volume["image"])
    slices = window_to_uint8(read.hu, window)
    source = {"image": _stamp(volume["image"]) | {"checksum": _checksum(volume["image"])}, "label": None}
    record = {"id": volume["id"], "source": source, "phantom": read.is_phantom, "spacing": read.spacing,
              "shape": list(read.hu.shape), "hu": [float(read.hu.min()), float(read.hu.max())],
              "content": hashlib.blake2b(read.hu, digest_size=16).hexdigest()}
    arrays = {"": slices}
    if kind == "segment":
        labels = read_labels(volume["label"], read, len(ORGANS))
        if not labels.any():
            raise BadInput(f"{volume['label']}: an empty label, all background; it would train nothing")
        source["label"] = _stamp(volume["label"]) | {"checksum": _checksum(volume["label"])}
        record["voxels"] = np.bincount(labels.ravel(), minlength=len(ORGANS)).tolist()
        arrays["label-"] = labels
    else:
        arrays[""] = square(slices, size)
    for prefix, array in arrays.items():
        part = store / f".{os.getpid()}.{prefix}{volume['id']}.npy"
        try:
            np.save(part, array)
            os.replace(part, store / f"{prefix}{volume['id']}.npy")
        finally:
            part.unlink(missing_ok=True)
    record["slices"], record["height"], record["width"] = arrays[""].shape
    _write_json(store / f"{volume['id']}.json", {"format": FORMAT, "window": list(window), "size": size, **record})
    return record


def _write_json(path: Path, value: object) -> None:
    part = path.with_name(f".{os.getpid()}.{path.name}")
    part.write_text(json.dumps(value, indent=1))
    os.replace(part, path)


def _kept(volume: dict, store: Path, window: tuple[float, float], size: int) -> dict | None:
    """The record of a volume that an earlier preparation finished and that is still right, else None."""
    try:
        record = json.loads((store / f"{volume['id']}.json").read_text())
        right = (record["format"] == FORMAT and record["window"] == list(window) and record["size"] == size
                 and _same_source(record, volume) and all(_sizes_agree(store, record)))
    except (OSError, ValueError, KeyError):
        return None
    return record if right else None


def _accepted(store: Path) -> dict[str, dict]:
    """Volumes that `prepare --skip-bad` left out before and whose files have not changed since, by image."""
    try:
        entries = json.loads((store / "index.json").read_text())["skipped"]
    except (OSError, ValueError, KeyError):
        return {}
    return {e["file"]: e for e in entries if "stamp" in e and all(
        Path(s["file"]).exists() and _stamp(Path(s["file"])) == s for s in e["stamp"])}


def _stamps(volume: dict) -> list[dict]:
    return [_stamp(path) for part in ("image", "label") if (path := volume[part]) is not None]


def _sizes_agree(store: Path, record: dict) -> Iterator[bool]:
    for prefix in ("", "label-") if record["source"]["label"] else ("",):
        path = store / f"{prefix}{record['id']}.npy"
        voxels = record["slices"] * record["height"] * record["width"]
        yield path.exists() and 0 < path.stat().st_size - voxels <= 1024  # one .npy header


def prepare(data: Path, store: Path, kind: str, window: tuple[float, float] = WINDOW, size: int = SIZE,
            workers: int = 2, skip_bad: bool = False) -> "Store":
    """Make or complete the store of `kind` (pretrain, segment) below the folder `store`, and open it.

    Volumes are read in `workers` processes. What an earlier call finished is kept if its source and settings are
    unchanged. A second process waits for the first. Raises BadInput when volumes cannot be
    used, all named on stderr, unless `skip_bad`: then they are left out, by later calls too, and listed.
    """
    if not window[0] < window[1]:
        raise BadInput(f"--window {window[0]} {window[1]}: the lower HU must come first")
    size = size if kind == "pretrain" else 0
    volumes, skipped = find_volumes(data, kind)
    folder = store / (f"pretrain-{size}" if kind == "pretrain" else "segment")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"{folder}: waiting for another process that prepares it", file=sys.stderr)
            fcntl.lockf(lock, fcntl.LOCK_EX)
        records = {v["id"]: r for v in volumes if (r := _kept(v, folder, window, size))}
        accepted = _accepted(folder)
        skipped += [s for v in volumes if (s := accepted.get(str(v["image"])))]
        todo = [v for v in volumes if v["id"] not in records and str(v["image"]) not in accepted]
        changed = sum((folder / f"{v['id']}.json").exists() for v in todo)
        if changed:
            print(f"{folder}: {changed} volumes or settings changed since; preparing these again", file=sys.stderr)
        bad = []
        work = partial(_prepare_volume, store=folder, kind=kind, window=tuple(window), size=size)
        for volume, outcome in _in_processes(work, todo, workers, f"preparing {folder}"):
            if isinstance(outcome, BadInput):
                bad.append({"file": str(volume["image"]), "reason": str(outcome), "stamp": _stamps(volume)})
            else:
                records[volume["id"]] = outcome
        if bad and not skip_bad:
            for b in bad[1:]:
                print(b["reason"], file=sys.stderr)
            raise BadInput(bad[0]["reason"] + (f" ({len(bad)} such volumes, all named here)" if len(bad) > 1 else ""))
        skipped += bad
        if not records:
            raise BadInput(f"{data}: not one volume there can be used; see python datasets.py audit --data {data}")
        index = {"format": FORMAT, "kind": kind, "data": str(data.resolve()), "window": list(window), "size": size,
                 "volumes": [records[k] for k in sorted(records)], "skipped": skipped}
        _write_json(folder / "index.json", index)
        return Store(folder, index)


def _in_processes(work: Callable, items: list, workers: int, title: str) -> Iterator[tuple[dict, object]]:
    """(item, result or the BadInput it raised) for every item, in the order they finish."""
    if not items:
        return
    # fork: a spawned process would import the calling script, and with it PyTorch, for nothing
    context = get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(max(1, min(workers, len(items))), context) as pool:
        futures = {pool.submit(work, item): item for item in items}
        try:
            for future in tqdm(as_completed(futures), title, len(items), unit="volume", disable=None):
                try:
                    yield futures[future], future.result()
                except BadInput as e:
                    yield futures[future], e
        finally:
            pool.shutdown(cancel_futures=True)


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
        with open(path, "rb", buffering=0) as f:
            f.seek(path.stat().st_size - (v["slices"] - z) * out.size)
            if f.readinto(out) != out.size:
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


def audit(data: Path, kind: str, workers: int = 2) -> int:
    """Print what a data folder holds against the paper's counts. Returns the number of unusable files."""
    volumes, skipped = find_volumes(data, kind)
    good, bad, odd = [], [], []
    for volume, outcome in _in_processes(_inspect, volumes, workers, f"reading {data}"):
        if isinstance(outcome, BadInput):
            bad.append(str(outcome))
        else:
            good.append(outcome)
            odd += [f"{volume['image']}: {reason}" for reason in outcome["odd"]]
    good.sort(key=lambda r: r["id"])
    slices = sum(r["slices"] for r in good)
    wanted_volumes, wanted_slices = PAPER[kind]
    name = {"pretrain": "AbdomenCT-1K", "segment": "BTCV"}[kind]
    print(f"{data}: {len(good)} volumes, {slices:,} slices   (the paper's {name}: "
          f"{wanted_volumes:,} volumes, {wanted_slices:,} slices)")
    if good and all(r["phantom"] for r in good):
        print("every volume is generated: this is the phantom")
    if good:
        print(f"HU {min(r['hu'][0] for r in good):.0f} to {max(r['hu'][1] for r in good):.0f}, slices per volume "
              f"{min(r['slices'] for r in good)} to {max(r['slices'] for r in good)}")
    if kind == "segment":
        found = {r["id"]: r["slices"] for r in good}
        for split, paper in (("100", (24, 3017)), ("val", (6, 762))):
            present = [found[c] for c in cases(split) if c in found]
            print(f"  {'train' if split == '100' else 'val'}: {len(present)} volumes, {sum(present):,} slices   "
                  f"(the paper's: {paper[0]}, {paper[1]:,})")
        total = np.sum([r["voxels"] for r in good], axis=0)
        for organ, voxels in zip(ORGANS, total, strict=True):
            holding = sum(r["voxels"][ORGANS.index(organ)] > 0 for r in good)
            print(f"  {ORGANS.index(organ):2d} {organ:26s} {voxels:14,d} voxels in {holding} volumes")
    first: dict[str, str] = {}
    for r in good:
        if r["content"] in first:
            known = " (a known one)" if {r["id"], first[r["content"]]} == {"Case_00297", "Case_00928"} else ""
            odd.append(f"{r['id']}: the same image as {first[r['content']]}{known}")
        first.setdefault(r["content"], r["id"])
    for title, lines in (("unusable", sorted(bad)), ("odd", sorted(odd)),
                         ("skipped", [f"{s['file']}: {s['reason']}" for s in skipped])):
        print(f"{title}: {len(lines)}")
        for line in lines:
            print(f"  {line}")
    return len(bad)


def _inspect(volume: dict) -> dict:
    read = read_volume(volume["image"])
    record = {"id": volume["id"], "slices": len(read.hu), "phantom": read.is_phantom, "odd": [],
              "hu": [float(read.hu.min()), float(read.hu.max())],
              "content": hashlib.blake2b(read.hu, digest_size=16).hexdigest()}
    if volume["label"]:
        labels = read_labels(volume["label"], read, len(ORGANS))
        record["voxels"] = np.bincount(labels.ravel(), minlength=len(ORGANS)).tolist()
        if not labels.any():
            record["odd"].append("its label is empty")
    if read.spacing == (1.0, 1.0, 1.0):
        record["odd"].append("spacing (1, 1, 1) mm, most likely a placeholder")
    if record["hu"][0] > -200 or record["hu"][1] < 200:
        record["odd"].append(f"HU from {record['hu'][0]:.0f} to {record['hu'][1]:.0f} only")
    if not int(read.header["sform_code"]) and not int(read.header["qform_code"]):
        record["odd"].append("no orientation in its header; NIfTI's default was assumed")
    return record


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
    parser.add_argument("--store", type=Path, help="prepare: folder of the slices (default stores/NAME_OF_DATA)")
    parser.add_argument("--size", type=int, default=SIZE, help="prepare: side of the pre-training slices")
    parser.add_argument("--window", type=float, nargs=2, default=WINDOW, metavar=("LOW", "HIGH"), help="HU window")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--skip-bad", action="store_true", help="prepare: leave out and list unusable volumes")
    args = parser.parse_args(argv)
    btcv = any((args.data / p / "img").is_dir() for p in ("RawData/Training", "Training", "."))
    kind = args.kind or ("segment" if btcv else "pretrain")
    try:
        if args.command == "audit":
            if audit(args.data, kind, args.workers):
                raise SystemExit(1)
            return
        store = prepare(args.data, args.store or default_store(args.data), kind, tuple(args.window), args.size,
                        args.workers, skip_bad=args.skip_bad)
    except BadInput as e:
        raise SystemExit(f"datasets.py: {e}") from None
    print(f"{store.folder}: {len(store.volumes)} volumes, {len(store):,} slices")
    for s in store.skipped:
        print(f"  skipped {s['file']}: {s['reason']}")


if __name__ == "__main__":
    main()
