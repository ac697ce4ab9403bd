"""Slice stores: where they lie, what their files are called, and what of them still holds.

A store is a folder with one .npy of 8-bit slices per volume (any NumPy can memory-map it), a small .json beside
it, the volume's record, that says what it was made from, and index.json, with all records. Two kinds:
- pretrain: every slice padded to square with air and resampled to one size;
- segment: every slice at its own size, with its label map in a second .npy: classes 0, 1, ..., in the order of the
  task's label ids.
A store belongs to the resolved folder that it was made from; opened for another one it is refused.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from ct import tasks
from ct.files import checksum, write_json
from ct.names import files
from ct.tasks import BTCV, Task
from ct.volumes import BadInput

HEADER = 1024  # bytes of a .npy before its voxels, at most
SPLITS = "splits"  # folder beside those of the slices, for the splits of data that is not BTCV
FORMAT = 4  # of the store; another number means: prepare again


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


def _base(volume: str) -> str:
    """The name of a volume's files in a store: its id, kept apart from index.json, label-*.npy and hidden files."""
    return "_" * (volume.lower() in ("", "index") or volume.lower().startswith(("label-", "_", "."))) + volume


def array(store: Path, volume: str, label: bool = False) -> Path:
    """The file of a volume's slices in a store, or of its label maps."""
    return store / f"{'label-' * label}{_base(volume)}.npy"


def record_file(store: Path, volume: str) -> Path:
    """The file of a volume's record in a store."""
    return store / f"{_base(volume)}.json"


def stamp(path: Path) -> dict:
    """{file, bytes, mtime} of a file."""
    file = os.path.abspath(path)
    try:
        found = path.stat()
    except OSError:  # reading it will say why
        return {"file": file, "bytes": None, "mtime": None}
    return {"file": file, "bytes": found.st_size, "mtime": found.st_mtime_ns}


def stamps(volume: dict) -> list[dict]:
    """Those of a volume's image and of the files of its label."""
    return [stamp(path) for path in files(volume)]


def source_of(volume: dict) -> dict:
    """{image: stamp with its checksum, label: [of each of its files]}. Raises BadInput where one cannot be read: that
    must not stop the other volumes.
    """
    found = []
    for path in files(volume):
        try:
            found.append(stamp(path) | {"checksum": checksum(path)})
        except OSError as e:
            raise BadInput(f"{path}: cannot be read ({e.strerror})") from None
    return {"image": found[0], "label": found[1:]}


def _unchanged(source: dict, volume: dict) -> dict | None:
    """The record's source with today's times if the files are still the same, else None.

    Place, size and time decide; where the place or the time differs, the checksum.
    """
    olds, news = [source["image"], *(source["label"] or ())], stamps(volume)
    if len(olds) != len(news) or not all(map(_same_file, olds, news, files(volume))):
        return None
    image, *labels = (new | {"checksum": old["checksum"]} for old, new in zip(olds, news, strict=True))
    return {"image": image, "label": labels}


def _same_file(old: dict, new: dict, path: Path) -> bool:
    return old["bytes"] == new["bytes"] and ((old["file"], old["mtime"]) == (new["file"], new["mtime"])
                                             or old["checksum"] == _checksum_of(path, new["bytes"], new["mtime"]))


@functools.lru_cache(None)
def _checksum_of(path: Path, size: int, mtime: int) -> str:
    """`checksum`, once in a process for a file of this size and time."""
    return checksum(path)


def valid_record(volume: dict, store: Path, task: Task | None, window: tuple[float, float], size: int,
                 renew: bool) -> dict | None:
    """The record of a volume that an earlier preparation finished and that is still right, else None.

    With `renew`, that of a volume whose file was only copied or touched is written anew.
    """
    path = record_file(store, volume["id"])
    try:
        record = json.loads(path.read_text())
        source = _unchanged(record["source"], volume)
        right = (record["format"] == FORMAT and record["window"] == list(window) and record["size"] == size
                 and record.get("ids") == (task and task.recorded_ids) and source and all(sizes_agree(store, record)))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if right and source != record["source"]:  # copied or touched: spare the next start the checksum
        record["source"] = source
        if renew:
            write_json(path, record)
    return record if right else None


def sizes_agree(store: Path, record: dict) -> Iterator[bool]:
    """Of each array of a volume, whether its file is there and as long as its record says."""
    for name in record["checksums"]:
        path = store / name
        voxels = record["slices"] * record["height"] * record["width"]
        yield path.exists() and 0 < path.stat().st_size - voxels <= HEADER


def recorded_label_ids(volume: dict, folder: Path) -> list[int] | None:
    """The ids in a volume's label file by the record of a store that has it as it is, else None."""
    try:
        record = json.loads(record_file(folder, volume["id"]).read_text())
        voxels = zip(record["ids"], record["voxels"], strict=True)
        return [i for i, count in voxels if count] if _unchanged(record["source"], volume) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_index(folder: Path) -> dict:
    """A store's index.json; where it is missing or damaged an empty one, which the next preparation replaces."""
    try:
        index = json.loads((folder / "index.json").read_bytes())
    except (OSError, ValueError):
        index = None
    usable = isinstance(index, dict) and {"volumes", "skipped"} <= index.keys()
    return index if usable else {"volumes": [], "skipped": []}


def own_index(folder: Path, data: str) -> dict | None:
    """A store's index, None where it has none that is whole. Raises BadInput where it was made from another folder."""
    index = read_index(folder)
    if "data" not in index:
        return None
    if (owner := index["data"]) != data:
        raise BadInput(f"{folder}: was made from {owner}, not from {data}; give another --store (or, if that folder "
                       f"has moved, delete {folder / 'index.json'}: each volume is then compared by its checksum)")
    return index


def task_of(folder: Path, index: dict) -> Task | None:
    """The task of a store, by its folder and index; None of one for pre-training."""
    if index["kind"] == "pretrain":
        return None
    if (entry := index.get("task")) is None:
        return BTCV
    listed = entry.get("listed") and tasks.Listed(entry["listed"]["source"], tuple(entry["listed"]["cases"]))
    return tasks.of(entry["name"], {int(i): organ for i, organ in entry["labels"].items()}, folder.parent / SPLITS,
                    listed)
