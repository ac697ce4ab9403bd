"""Folders of CT volumes -> slice stores, and the command that prepares and audits them.

    python datasets.py prepare --data data/AbdomenCT-1K
    python datasets.py prepare --data data/BTCV --kind segment
    python datasets.py prepare --data data/Task09_Spleen        any labelled data, as ct/layouts.py lists it
    python datasets.py audit --data data/BTCV
    python datasets.py audit --data data/BTCV --verify          are the prepared slices still as written?

Both end with a list of what cannot be used, of warnings and of what is left out. Their exit code is 0 only where all
can be used; --skip-bad accepts what cannot. What a store is: stores.py.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from PIL import Image

from ct import audit, coverage, layouts, pool, stores, tasks
from ct.command import Parser, command, counted, folder, listed, number, printable, whole
from ct.files import checksum, lock, remove_parts, replacing, write_json
from ct.intake import named, skip
from ct.judgement import SOFT
from ct.organs import IN_AIR, compare
from ct.reading import describe, find, task_in
from ct.tasks import Task
from ct.volumes import BadInput

WINDOW = SOFT  # HU
SIZE = 512  # side of the slices of a store for pre-training


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
    out = np.empty((z, size, size), np.uint8)
    for small, s in zip(out, slices, strict=True):
        small[:] = Image.fromarray(s).resize((size, size), Image.Resampling.BILINEAR)
    return out


def _prepare_volume(volume: dict, store: Path, task: Task | None, window: tuple[float, float], size: int) -> dict:
    """One volume into the store. Returns its record; raises BadInput. The .json is written last: no half volume."""
    # before it is read: a file that changes meanwhile is read again
    source = stores.source_of(volume)
    record, slices, labels = describe(volume, task, window)
    arrays = {False: slices, True: labels} if task else {False: square(slices, size)}
    record["slices"], record["height"], record["width"] = arrays[False].shape
    record |= {"format": stores.FORMAT, "window": list(window), "size": size, "source": source, "checksums": {}}
    done = stores.record_file(store, volume["id"])
    done.unlink(missing_ok=True)  # from here to the last line there is no such volume
    for label, voxels in arrays.items():
        path = stores.array(store, volume["id"], label)
        with replacing(path) as part:
            np.save(part, voxels)
            record["checksums"][path.name] = checksum(part)
    write_json(done, record)
    return record


def _accepted(store: Path) -> dict[str, dict]:
    """What `prepare --skip-bad` left out before, by image."""
    return {e["file"]: e for e in stores.read_index(store)["skipped"] if "stamps" in e}


def _refuse_unusable(skipped: list[dict], store: Path) -> None:
    """Raise BadInput for what is unusable in the data folder, but for what `prepare --skip-bad` accepted before."""
    index = stores.read_index(store)
    before = index["skipped"] if index.get("format") == stores.FORMAT else []
    if unusable := [s for s in skipped if not s["no_image"] and s not in before]:
        _refuse(unusable)


def _refuse(unusable: list[dict]) -> None:
    """Raise BadInput with the first of these, the others on stderr."""
    first, *others = map(named, unusable)
    for line in others:
        print(printable(line), file=sys.stderr)
    raise BadInput(first + f" ({len(unusable)} such volumes or files, all named here)" * bool(others))


def prepare(data: Path, store: Path, kind: str, window: tuple[float, float] = WINDOW, size: int = SIZE,
            workers: int | None = None, skip_bad: bool = False, names: Path | None = None,
            organs: Sequence[str] | None = None, images: Sequence[str] | None = None) -> tuple[Path, dict]:
    """Make or complete the store of `kind` (pretrain, segment) below the folder `store`: (its folder, its index).

    Volumes are read in `workers` processes, by default one a core. What an earlier call finished is kept if its source
    and settings are unchanged; where that is all, nothing is locked or written. A second process waits for the first.
    Raises BadInput for a store of another folder, and when volumes, or other files of the folder, cannot be used, all
    named on stderr, unless `skip_bad`: then they are left out, by later calls too, and listed. names, organs: those of
    `layouts.find`; images: of `intake.find_volumes`.
    """
    window = tuple(float(w) for w in window)
    if not window[0] < window[1]:
        raise BadInput(f"--window {window[0]} {window[1]}: the lower HU must come first")
    size = size if kind == "pretrain" else 0
    found = find(data, kind, names, organs, images)
    folder = store / _folder_name(kind, size, window, found.labels if names or organs else None)
    if not skip_bad:
        _refuse_unusable(found.skipped, folder)
    owner, complete = str(data.resolve()), None
    try:
        there = stores.own_index(folder, owner)
        task = task_in(data, store, found, folder, workers) if kind == "segment" else None
        records, left_out, todo = _survey(found.volumes, folder, task, window, size)
        if records and not todo:
            records, left_out = _without_air(records, left_out, found.volumes, folder, task, skip_bad)
        if records and not todo:  # complete: opened without a lock, and where nothing can be written
            complete = _index(data, kind, window, size, task, records, found.skipped + left_out)
            if there == complete:
                return folder, complete
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder) as alone:
            there = stores.own_index(folder, owner)  # again: who was waited for may have made it, from another folder
            records, left_out = _without_air(
                *_complete(found.volumes, folder, task, window, size, workers, skip_bad, alone), found.volumes, folder,
                task, skip_bad)
            if not records:
                raise BadInput(f"{data}: no volume there can be used; to see why: "
                               + audit.command_line(data, kind, names, organs, images))
            index = _index(data, kind, window, size, task, records, found.skipped + left_out)
            if there != index:
                write_json(folder / "index.json", index)
    except OSError as e:
        if complete:
            return folder, complete
        raise BadInput(f"{e.filename or folder}: {e.strerror or e} (while preparing {folder}); run the same command "
                       "again once that is fixed") from None
    except (BrokenProcessPool, MemoryError):
        raise BadInput(f"{folder}: a process that prepared it ran out of memory or was killed; run the same command "
                       "again with fewer --workers") from None
    return folder, index


def _index(data: Path, kind: str, window: tuple[float, float], size: int, task: Task | None, records: dict[str, dict],
           skipped: list[dict]) -> dict:
    """What index.json holds of a store. Raises BadInput where BTCV's layout holds other ids."""
    index = {"format": stores.FORMAT, "kind": kind, "data": str(data.resolve()), "window": list(window), "size": size,
             "volumes": [records[k] for k in sorted(records)], "skipped": skipped}
    if task and task.recorded:
        index["task"] = {"name": task.name} | task.recorded
        if task.listed:
            index["task"]["listed"] = {"source": task.listed.source, "cases": list(task.listed.cases)}
    elif task:
        tasks.refuse_other_ids(data, index["volumes"])
    return index


