"""What is segmented, and on which volumes: BTCV's organs and splits, or those of anyone's labelled data.

A split is a text file of volume ids, one a line. BTCV's lie in splits/; those of other data are drawn once beside its
store, and read from there ever after: they may be edited and published.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ct.command import counted
from ct.files import replacing
from ct.names import composed
from ct.repeats import copies
from ct.volumes import BadInput

SHARES = {"12.5": 1 / 8, "25": 1 / 4}  # of the training volumes
DRAWS = 3
VAL_SHARE = 0.2  # of the patients
SEED = 13
# ml on average of many patients: more than any organ of BTCV but the liver, of about 1,500, has; and less than a part
# of an organ that is worth comparing
MOST, LEAST = 700, 100
# what tells several scans of a patient apart: 0012_venous, 0012-post_contrast
SUFFIXES = re.compile(r"(?<=\d)([_-][a-z][^_-]*)+$", re.IGNORECASE)


class Listed(NamedTuple):
    """The ids of the volumes that the data's own list has to validate on, and where it says so, in words."""

    source: str
    cases: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """The names of the labels, and the volumes of each split.

    labels: {id in the label files: name}, ascending, 0 is "background"; class c of a store is the c-th of them.
    negatives: whether a volume without any organ is one of the task, and not a damaged one.
    listed: what the data's own list has to validate on.
    """

    name: str
    labels: dict[int, str]
    folder: Path  # of the splits, whose names begin with `prefix`
    prefix: str
    negatives: bool = True
    listed: Listed | None = None

    @property
    def organs(self) -> tuple[str, ...]:
        """The name of each class, "background" first."""
        return tuple(self.labels.values())

    @property
    def ids(self) -> tuple[int, ...]:
        """The id of each class in label files."""
        return tuple(self.labels)

    @property
    def of_paper(self) -> bool:
        """Whether it is the paper's, BTCV: its labels and splits are known and stand in no record."""
        return self == BTCV

    @property
    def recorded(self) -> dict:
        """What a run's settings and a store's index say of it: {"labels": {id: name}}; of the paper's nothing."""
        return {} if self.of_paper else {"labels": {str(i): organ for i, organ in self.labels.items()}}

    @property
    def recorded_ids(self) -> list[int] | None:
        """What a volume's record says of its classes: the id of each; of the paper's nothing."""
        return None if self.of_paper else list(self.ids)

    def file(self, split: str, draw: int = 0) -> Path:
        """Where the ids of a split are: '12.5' and '25' (draws 0 to 2), '100', or 'val'."""
        name = {"100": "train", "val": "val"}.get(split, f"{split}_{draw}")
        return self.folder / f"{self.prefix}_{name}.txt"

    def cases(self, split: str, draw: int = 0) -> list[str]:
        """The ids of a split's volumes. Raises BadInput, for a volume to train and to validate on, too."""
        path = self.file(split, draw)
        if not path.exists():
            known = sorted(p.stem for p in self.folder.glob(f"{self.prefix}_*.txt"))
            raise BadInput(f"{path}: no such split; there are {', '.join(known) or 'none'}")
        found = _listed(path)
        if split != "val" and (both := set(found).intersection(self.cases("val"))):
            raise BadInput(f"{path}: {min(both)} is in {self.file('val')}, too; take it out of one of the two")
        return found


SPLITS = Path(__file__).parent.parent / "splits"
BTCV = Task("BTCV", dict(enumerate((
    "background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland"))),
    SPLITS, "btcv", negatives=False)
ORGANS = BTCV.organs
cases = BTCV.cases


def of(name: str, labels: dict[int, str], folder: Path, listed: Listed | None = None) -> Task:
    """The task of anyone's data, with the splits' `folder`; their names begin with the data's, as files can have it."""
    prefix = re.sub(r"[^\w.]+", "_", name.lower()).strip("_") or "data"
    return Task(name, labels, folder, prefix, listed=listed)


