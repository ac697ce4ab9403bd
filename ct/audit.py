"""What a data folder or a store holds, in words and on a contact sheet; whether a store is still what was written."""

import collections
import functools
import itertools
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ct import coverage, layouts, pool, repeats, tasks
from ct.command import cause, counted, printable
from ct.files import checksum, replacing
from ct.intake import named, skip
from ct.judgement import AIR, SOFT
from ct.organs import IN_AIR, compare
from ct.reading import describe, find, task_in
from ct.stores import read_index
from ct.tasks import BTCV, Task
from ct.volumes import BadInput

SHEET = 24  # slices on a contact sheet
NO_IMAGE = "no images by their names"
BY_REASON = {layouts.NO_LABEL: "without a label", layouts.UNLISTED: "labelled, but listed nowhere"}
LEFT_OUT = (NO_IMAGE, *BY_REASON.values(), "unusable")
WARNINGS = "warnings"  # what is used all the same; "odd" in records and indices
FEW = 20  # files that are left out for one reason: named one by one, more of them in one line
SHOWN = 8  # ids, or ranges of ids, that a line names
# What the paper says of its data. That 3017 are the slices of 24 of the 30 volumes, to train on, and that the other 6
# have 762, is our inference (docs/decisions.md).
PAPER = {"pretrain": "AbdomenCT-1K: 1,062 volumes, 215,325 slices",
         "segment": "BTCV: 30 volumes, 3,017 slices; by our inference those of 24 to train on, 3,779 in all"}


def command_line(data: Path, kind: str, labels: Path | None = None, organs: Sequence[str] | None = None,
                 images: Sequence[str] | None = None) -> str:
    """The audit of a data folder as you type it, with the flags that change what it finds there."""
    words = ["python", "datasets.py", "audit", "--data", str(data)]
    if kind != layouts.usual_kind(data, labels, organs):
        words += ["--kind", kind]
    for flag, value in (("--labels", labels), ("--organs", organs), ("--images", images)):
        if value:
            words += [flag, str(value) if isinstance(value, Path) else ",".join(value)]
    return shlex.join(words)


def remarks(volumes: list[dict], skipped: list[dict], task: Task = BTCV,
            see: str = "python datasets.py audit --data FOLDER") -> list[str]:
    """What a command prints at its start about prepared volumes: the number of warnings, intensities, organs.

    see: the command that lists them, by `command_line`.
    """
    see = f"({see} lists them)"
    astray = compare(volumes, task.organs).elsewhere
    number = len(_warnings(volumes, astray)) + sum(bool(s.get("odd")) for s in skipped)
    lines = [f"{WARNINGS}: {number} {see}"] if number else []
    if astray:
        first, words = next(iter(astray.items()))
        lines.append(f"labels: in {len(astray)} of {counted(len(volumes), 'volume')} they seem to lie elsewhere than "
                     f"the other patients' ({first}: {words})")
    if bright := [v for v in volumes if _bulk(v)[0] > AIR]:
        low, high = _bulk(bright[0])
        lines.append(f"intensities: in {len(bright)} of {counted(len(volumes), 'volume')} nothing lies under {AIR} HU "
                     f"({bright[0]['id']}: {low:.0f} to {high:.0f}); exported to 0..255, or stored without the "
                     "intercept? They are used as they are")
    counts = collections.Counter(map(_kind, skipped))
    lines += [f"left out, {kind}: {counts[kind]} {see}" for kind in LEFT_OUT if counts[kind]]
    if absent := absent_organs(volumes, task):
        more = f" ... ({len(absent)} organs)" * (len(absent) > FEW)
        lines.append(f"no volume has: {', '.join(absent[:FEW])}{more}; mean Dice is over the organs that occur")
    return lines


def _bulk(volume: dict) -> list[float]:
    """Lowest and highest HU of the bulk of a volume; of records of before it was known, of all its voxels."""
    return volume.get("bulk", volume["hu"])


def _kind(skipped: dict) -> str:
    """Which of LEFT_OUT a skipped file is of; what is WARNINGS is not left out."""
    if skipped["no_image"]:
        return WARNINGS if skipped.get("odd") else BY_REASON.get(skipped["reason"], NO_IMAGE)
    return "unusable"


def absent_organs(volumes: list[dict], task: Task = BTCV) -> list[str]:
    """The organs of which no labelled volume has a voxel; [] where none is labelled."""
    voxels = [v["voxels"] for v in volumes if "voxels" in v]
    return [task.organs[i] for i in np.flatnonzero(np.sum(voxels, 0) == 0)] if voxels else []