def _folder_name(kind: str, size: int, window: tuple[float, float], chosen: dict[int, str] | None) -> str:
    """A folder of its own for another choice of labels or window: a run that reads one must not find its slices
    exchanged.
    """
    name = f"pretrain-{size}" if kind == "pretrain" else "segment"
    if chosen:
        name += f"-{hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:8]}"
    return name if window == WINDOW else f"{name}-{window[0]:g}-{window[1]:g}"


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
    records = {v["id"]: r for v in found if (r := stores.valid_record(v, folder, task, window, size, renew))}
    accepted = _accepted(folder)
    left_out = [e for v in found if v["id"] not in records and (e := accepted.get(str(v["image"])))
                and e["stamps"] == stores.stamps(v)]
    known = {e["file"] for e in left_out}
    return records, left_out, [v for v in found if v["id"] not in records and str(v["image"]) not in known]


def _complete(found: list[dict], folder: Path, task: Task | None, window: tuple[float, float], size: int,
              workers: int | None, skip_bad: bool, alone: bool) -> tuple[dict[str, dict], list[dict]]:
    """Prepare what is missing in a store: (records by id, left out). alone: this process has locked it."""
    if alone:
        remove_parts(folder)
    records, left_out, todo = _survey(found, folder, task, window, size, renew=True)
    if changed := [v["id"] for v in todo if stores.record_file(folder, v["id"]).exists()]:
        print(f"{folder}: {counted(len(changed), 'volume')} changed since or damaged there, prepared again: "
              f"{', '.join(changed[:5])}{' ...' if len(changed) > 5 else ''}", file=sys.stderr)
    bad = []
    work = functools.partial(_prepare_volume, store=folder, task=task, window=window, size=size)
    for volume, outcome in pool.in_processes(work, todo, workers, f"preparing {folder}"):
        if isinstance(outcome, BadInput):
            bad.append(skip(volume["image"], str(outcome)) | {"stamps": stores.stamps(volume)})
        else:
            records[volume["id"]] = outcome
    if bad and not skip_bad:
        _refuse(bad)
    if made := len(todo) - len(bad):
        size = sum((folder / name).stat().st_size for r in records.values() for name in r["checksums"])
        print(f"{folder}: {counted(made, 'volume')} prepared ({size / 1e6:,.0f} MB on disk in all); later starts read "
              "them there")
    return records, left_out + bad


def _without_air(records: dict[str, dict], left_out: list[dict], found: list[dict], folder: Path, task: Task | None,
                 skip_bad: bool) -> tuple[dict[str, dict], list[dict]]:
    """(records, left out) with the volumes whose labels lie in air, by what the others' are, left out.

    Raises BadInput for them, unless `skip_bad` or an earlier --skip-bad accepted that.
    """
    in_air = compare(list(records.values()), task.organs).in_air if task else {}
    bad = [skip(v["image"], f"{v['image']}: {IN_AIR.format(in_air[v['id']])}") | {"stamps": stores.stamps(v)}
           for v in found if v["id"] in in_air]
    before = _accepted(folder)
    if not skip_bad and (new := [s for s in bad if before.get(s["file"], {}).get("stamps") != s["stamps"]]):
        _refuse(new)
    return {k: r for k, r in records.items() if k not in in_air}, left_out + bad


