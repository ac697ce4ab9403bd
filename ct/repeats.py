"""What is there twice: slices within a volume or in two, copies of a volume, and volumes of another data set.

A slice's checksum is that of its levels over SOFT, fat to bone, without the rows and columns at its border that are
air. So it is the same in a store of another window, size or kind, in a file of another type, scaling, orientation or
padding value, in a volume that has lost or got slices, and where air was cut off or added around. A slice that was
resampled, or cut through the body, is another one. A slice of few levels, such as air, padding or a mask, has no
checksum: it would be equal to every other.
"""

import contextlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np

from ct.command import counted
from ct.volumes import BadInput

DIGITS = 12  # hexadecimal ones of a checksum: in 215,325 slices two are equal by chance once in 12,000 such sets
NONE = "-" * DIGITS
LEVELS = 16  # that a slice must have at least
SHOWN = 3  # places that a line names
# Of `second_scan`: slices that a volume must have, and how unlike a second scan may be, to be named and to be sure.
LEAST_SCAN, ALIKE, SURE = 24, 0.6, 0.5
# What converters and scripts call a copy of a series. dcm2niix: _Tilt (the gantry's tilt undone), _Eq (slices at equal
# distances), _ROI1, _Crop, each with a number behind it; file managers: " - Copy" and " (1)".
WORDS = r"(?:tilt(?:ed)?|eq|roi|crop(?:ped)?|resampled?|resliced?|copy)"
WORD = re.compile(rf"[ _-]+{WORDS}(?![a-z0-9])", re.IGNORECASE)
NUMBERED = re.compile(rf"[ _-]+{WORDS}(?:[ _-]*\d+)*(?![a-z0-9])|[ _-]*\(\d+\)", re.IGNORECASE)
BEFORE = re.compile(rf"^{WORDS}[ _-]+", re.IGNORECASE)
# Data sets whose CTs AbdomenCT-1K holds: how their folders, or the name in dataset.json, and their volumes are called.
SOURCES = {"MSD Spleen": (r"((task|dataset)\d+_)?spleen", r"spleen_\d+"),
           "MSD Liver, which is LiTS": (r"((task|dataset)\d+_)?liver", r"liver_\d+"),
           "LiTS": (r"lits(17)?", r"volume-\d+"), "KiTS": (r"kits\d*", r"case_\d{5}(__imaging)?"),
           "MSD Pancreas": (r"((task|dataset)\d+_)?pancreas", r"pancreas_\d{3}"),
           "NIH Pancreas-CT": (r"(nih-?)?pancreas-ct", r"PANCREAS_\d{4}")}


def slice_sums(slices: Iterable[np.ndarray]) -> str:
    """The checksums of 8-bit slices (H, W) over SOFT, DIGITS each, one behind the other: what a record holds of them.

    NONE for a slice of fewer than LEVELS levels.
    """
    return "".join(map(_slice_sum, slices))