def draw_splits(task: Task, ids: Iterable[str], val: float | None = None, val_cases: Path | None = None,
                patients: str | None = None) -> list[str]:
    """Write the files of a task's splits that are not there yet. Returns remarks on them, a line each.

    ids: all volumes. To validate on: what the data's own list has for it, else the share `val` of the patients (a
    fifth); whatever the list says, the share that is given, or the ids in the file `val_cases`. To train on: all the
    others, of which a draw takes 12.5 or 25 %, rounded up, without replacement. A patient is a volume, or all whose ids
    have the same match of the regular expression `patients` (its first group, if it has groups).
    Every draw has a generator of its own, from SEED and its place. Raises BadInput, also where files are there and
    what was asked for would give others.
    """
    ids, asked = sorted(ids), (val, val_cases, patients) != (None, None, None)
    files: dict[Path, list[str]] = {}

    def choose(split: str, fresh: Iterable[str], draw: int = 0) -> list[str]:
        """The ids of a split: those in its file, else `fresh`."""
        path = task.file(split, draw)
        files[path] = _listed(path) if path.exists() and not asked else sorted(fresh)
        return files[path]

    known = task.file("val").exists() and not asked
    held_out = choose("val", () if known else _held_out(task, ids, val, val_cases, _of_patients(ids, patients)))
    train = choose("100", set(ids).difference(held_out))
    if not train:
        raise BadInput(f"{val_cases or task.file('100')}: no volume is left to train on")
    for place, (split, share) in enumerate(SHARES.items(), 1):
        for draw in range(DRAWS):
            drawn = np.random.default_rng([SEED, place, draw]).choice(len(train), math.ceil(share * len(train)), False)
            choose(split, [train[i] for i in drawn], draw)
    there = [path for path in files if path.exists()]
    if other := [str(path) for path in there if set(_listed(path)) != set(files[path])]:
        raise BadInput(f"{', '.join(other)}: already there, and --val, --val-cases and --patient-regex ask for "
                       "another split; leave these flags out, or delete all files of the split to make a new one")
    for path in files.keys() - there:
        _write(path, files[path])
    told = [] if (val, val_cases) != (None, None) else _of_the_list(task, set(ids), set(held_out))
    return told + _remarks(ids, set(train), set(held_out))


def refuse_other_ids(data: Path, volumes: Iterable[dict]) -> None:
    """Raise BadInput for label maps in BTCV's layout whose ids are another set's, such as that of its 8 organs.

    volumes: records of them, with the voxels of each of BTCV's ids and the spacing. An organ that is not the liver and
    yet larger than any other can be, or over twice the liver, on average of the volumes that have it, is none.
    """
    known = [v for v in volumes if "voxels" in v]
    sizes = np.array([np.multiply(v["voxels"], math.prod(v["spacing"]) / 1000) for v in known])  # (volumes, ids) in ml
    mean = sizes.sum(0)[1:] / np.maximum(np.count_nonzero(sizes, axis=0)[1:], 1) if known else np.zeros(len(ORGANS) - 1)
    liver, largest = ORGANS.index("liver"), 1 + int(mean.argmax())
    size = mean[largest - 1]
    if largest != liver and (size > MOST or size > LEAST and 0 < 2 * mean[liver - 1] < size):
        raise BadInput(f"{data}: its label ids seem to be others than BTCV's: id {largest} would be the "
                       f"{ORGANS[largest]} and has {size:,.0f} ml on average, id {liver} would be the liver and has "
                       f"{mean[liver - 1]:,.0f} ml; name the ids with --labels FILE, one `1 aorta` a line")


def siblings(ids: Iterable[str]) -> dict[str, list[str]]:
    """{patient: ids} where ids that differ in a suffix only, such as _venous, seem to be scans of one patient."""
    groups: dict[str, list[str]] = {}
    for name in ids:
        groups.setdefault(SUFFIXES.sub("", name), []).append(name)
    return {patient: group for patient, group in groups.items() if len(group) > 1}


