"""What the voxels of a CT say, whatever its header says: by their bulk, so that a few of them change no verdict.

HU have fixed places: air at -1000, fat near -100, soft tissue from -20 to 150, and only bone above. Where a volume has
its modes elsewhere, its numbers are no HU: stored without their intercept, with another slope, from a cone-beam
scanner. `refuse` raises for what is certain, `odd` lists what is not.
"""

from pathlib import Path

import numpy as np

from ct.volumes import BadInput

SOFT = (-175.0, 250.0)  # HU from fat to bone: MONAI's window for BTCV
PADDING = -8192  # HU; scanners write -1024 to -8192 where they measured nothing
HIGHEST = 32767  # HU that 16 bits can hold
GREYS = 32  # a CT has more numbers than that even in a few slices; a mask of 0 and 255 has not
AIR = -200  # HU that every CT of a body goes under: it has fat or air beside it
FAT = -25  # HU that every CT with skin goes under, beside its padding
TRIM = 1000  # of so many voxels one, at either end, says nothing about the bulk
OFFSET = 1024  # HU of most intercepts
PEAK = 3  # times as many voxels as in the 400 HU below it make 400 HU a peak: of bone, real or not, there are fewer
BODY = -500  # HU; what is denser is body and table
LOOK = "another slope or intercept, or cone-beam CT? Used as it is"


def refuse(path: Path, voxels: np.ndarray) -> None:
    """Raise BadInput for what is no CT by its values: (n,) HU, ascending, of all of a volume or of a part of it.

    That is: a padding under PADDING, or another's two's complement over HIGHEST; modes that lie about OFFSET too high
    or too low; values that cover less than a third of SOFT, where soft tissue together with air, fat or bone does
    (constants, label maps, what is normalised to 0..1 or to unit deviation), a tenth beside a padding; fewer than GREYS
    different ones.
    """
    _refuse_outside(path, voxels)
    _refuse_shifted(path, voxels)
    low, high = _ends(voxels)
    beside, covered = _beside_lowest(voxels), min(high, SOFT[1]) - max(low, SOFT[0])
    inner = _ends(beside) if len(beside) else (low, low)
    if covered < (SOFT[1] - SOFT[0]) / 3 or min(inner[1], SOFT[1]) - max(inner[0], SOFT[0]) < (SOFT[1] - SOFT[0]) / 10:
        beyond = f" beside a padding of {low:g}, {inner[0]:g} to {inner[1]:g}" * (low < SOFT[0] and inner[0] > SOFT[0])
        raise BadInput(f"{path}: no CT by its values,{beyond or f' {low:g} to {high:g}'}; expected HU that cover at "
                       f"least a third of {SOFT[0]:g} to {SOFT[1]:g} (a label map, normalised, another slope?)")
    if (greys := 1 + np.count_nonzero(np.diff(voxels))) < GREYS:
        raise BadInput(f"{path}: no CT by its values, only {greys} different ones (a mask?)")


def odd(voxels: np.ndarray) -> list[str]:
    """Where the bulk of (n,) HU, ascending, lies otherwise than a CT's, in ways that leave a doubt; a line each."""
    (low, high), beside = bulk(voxels), _beside_lowest(voxels)
    body = beside[np.searchsorted(beside, BODY) :]
    if low > AIR:
        padding = _ends(voxels)[0]
        return [f"HU from {low:.0f} to {high:.0f} only, never under {AIR}" + f" but for a padding of {padding:.0f}"
                * (padding <= AIR) + " (exported to 0..255, or stored without its intercept?)"]
    lines = [f"HU from {low:.0f} to {high:.0f} only"] if high < 200 else []
    if (under := _share(beside, -np.inf, -1150)) > 0.1:
        lines.append(f"{under:.0%} of its voxels lie under -1150 HU, less than air; {LOOK}")
    elif _share(voxels, -np.inf, -850) < 0.005 and _share(beside, -700, -350) > 0.15:
        lines.append(f"no air at -1000 HU, but much at -700 to -350; {LOOK}")
    (mode, share), dense = _mode(body), _share(body, 650, np.inf)
    if len(body) < 0.02 * len(voxels):
        lines.append(f"no body: {len(body) / len(voxels):.1%} of its voxels over {BODY} HU; {LOOK}")
    elif abs(mode) > 200 and share > 0.3:
        lines.append(f"most of the body at about {mode:.0f} HU, and soft tissue lies at -100 to 150; {LOOK}")
    elif dense > 0.3:
        lines.append(f"{dense:.0%} of the body over 650 HU, more than bone is; {LOOK}")
    return lines