def audit(data: Path, kind: str, workers: int | None, store: Path, draw: Callable | None = None,
          names: Path | None = None, organs: Sequence[str] | None = None, images: Sequence[str] | None = None) -> int:
    """Print what a data folder holds, against the paper's counts where it is the paper's data.

    The middle slices go to a picture in `store`, and there the whole list where the printed one has been shortened.
    Returns the number of files it cannot use.
    """
    found, good, bad = find(data, kind, names, organs, images), [], []
    task = task_in(data, store, found, store / kind, workers) if kind == "segment" else None
    work = functools.partial(_inspect, task=task)
    for volume, outcome in pool.in_processes(work, found.volumes, workers, f"reading {data}"):
        if isinstance(outcome, BadInput):
            bad.append(skip(volume["image"], str(outcome)))
        else:
            good.append(outcome)
    if task:
        in_air = compare(good, task.organs).in_air
        bad += [skip(r["file"], f"{r['file']}: {IN_AIR.format(in_air[r['id']])}") for r in good if r["id"] in in_air]
        good = [r for r in good if r["id"] not in in_air]
    good.sort(key=lambda r: r["id"])
    paper = f"   (the paper's {PAPER[kind]})" if task is None or task.of_paper else ""
    print(f"{data}: {counted(len(good), 'volume')}, {counted(sum(r['slices'] for r in good), 'slice')}{paper}")
    if good and all(r["phantom"] for r in good):
        print("every volume is generated: this is the phantom")
    if good:
        print(f"HU {min(r['hu'][0] for r in good):.0f} to {max(r['hu'][1] for r in good):.0f}, slices per volume "
              f"{min(r['slices'] for r in good)} to {max(r['slices'] for r in good)}")
    if task:
        _print_task(good, task)
        if source := repeats.in_abdomenct(data, [r["id"] for r in good]):
            print(f"by its names this is {source}. AbdomenCT-1K holds its CTs, too: a backbone that was pre-trained on "
                  "AbdomenCT-1K has seen them, and a Dice on them is no test of it")
    picked = good[:: -(-len(good) // SHEET) or 1]
    contact_sheet(draw, store / f"audit-{kind}.png", [r["middle"] for r in picked],
                  [f"{r['id']} slice {r['slices'] // 2}" for r in picked],
                  [r["labels"] for r in picked] if task else None, task)
    if task and task.of_paper:
        try:
            tasks.refuse_other_ids(data, good)
        except BadInput as e:
            bad.append(skip(data, str(e)))
    return print_skipped(good, found.skipped + bad, task, store / f"audit-{kind}.txt")


def _inspect(volume: dict, task: Task | None) -> dict:
    record, slices, labels = describe(volume, task, SOFT)
    middle = len(slices) // 2
    return record | {"middle": slices[middle], "labels": None if labels is None else labels[middle]}


def contact_sheet(draw: Callable | None, path: Path, slices: list[np.ndarray], titles: list[str],
                  labels: list[np.ndarray] | None, task: Task | None) -> None:
    """Slices (H, W) uint8, with their label maps for a task, as a picture at `path`, if `draw` draws one."""
    if slices and draw and draw(path, slices, titles, labels, task.organs if task else ()):
        print(f"{path}: {counted(len(slices), 'slice')} to look at")


def _print_task(good: list[dict], task: Task) -> None:
    """The slices of each split, where they are drawn; the voxels of each organ; scans that seem to be one patient's."""
    found = {r["id"]: r["slices"] for r in good}
    for split, paper in (("100", (24, 3017)), ("val", (6, 762))):
        if task.file(split).exists():
            present = [found[c] for c in task.cases(split) if c in found]
            print(f"  {'train' if split == '100' else 'val'}: {counted(len(present), 'volume')}, "
                  + counted(sum(present), "slice")
                  + f"   (the paper's, by our inference: {paper[0]}, {paper[1]:,})" * task.of_paper)
    counts = np.array([r["voxels"] for r in good], np.int64).reshape(-1, len(task.ids))
    for (label, organ), voxels in zip(task.labels.items(), counts.T, strict=True):
        print(f"  {label:2d} {organ:26s} {voxels.sum():14,d} voxels in {counted((voxels > 0).sum(), 'volume')}")
    if absent := absent_organs(good, task):
        print(f"  no volume has: {', '.join(absent)}")
    for line in coverage.remarks(good, task):
        print(f"  {printable(line)}")
    for patient, group in tasks.siblings(found).items():
        print(f"  these seem to be one patient's, {patient}: {', '.join(group)}")


def _warnings(records: list[dict], astray: dict[str, str]) -> list[str]:
    """The warnings of volumes, a line each: their own, labels that lie elsewhere (`compare`), what is there twice."""
    lines = [f"{r['file']}: {reason}" for r in records for reason in r["odd"]]
    lines += [f"{r['file']}: its labels seem to lie elsewhere than the other patients': {astray[r['id']]}"
              for r in records if r["id"] in astray]
    return lines + [f"{name}: {reason}" for name, reason in repeats.between(records).items()]


def _by_kind(lines: list[str], names: dict[str, str], least: int = 1) -> list[str]:
    """Lines `file or id: words`, sorted; one line for more than `least` volumes whose words differ in numbers at most.

    names: {file or id: what it is called in such a line}.
    """
    kinds, known, out = {}, sorted(set(names.values())), []
    for line in sorted(lines):
        name, _, words = line.partition(": ")
        kind = re.sub(r"\d[\d,.]*|s\b", "", words) if name in names else line
        kinds.setdefault(kind, []).append((line, names.get(name), words))
    for group in kinds.values():
        lines, volumes, words = zip(*group, strict=True)
        if len(set(volumes)) <= least:
            out += lines
        else:
            alike = " (and alike)" * (len(set(words)) > 1)
            out.append(f"{len(set(volumes))} volumes: {words[0]}{alike}: {_ranges(set(volumes), known)}")
    return out


def _ranges(some: set[str], known: list[str]) -> str:
    """Some of the known ids, in their order; three or more that follow each other as `first to last`; SHOWN of them."""
    parts = []
    for there, run in itertools.groupby(known, some.__contains__):
        if there:
            run = list(run)
            parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else run
    return ", ".join(parts[:SHOWN]) + " ..." * (len(parts) > SHOWN)


def print_skipped(records: list[dict], skipped: list[dict], task: Task | None, whole: Path) -> int:
    """The lists that end both commands: unusable, warnings, left out. Returns the number of the unusable.

    Where a line stands for several unusable files or warnings, all of them go to the text file `whole`, one a line.
    """
    unusable = [s for s in skipped if not s["no_image"]]
    kinds: dict[str, list] = {WARNINGS: [], NO_IMAGE: []}
    for s in skipped:
        kinds.setdefault(_kind(s), []).append(s)
    bad = [*map(named, unusable)]
    warned = _warnings(records, compare(records, task.organs).elsewhere if task else {})
    names = {s["file"]: Path(s["file"]).name for s in unusable}
    names |= {name: r["id"] for r in records for name in (r["file"], r["id"])}
    told = [("unusable", bad, _by_kind(bad, names, FEW)),
            (WARNINGS, warned + [*map(named, kinds[WARNINGS])], _by_kind(warned, names) + _by_folder(kinds[WARNINGS]))]
    left_out = [(title, kinds[kind], _by_folder(kinds[kind])) for kind, title in
                ((NO_IMAGE, "no image by its name"), *((kind, kind) for kind in BY_REASON.values())) if kind in kinds]
    for title, every, shown in told + left_out:
        print(f"{title}: {len(every)}")
        for line in shown:
            print(f"  {printable(line)}")
    if any(len(shown) < len(every) for _, every, shown in told):
        _write_whole(whole, [f"{title}: {printable(line)}" for title, every, _ in told for line in sorted(every)])
    return len(unusable)


def _write_whole(path: Path, lines: list[str]) -> None:
    """A list that was printed shortened; a folder in which nothing can be written is no reason to fail."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as e:
        print(f"the whole list was not written: {printable(cause(e))}")
    else:
        print(f"{path}: the whole list, one a line")


def _by_folder(skipped: list[dict]) -> list[str]:
    """A line for each, sorted; where a folder has many that are skipped for one reason, a line for all of them."""
    folders: dict[tuple, list] = {}
    for s in sorted(skipped, key=lambda s: s["file"]):
        folders.setdefault((Path(s["file"]).parent, s["reason"]), []).append(s)
    lines = [named(s) for group in folders.values() if len(group) <= FEW for s in group]
    return sorted(lines + [f"{folder}: {len(group)} files, each {reason} ({Path(group[0]['file']).name} ...)"
                           for (folder, reason), group in folders.items() if len(group) > FEW])


def verify(store: Path) -> int:
    """Compare every array below a store's folder with the checksum it was written with; the number of damaged ones.

    Raises BadInput where nothing was prepared, or an index is damaged.
    """
    indices = sorted(store.glob("*/index.json"))
    if not indices:
        raise BadInput(f"{store}: nothing was prepared there; give --store")
    if lost := [index for index in indices if not read_index(index.parent)["volumes"]]:
        raise BadInput(f"{lost[0]}: damaged; prepare that store again")
    damaged = [path for index in indices for record in read_index(index.parent)["volumes"]
               for name, written in record["checksums"].items()
               if not (path := index.parent / name).exists() or checksum(path) != written]
    for path in damaged:
        print(f"{path}: damaged; delete it, and it will be prepared again")
    print(f"{store}: {counted(len(damaged), 'damaged array')}")
    return len(damaged)