def _remarks(ids: list[str], train: set[str], held_out: set[str]) -> list[str]:
    remarks = []
    groups = {tuple(sorted(g)) for g in (*siblings(ids).values(), *copies(ids).items())}
    if torn := [g for g in sorted(groups) if train.intersection(g) and held_out.intersection(g)]:
        remarks.append(f"the split seems to have volumes of {counted(len(torn), 'patient')} on both of its sides "
                       f"({', '.join(torn[0])}{' ...' * (len(torn) > 1)}); --patient-regex keeps a patient's volumes "
                       "together")
    if new := set(ids) - train - held_out:
        remarks.append(f"in no split: {counted(len(new), 'volume')} ({min(new)}{' ...' * (len(new) > 1)})")
    return remarks


def _of_the_list(task: Task, ids: set[str], held_out: set[str]) -> list[str]:
    """Whether the volumes to validate on are those that the data's own list has for it, where it has any."""
    if not task.listed:
        return []
    if held_out == ids.intersection(task.listed.cases):
        return [f"validation set: {counted(len(held_out), 'volume')}, {task.listed.source}"]
    return [f"{task.file('val')}: made earlier, or edited, and not the data's own validation set "
            f"({task.listed.source}); delete all files of the split to use that one"]


def _held_out(task: Task, ids: list[str], val: float | None, val_cases: Path | None,
              groups: dict[str, list[str]]) -> list[str]:
    """The ids to validate on. Raises BadInput."""
    if task.listed and val is None and val_cases is None:
        listed = set(task.listed.cases).intersection(ids)
        if not listed:
            raise BadInput(f"{task.name}: no volume of its own validation set, {task.listed.source}, can be used; "
                           "give --val or --val-cases")
        _refuse_torn(task.listed.source, listed, groups)
        return list(listed)
    if val_cases is None:
        count = round((VAL_SHARE if val is None else val) * len(groups))
        if len(groups) < 2:
            raise BadInput(f"{task.name}: {counted(len(groups), 'patient')}; a split needs two, one to validate on")
        drawn = np.random.default_rng([SEED, 0]).choice(len(groups), min(max(count, 1), len(groups) - 1), False)
        return [name for i in drawn for name in list(groups.values())[i]]
    if val is not None:
        raise BadInput("--val and --val-cases: give one of the two")
    named = set(_listed(val_cases))
    if absent := named.difference(ids):
        raise BadInput(f"{val_cases}: {min(absent)} is not among the volumes of {task.name}, {ids[0]} ... {ids[-1]}")
    _refuse_torn(val_cases, named, groups)
    return list(named)


def _refuse_torn(source: Path | str, held_out: set[str], groups: dict[str, list[str]]) -> None:
    if torn := [group for group in groups.values() if 0 < len(held_out.intersection(group)) < len(group)]:
        raise BadInput(f"{source}: names only some of {', '.join(torn[0])}, which --patient-regex takes for one "
                       "patient; name all of them or none")


def _of_patients(ids: list[str], pattern: str | None) -> dict[str, list[str]]:
    """{patient: ids}, each volume a patient of its own without a pattern. Raises BadInput."""
    groups: dict[str, list[str]] = {}
    try:
        known = re.compile(pattern or r"(?s:.*)")
    except re.error as e:
        raise BadInput(f"--patient-regex {pattern}: not a regular expression ({e})") from None
    for name in ids:
        match = known.search(name)
        if not (patient := match and match[min(known.groups, 1)]):
            raise BadInput(f"--patient-regex {pattern}: matches nothing in {name}")
        groups.setdefault(patient, []).append(name)
    return groups


def _listed(path: Path) -> list[str]:
    """The ids in a text file, one a line; the file may have been edited anywhere. Raises BadInput."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror})") from None
    if not (found := [composed(line.strip()) for line in text.split("\n") if line.strip()]):
        raise BadInput(f"{path}: no volume in it; list their ids, one a line")
    return found


def _write(path: Path, ids: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text("".join(f"{name}\n" for name in ids), encoding="utf-8", errors="surrogateescape")
