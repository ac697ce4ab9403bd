"""Where the labels of a volume lie: each organ's HU, place and size, beside those of the other patients.

A header can agree with another header and its label still lie in the air, be mirrored, or be another patient's. The
other patients tell: nobody else's liver has -870 HU, or lies on the left. What is said of an organ goes by medians over
the patients, so that it holds while most labels are right, and of few patients nothing is said.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ct.command import counted
from ct.judgement import bulk
from ct.volumes import Volume

PATIENTS, FEW = 8, 4  # with an organ: of fewer its place and size are not compared; nor whether it lies in air
BODY, GAS, FAT = -300, -500, -30  # HU: over the first is body, under the second gas, under the third no organ but fat
SPREADS = 6  # from the others: so many of their spreads, robustly; and at least, each in the unit of ROW:
SIDE, HEIGHT, DARKER, BRIGHTER, MIXED, LARGER, SMALLER = 0.3, 0.6, 100, 400, 60, math.log(6), math.log(20)
OUTLIERS = 0.2  # of an organ's patients at most; more are no outliers: so the data is
HOLLOW = 0.15  # of the other patients have gas in a tenth of an organ that may be full of it: bowel, stomach
ROW = ("class", "hu10", "hu50", "hu90", "z", "y", "x", "cut")  # of `measure`; cut: in the scan's first or last slice
TOWARDS = {"x": ("left", "right"), "y": ("back", "front"), "z": ("top", "bottom")}  # along an axis, against it
IN_AIR = "its labels lie in air: {}; are they another image's? Correct them, or leave the volume out"


class Found(NamedTuple):
    """What is said of labels: {id of the volume: words}, of those that lie in air for certain and of all others."""

    in_air: dict[str, str]
    elsewhere: dict[str, str]


def measure(read: Volume, labels: np.ndarray, classes: int) -> tuple[list[int], list[list[float]]]:
    """(the voxels of each class, a row ROW of each organ there) of a volume's labels, (Z, Y, X) uint8.

    hu10 to hu90: percentiles of its HU. z, y, x: its centre against the body's, in half widths of the body (twice the
    standard deviation of its voxels): 1 is about the left, posterior or upper end. HU and centres are those of up to
    64 x 256 x 256 voxels, one in so many along each axis.
    """
    steps = [1 + n // most for n, most in zip(labels.shape, (32, 128, 128), strict=True)]
    grid = tuple(slice(None, None, step) for step in steps)
    some = np.ascontiguousarray(labels[grid])
    flat = np.flatnonzero(some != 0)
    at, of = np.unravel_index(flat, some.shape), some.ravel()[flat].astype(np.int32)
    hu = np.clip(np.rint(read.in_hu(read.stored[grid][at])), -32768, 32767).astype(np.int32)
    key = np.sort((of << 16) + hu + 32768)  # by class, and by HU within each
    first = np.searchsorted(key, np.arange(classes + 1) << 16)
    number = np.maximum(1, np.diff(first))
    place = [(np.bincount(of, p, classes) / number * step + (step - 1) / 2 - middle) / half
             for p, step, (middle, half) in zip(at, steps, _body(read), strict=True)]
    rows, cut = [], set(np.flatnonzero(np.bincount(labels[[0, -1]].ravel())).tolist())
    for c in np.flatnonzero(np.diff(first)).tolist():
        quantiles = [(int(key[first[c] + int(q * (number[c] - 1))]) & 65535) - 32768 for q in (0.1, 0.5, 0.9)]
        rows.append([c, *quantiles, *(round(float(p[c]), 2) for p in place), int(c in cut)])
    return np.bincount(labels.ravel(), minlength=classes).tolist(), rows


def _body(read: Volume) -> list[tuple[float, float]]:
    """(middle, half width) of the body in voxels along each axis."""
    steps = [1 + n // most for n, most in zip(read.stored.shape, (16, 64, 64), strict=True)]
    some = read.in_hu(read.stored[:: steps[0], :: steps[1], :: steps[2]])
    body = some > max(BODY, bulk(read.sample)[0])  # where air was clipped, it is what is denser
    ends = []
    for axis, step in enumerate(steps):
        there = body.sum(tuple({0, 1, 2} - {axis}))
        places = np.arange(len(there)) * step + (step - 1) / 2  # each stands for the voxels up to the next
        middle = np.average(places, weights=there)
        ends.append((middle, max(1.0, 2 * np.sqrt(np.average((places - middle) ** 2, weights=there)))))
    return ends


def compare(records: list[dict], organs: tuple[str, ...]) -> Found:
    """Which of the volumes' labels lie elsewhere than those of the other patients, and where; records of a store.

    In air for certain: an organ of gas that no other patient's is, not even in part, if nine tenths of it are or half
    of the volume's organs are like it. Elsewhere: in air less surely; over nothing but fat; to a side of the others';
    or several of the volume's organs over some fat, brighter, higher or lower, larger or smaller: half of them, or
    three if that is a quarter.
    """

    def enough(found: dict[str, str], judged: int) -> dict[str, str]:
        return found if found and len(found) >= min(judged / 2, max(3, judged / 4)) else {}

    known = [r for r in records if r.get("organs")]
    judged, in_air, elsewhere = [0] * len(known), {}, {}
    gas, whole, sure, doubtful = ([{} for _ in known] for _ in range(4))
    rows_of = [{row[0]: row for row in r["organs"]} for r in known]
    for c in sorted(set().union(*rows_of)):
        rows, table = _table(known, rows_of, c)
        if len(rows) < FEW:
            continue
        for i in rows:
            judged[i] += 1
        for told, words in zip((gas, whole, sure, doubtful), (*_in_air(table), *_outliers(table)), strict=True):
            for place, what in words.items():
                told[rows[place]][organs[c]] = what
    for i, r in enumerate(known):
        if whole[i] or gas[i] and 2 * len(gas[i]) >= judged[i]:
            in_air[r["id"]] = _words(gas[i])
        elif found := gas[i] | sure[i] or enough(doubtful[i], judged[i]):
            elsewhere[r["id"]] = _words(found)
    return Found(in_air, elsewhere)


def _words(found: dict[str, str]) -> str:
    """What was found of a volume's organs, at most three of them."""
    more = f" and {counted(len(found) - 3, 'organ')} more" * (len(found) > 3)
    return ", ".join(f"{organ} ({what})" for organ, what in list(found.items())[:3]) + more


