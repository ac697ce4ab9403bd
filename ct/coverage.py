"""Which organs the volumes of a task have, and on which side of its split: what a mean over organs is made of.

An organ of which training has nothing, or a few voxels by a slip or a wrong id, cannot be learned: its Dice is a sure
0. One of which validation has a few voxels is 0 or near it whatever was learned. Neither is counted in the mean; both
are named. An organ that only some of the volumes label is background in the others: that is named, and no more can be
done about it here.
"""

from collections.abc import Collection

from ct.command import counted
from ct.tasks import Task
from ct.volumes import BadInput

LEAST = 10  # voxels that an organ must have in the whole training set, and in the validation set
PART = 2 / 3  # of the volumes: an organ that fewer of them have is named, where there are LEAST_VOLUMES
LEAST_VOLUMES = 6
SHOWN = 4  # organs or volumes that a line names
Voxels = dict[int, dict[str, int]]  # of each class {volume: how many}, of the volumes that have some


def voxels(volumes: Collection[dict], task: Task, ids: Collection[str]) -> Voxels:
    """How much of each organ these of a store's volumes have."""
    counts = {v["id"]: v["voxels"] for v in volumes}
    present = [i for i in sorted(ids) if i in counts]
    return {c: {i: counts[i][c] for i in present if counts[i][c]} for c in range(1, len(task.organs))}


def uncounted(volumes: Collection[dict], task: Task) -> dict[int, str]:
    """{class: why} of the organs that validation has and whose Dice says nothing: LEAST voxels are not there to learn
    them, in the whole training set (of which a draw is a part), or to judge them. {} where no other would be left.
    """
    train, val = (voxels(volumes, task, task.cases(split)) for split in ("100", "val"))
    left = {c: f"{_amount(train[c])} to train on, {_amount(val[c])} to validate on" for c in val
            if val[c] and min(sum(train[c].values()), sum(val[c].values())) < LEAST}
    return left if len(left) < sum(map(bool, val.values())) else {}


def remarks(volumes: Collection[dict], task: Task, split: str | None = None, draws: Collection[int] = ()) -> list[str]:
    """What is to be said of the organs in prepared volumes, a line each; and what a split's random subsets lack.

    Raises BadInput for a split without an organ to measure.
    """
    ids = [v["id"] for v in volumes]
    own, lines, drawn = voxels(volumes, task, ids), [], task.file("val").exists() and task.file("100").exists()
    left = uncounted(volumes, task) if drawn else {}
    lines += [f"{task.organs[c]}: {why}; the mean Dice leaves it out" for c, why in left.items()]
    lines += [f"{task.organs[c]}: {_amount(own[c])} in all (a slip, a wrong id?)" for c in own
              if c not in left and 0 < sum(own[c].values()) < LEAST]
    if drawn:
        val = voxels(volumes, task, task.cases("val"))
        if split and not any(val.values()):
            raise BadInput(f"{task.file('val')}: no validation volume has an organ, so there would be no Dice; choose "
                           "others with --val-cases")
        if absent := [task.organs[c] for c in val if own[c] and not val[c]]:
            lines.append(f"no validation volume has: {_listed(absent)}; this is not measured")
        for draw in draws:
            train = voxels(volumes, task, task.cases(split, draw))
            if absent := [task.organs[c] for c in val if val[c] and not train[c] and c not in left]:
                lines.append(f"no training volume of {split} %, draw {draw}, has: {_listed(absent)}; this counts as 0 "
                             "in the mean Dice")
    return lines + _parts(own, ids, task)


def _parts(own: Voxels, ids: list[str], task: Task) -> list[str]:
    """Organs that only some of the volumes have, and sets of volumes that have no organ in common."""
    if len(ids) < LEAST_VOLUMES:
        return []
    lines, there = [], {c: set(found) for c, found in own.items() if sum(found.values()) >= LEAST}
    unlabelled = "; elsewhere they are background, in training and in the Dice"
    if some := {c: found for c, found in there.items() if len(found) < PART * len(ids)}:
        lines.append("labelled in some of the volumes only: " + _listed(
            [f"{task.organs[c]} in {len(found)} of {len(ids)}" for c, found in some.items()]) + unlabelled)
    sets: list[tuple[list[str], set[str]]] = []  # organs that stand together, and their volumes
    for c, found in there.items():
        joined = [s for s in sets if s[1] & found]
        sets = [s for s in sets if s not in joined]
        sets.append((sum((s[0] for s in joined), []) + [task.organs[c]], found.union(*(s[1] for s in joined))))
    if len(sets) > 1:
        lines.append(f"{len(sets)} sets of volumes have no organ in common; were they merged? " + "; ".join(
            f"{_listed(organs)} in {len(found)} ({_listed(sorted(found), 2)})" for organs, found in sets[:SHOWN])
            + " ..." * (len(sets) > SHOWN))
    return lines


def _amount(found: dict[str, int]) -> str:
    """`1 voxel in 1 volume (spleen_3)`."""
    number = sum(found.values())
    if not number:
        return "nothing"
    return f"{counted(number, 'voxel')} in {counted(len(found), 'volume')} ({_listed(list(found), 3)})"


def _listed(names: list[str], shown: int = SHOWN) -> str:
    return ", ".join(names[:shown]) + f" ... {len(names)} in all" * (len(names) > shown)