def _slice_sum(levels: np.ndarray) -> str:
    rows, columns = (np.flatnonzero(levels.max(axis)) for axis in (1, 0))
    if not len(rows):
        return NONE
    body = levels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    some = body[:: 1 + len(body) // 64, :: 1 + body.shape[1] // 64]
    if np.count_nonzero(np.bincount(some.ravel(), minlength=256)) < LEVELS:
        return NONE
    # CRC-32 of all, and 16 bits of that of a quarter: for slices that have nothing in common 48 bits
    return f"{zlib.crc32(body.tobytes()):08x}{zlib.crc32(body[::4].tobytes()) & 0xffff:04x}"


def each(sums: str) -> list[str]:
    """The checksum of each slice, of `slice_sums`."""
    return [sums[i : i + DIGITS] for i in range(0, len(sums), DIGITS)]


def judged(sums: str) -> set[str]:
    """The checksums of the slices that have one."""
    return set(each(sums)) - {NONE}


# ---------------------------------------------------------------------------------------------------- in one volume


def within(sums: str, slices: np.ndarray, labels: np.ndarray | None, path: Path) -> list[str]:
    """The warnings about a volume that shows something twice: a second scan behind the first, slices doubled or stuck.

    slices, labels: (Z, Y, X) uint8, labels where it has some. Slices are the same by their checksums; a second scan of
    another phase is known by `second_scan`. Raises BadInput, which names `path`, where half of the slices with labels
    are there once more without: a head would learn both.
    """
    first: dict[str, int] = {}
    same: dict[int, int] = {}  # {slice: the one before it that it repeats}
    for z, one in enumerate(each(sums)):
        if one != NONE and first.setdefault(one, z) != z:
            same[z] = first[one]
    found = [(f"{len(same)} of {len(slices)} slices repeat earlier ones ({_places(same)})", same, True)] if same else []
    kept = [z for z, one in enumerate(each(sums)) if one != NONE]
    if 2 * len(same) < len(kept) and (begin := second_scan(_small(slices)[kept])):
        alike = dict(zip(kept[begin[0] :], kept, strict=False))
        line = (f"the slices from {kept[begin[0]]} on look like those from {kept[0]} on (a second scan behind the "
                "first?)")
        found.append((line, alike, begin[1] < SURE))
    if labels is None:
        return [line for line, *_ in found]
    full, odd = labels.any((1, 2)), []  # (Z,)
    for line, again, sure in found:
        labelled = {again.get(z, z) for z in np.flatnonzero(full).tolist()}
        torn = {other for z, other in again.items() if full[z] != full[other]}
        if torn:
            line += f"; {len(torn)} of them have labels in one place only"
        if sure and 2 * len(torn) >= len(labelled) > 0:
            raise BadInput(f"{path}: {line}; remove the repeated slices from image and label, or leave the volume out")
        odd.append(line)
    return odd


def _small(slices: np.ndarray) -> np.ndarray:
    """Slices (Z, Y, X) as vectors (Z, n) float32 of some 32 x 32 means of four of their pixels."""
    step = max(1, min(slices.shape[1:]) // 64)
    some = slices[:, ::step, ::step].astype(np.float32)
    rows, columns = (side // 2 * 2 for side in some.shape[1:])
    corners = (some[:, top:rows:2, left:columns:2] for top in (0, 1) for left in (0, 1))
    return sum(corners).reshape(len(slices), -1) / 4


def second_scan(small: np.ndarray) -> tuple[int, float] | None:
    """Of slices (Z, n), small ones: (where a second scan of the same body begins, how unlike the first it is), or None.

    The farther apart two slices lie, the less alike they are; those of a second scan are like those of the first again.
    How unlike: the median squared difference of slices so far apart, over the largest of slices less far apart, both
    less that of neighbours, which is noise. Of one scan it is 0.8 or more, of most second ones with other contrast,
    noise and place below 0.5 (records/second-scans.md).
    """
    count = len(small)
    if count < LEAST_SCAN:
        return None
    power = (small**2).sum(1)
    # (Z, Z): squared differences; einsum, since a product by BLAS leaves a thread a core spinning in every process
    apart = power[:, None] + power - 2 * np.einsum("id,jd->ij", small, small)
    unlike = np.array([np.median(np.diagonal(apart, lag)) for lag in range(2 * count // 3 + 1)])
    unlike -= unlike[1]
    ratios = unlike / np.maximum(np.maximum.accumulate(unlike), 1)
    lag = count // 4 + int(np.argmin(ratios[count // 4 :]))
    return (lag, float(ratios[lag])) if ratios[lag] < ALIKE and unlike[: lag].max() > 1 else None


def _places(again: dict[int, int]) -> str:
    """Slices and those that they repeat, in words: a run of them at once, the longest first."""
    runs: list[list[tuple[int, int]]] = []
    for z, other in again.items():
        run = runs[-1] if runs else [(-2, -2)]
        step = other - run[-1][1]  # 1 along a second scan, 0 along one slice that is stuck
        if z == run[-1][0] + 1 and step in (0, 1) and (len(run) == 1 or step == run[-1][1] - run[-2][1]):
            run.append((z, other))
        else:
            runs.append([(z, other)])
    runs.sort(key=len, reverse=True)
    words = [" as ".join(_span(*ends) for ends in zip(run[0], run[-1], strict=True)) for run in runs[:SHOWN]]
    return ", ".join(words) + f" ... {len(runs)} such" * (len(runs) > SHOWN)


def _span(start: int, stop: int) -> str:
    return f"slice {start}" if start == stop else f"slices {start} to {stop}"


# -------------------------------------------------------------------------------------------------- in two volumes


def shared(known: dict[str, str], asked: dict[str, str]) -> dict[str, tuple[str, int, int]]:
    """Volumes of `asked` with slices that one of `known` has, too: {id: (that one, how many slices, of how many)}.

    Both are {id: `slice_sums`}; of several in `known`, the one with most of them is named.
    """
    owners: dict[str, list[str]] = {}
    for name, sums in known.items():
        for one in judged(sums):
            owners.setdefault(one, []).append(name)
    found = {}
    for name, sums in asked.items():
        if counts := Counter(other for one in judged(sums) for other in owners.get(one, ())):
            found[name] = (_most(counts), max(counts.values()), len(judged(sums)))
    return found


def _most(counts: dict[str, int]) -> str:
    return min(counts, key=lambda name: (-counts[name], name))


def between(records: Collection[dict]) -> dict[str, str]:
    """What volumes have in common with others before them: {id: a line}. By content, else by names (`copies`).

    Of records that an older commit wrote, without checksums of slices, whole images are compared.
    """
    found: dict[str, str] = {}
    images: dict[str, str] = {}
    owner: dict[str, str] = {}
    for r in records:
        name, sums = r["id"], r.get("slice_sums", "")
        image = (sums if judged(sums) else "") or r.get("content")
        counts = Counter(owner[one] for one in judged(sums) if one in owner)
        if image and (other := images.setdefault(image, name)) != name:
            known = " (a known one)" if {name, other} == {"Case_00297", "Case_00928"} else ""
            found[name] = f"the same image as {other}{known}"
        elif counts:
            more = f", others in {counted(len(counts) - 1, 'more volume')}" * (len(counts) > 1)
            found[name] = (f"{max(counts.values())} of its {counted(len(judged(sums)), 'slice')} are also in "
                           f"{_most(counts)}{more}")
        for one in judged(sums):
            owner.setdefault(one, name)
    for name, other in copies(r["id"] for r in records).items():
        if name not in found and other not in found:
            found[name] = f"by its name a copy of {other} (resampled, cropped?)"
    return found


def copies(ids: Iterable[str]) -> dict[str, str]:
    """Volumes that by their names are copies of others: {copy: original, or another copy where that is not there}.

    p1_Eq_1, p1_Tilt_1, p1_ROI1, cropped_p1 and "p1 (1)" beside p1; p1_Eq_1 beside p1_Tilt_1. Such a name alone says
    nothing: a whole data set may be called so.
    """
    there = {name.removesuffix("_0000"): name for name in sorted(ids)}  # nnU-Net's number of a channel
    found, first = {}, {}
    for bare, name in there.items():
        same = WORD.sub("", bare)  # with its numbers: p1_1 of p1_Eq_1
        originals = [there[rest] for rest in (same, NUMBERED.sub("", bare), BEFORE.sub("", bare))
                     if rest in there and rest != bare]
        if originals:
            found[name] = originals[0]
        elif same != bare and first.setdefault(same, name) != name:
            found[name] = first[same]
    return found


def in_abdomenct(data: Path, ids: Collection[str]) -> str:
    """Which of the data sets that AbdomenCT-1K was made of a folder is, by its name, its dataset.json's or most of its
    volumes' ids; nothing where none of them says so.
    """
    names = {data.resolve().name}
    with contextlib.suppress(OSError, ValueError, AttributeError):
        names.add(str(json.loads((data / "dataset.json").read_bytes()).get("name")))
    for source, (folder, volume) in SOURCES.items():
        if any(re.fullmatch(folder, name, re.IGNORECASE) for name in names) or (
                2 * sum(bool(re.fullmatch(volume, name)) for name in ids) > len(ids)):
            return source
    return ""