def _table(known: list[dict], rows_of: list[dict[int, list]], c: int) -> tuple[list[int], dict[str, np.ndarray]]:
    """(the numbers of the volumes that have a class, a column of each part of ROW, of `gas`: HU up to which there is
    none of the body; of `tail`: how far its lowest tenth lies under its median; of `size`: ln of its volume in mm3).
    """
    rows = [i for i, of in enumerate(rows_of) if c in of]
    columns = np.array([rows_of[i][c] for i in rows], float).T
    table = dict(zip(ROW, columns, strict=True))
    table["gas"] = np.array([max(GAS, known[i]["bulk"][0]) for i in rows])  # clipped, air and fat are the lowest
    table["tail"] = table["hu10"] - table["hu50"]  # whatever its contrast
    table["size"] = np.log([known[i]["voxels"][c] * math.prod(known[i]["spacing"]) for i in rows])
    return rows, table


def _in_air(table: dict[str, np.ndarray]) -> tuple[dict[int, str], dict[int, str]]:
    """({row: words} of an organ that lies in air by its median, those of it of which nine tenths do)."""
    median, air = table["hu50"], table["hu50"] <= table["gas"]
    others = ~air
    hollow = (table["hu10"] <= table["gas"])[others].mean() > HOLLOW if others.any() else True
    if hollow or not 0 < air.sum() <= max(1, OUTLIERS * len(air)):
        return {}, {}
    usual = f"{median[others].min():.0f} to {median[others].max():.0f} in the others"
    told = {int(i): f"median {median[i]:.0f} HU, {usual}" for i in np.flatnonzero(air)}
    return told, {i: words for i, words in told.items() if table["hu90"][i] <= table["gas"][i]}


def _outliers(table: dict[str, np.ndarray]) -> tuple[dict[int, str], dict[int, str]]:
    """({row: words} of what is far from the other patients' organ for sure, of what may be so by nature)."""
    sure: dict[int, str] = {}
    doubtful: dict[int, str] = {}
    if len(table["hu50"]) < PATIENTS:
        return sure, doubtful

    def far(name: str, least: float, also: np.ndarray | bool = True, sign: int = 0) -> Iterator[tuple[int, float]]:
        """(row, by how much) of what is more than `least` and SPREADS away (sign: to one side), if few are."""
        away = table[name] - np.median(table[name])
        limit = max(least, SPREADS * 1.4826 * np.median(np.abs(away)))
        found = ((sign * away if sign else np.abs(away)) > limit) & also
        if found.sum() <= max(1, OUTLIERS * len(found)):
            yield from ((int(i), float(away[i])) for i in np.flatnonzero(found))

    def median_of(i: int) -> str:
        return f"median {table['hu50'][i]:.0f} HU, {np.median(table['hu50']):.0f} in the others"

    for name, told, least in (("x", sure, SIDE), ("y", sure, SIDE), ("z", doubtful, HEIGHT)):
        for i, away in far(name, least):
            told.setdefault(i, f"{abs(away):.1f} half widths of the body nearer the {TOWARDS[name][away < 0]}")
    for i, _ in far("hu50", DARKER, table["hu90"] < FAT, -1):
        sure.setdefault(i, median_of(i))
    for name, least, also, sign in (("hu50", DARKER, table["hu50"] < FAT, -1), ("hu50", BRIGHTER, True, 1),
                                    ("tail", MIXED, table["hu10"] < 2 * FAT, -1)):
        for i, _ in far(name, least, also, sign):
            doubtful.setdefault(i, median_of(i) + f", a tenth under {table['hu10'][i]:.0f}" * (name == "tail"))
    for sign, least, also in ((1, LARGER, True), (-1, SMALLER, table["cut"] == 0)):
        for i, away in far("size", least, also, sign):
            doubtful.setdefault(i, f"{math.exp(abs(away)):.0f} times {'larger' if sign > 0 else 'smaller'}")
    return sure, doubtful