def bulk(voxels: np.ndarray) -> tuple[float, float]:
    """Lowest and highest HU of the bulk of (n,) HU, ascending: without one voxel of TRIM at either end, nor a padding.

    The lowest value is a padding where it lies under AIR and all others over FAT: no scanner measures that.
    """
    (low, high), beside = _ends(voxels), _beside_lowest(voxels)
    if low < AIR and len(beside) and (inner := _ends(beside)[0]) > FAT:
        low = inner
    return low, high


def _refuse_outside(path: Path, voxels: np.ndarray) -> None:
    """Raise BadInput where more than a few voxels lie under PADDING or over HIGHEST."""
    under, over = voxels[: np.searchsorted(voxels, PADDING)], voxels[np.searchsorted(voxels, HIGHEST, "right") :]
    for beyond, limit in ((under, f"under {PADDING}"), (over, f"over {HIGHEST}")):
        if len(beyond) <= _few(voxels):
            continue
        value = int(beyond[len(beyond) // 2])
        if (beyond == value).mean() > 0.5:
            signed = f", {value - 65536} read as unsigned" * (HIGHEST < value < 65536)
            raise BadInput(f"{path}: a padding {limit} HU, {value}{signed}, in {len(beyond) / len(voxels):.1%} of its "
                           "voxels; set them to -1024")
        raise BadInput(f"{path}: no CT by its values, {len(beyond) / len(voxels):.1%} of them {limit} "
                       f"({'no padding, which is one value' if limit.startswith('under') else 'read as unsigned?'}); "
                       "export it again, in HU")


def _refuse_shifted(path: Path, voxels: np.ndarray) -> None:
    """Raise BadInput where soft tissue lies about OFFSET over or under where it must be."""
    beside = _beside_lowest(voxels)
    if _peak(beside, OFFSET):
        share, raw = _share(beside, 850, 1250), _ends(beside)[0] > AIR
        raise BadInput(f"{path}: no CT by its values, {share:.0%} of them at 850 to 1250 HU, where only bone is; "
                       + (f"stored without its intercept: subtract {OFFSET}" if raw else
                          "another slope, or inverted? Export it again, in HU"))
    under, body = _share(beside, -np.inf, -1100), _share(beside, -574, 226)
    if _peak(beside, -OFFSET) and under > 0.1 and body * PEAK < _share(beside, -1198, -798):
        raise BadInput(f"{path}: no CT by its values, {under:.0%} of them under -1100 HU, less than air, and "
                       f"{body:.0%} at -574 to 226, where a body is; the intercept applied twice: add {OFFSET}")


def _peak(voxels: np.ndarray, offset: float) -> bool:
    """Whether soft tissue, fat included, makes a peak at this offset: over the partial volumes and lung below it.

    It is at least a twentieth of the voxels. Bone makes none: there is less of it the denser it is.
    """
    tissue, below = _share(voxels, offset - 174, offset + 226), _share(voxels, offset - 574, offset - 174)
    return tissue > 0.05 and tissue > PEAK * below


def _mode(voxels: np.ndarray) -> tuple[float, float]:
    """(the middle of the 200 HU that hold most voxels, their share), of ascending HU over BODY; maybe none."""
    edges = np.arange(BODY, 4096, 25)
    within = np.searchsorted(voxels, edges[8:]) - np.searchsorted(voxels, edges[:-8])
    best = int(within.argmax())
    return float(edges[best] + 100), within[best] / max(1, len(voxels))


def _share(voxels: np.ndarray, low: float, high: float) -> float:
    """The share of ascending values from `low` to under `high`; 0 of none."""
    return float(np.searchsorted(voxels, high) - np.searchsorted(voxels, low)) / max(1, len(voxels))


def _few(voxels: np.ndarray) -> int:
    return 1 + len(voxels) // TRIM


def _ends(voxels: np.ndarray) -> tuple[float, float]:
    few = min(_few(voxels), (len(voxels) - 1) // 2)
    return float(voxels[few]), float(voxels[-1 - few])


def _beside_lowest(voxels: np.ndarray) -> np.ndarray:
    """The voxels over the bulk's lowest value, which may be a padding, or air that was clipped; maybe none."""
    return voxels[np.searchsorted(voxels, _ends(voxels)[0], "right") :]