def task_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is segmented, and on which volumes, in data that does not say so itself."""
    add = parser.add_argument
    add("--labels", type=Path, metavar="FILE", help="text file that names the label ids if the data does not: one "
        "a line, such as `1 liver`")
    add("--organs", type=listed, metavar="A,B", help="which of TotalSegmentator's masks to use (default: all, sorted); "
        "where two overlap, the later in your list keeps the voxel")
    add("--val", type=number(above=0, most=0.9), help="share of the patients to validate on, chosen at random once "
        f"(default {tasks.VAL_SHARE:g})")
    add("--val-cases", type=Path, metavar="FILE", help="text file of the volumes to validate on instead, one id a line")
    add("--patient-regex", metavar="REGEX", help="regular expression that finds the patient in a volume's id, so that "
        "all volumes of a patient stay on one side of the split: with ^[^_]+ the patient of p1_late is p1")


def images_flag(parser: argparse.ArgumentParser) -> None:
    """The flag that says which files are CT volumes, where their names or voxels say something else."""
    parser.add_argument("--images", type=listed, metavar="A,B", help="which files of a folder of CT without labels to "
                        "read, in spite of their names: patterns such as 'GT*,*/ct.nii.gz' (default: all but label "
                        "maps, distances and doses, known by their names or, where a name is unclear, their voxels)")


@command
def main(argv: list[str] | None = None, draw: Callable | None = None) -> None:
    """The commands. draw(path, slices, titles, labels, names) -> bool: what draws a contact sheet, if anything."""
    parser = Parser(description="Prepare or audit a folder of CT volumes.")
    parser.add_argument("command", choices=("prepare", "audit"), help="prepare: turn volumes into slices; audit: list "
                        "what the folder holds and what is wrong with it")
    parser.add_argument("--data", type=Path, required=True, help="folder of the CT volumes")
    parser.add_argument("--kind", choices=("pretrain", "segment"), help="what the slices are for (default: segment for "
                        "BTCV's layout, a dataset.json, --labels or --organs; pretrain otherwise)")
    parser.add_argument("--store", type=folder, help="folder of the prepared slices (default: stores/NAME-HASH)")
    parser.add_argument("--size", type=whole(1), default=SIZE, help="prepare: side of the pre-training slices "
                        "in pixels (default %(default)s)")
    parser.add_argument("--window", type=number(), nargs=2, default=WINDOW, metavar=("LOW", "HIGH"),
                        help="prepare: the HU that become black and white (default {:g} {:g})".format(*WINDOW))
    parser.add_argument("--workers", type=whole(0), help="number of processes (default: one a core)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out volumes that cannot be used, now and in "
                        "later commands: they are listed, and the exit code is 0")
    parser.add_argument("--verify", action="store_true", help="audit: only compare the prepared slices with their "
                        "checksums")
    task_flags(parser)
    images_flag(parser)
    args = parser.parse_args(argv)
    kind = args.kind or layouts.usual_kind(args.data, args.labels, args.organs)
    if kind == "pretrain" and (args.labels or args.organs or args.val or args.val_cases or args.patient_regex):
        parser.error("--labels, --organs, --val, --val-cases and --patient-regex need --kind segment")
    if kind == "segment" and args.images:
        parser.error("--images needs --kind pretrain; labelled images are found by their labels")
    target = args.store or stores.default_store(args.data)
    if args.command == "audit" and args.verify:
        raise SystemExit(1 if audit.verify(target) else 0)
    if args.command == "audit":
        skipped = audit.audit(args.data, kind, args.workers, target, draw, args.labels, args.organs,
                              args.images)
    else:
        store, index = prepare(args.data, target, kind, args.window, args.size, args.workers, args.skip_bad,
                               args.labels, args.organs, args.images)
        places = [(v["id"], z) for v in index["volumes"] for z in range(v["slices"])]
        print(f"{store}: {counted(len(index['volumes']), 'volume')}, {counted(len(places), 'slice')}")
        picked = [places[i] for i in np.linspace(0, len(places) - 1, min(audit.SHEET, len(places))).astype(int)]
        slices, labels = ([np.load(stores.array(store, name, label), mmap_mode="r")[z] for name, z in picked]
                          if not label or kind == "segment" else None for label in (False, True))
        task = stores.task_of(store, index)
        audit.contact_sheet(draw, store / "contact_sheet.png", slices, [f"{n} slice {z}" for n, z in picked], labels,
                            task)
        skipped = audit.print_skipped(index["volumes"], index["skipped"], task, store / "audit.txt")
        if task:
            remarks = tasks.draw_splits(task, [v["id"] for v in index["volumes"]], args.val, args.val_cases,
                                        args.patient_regex)
            remarks += coverage.remarks(index["volumes"], task)
            if not task.of_paper:
                remarks.insert(0, f"splits: {task.file('val')} and those beside it")
            for line in remarks:
                print(printable(line))
    if skipped and not args.skip_bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
