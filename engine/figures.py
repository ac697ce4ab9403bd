"""Every picture. matplotlib is needed here and nowhere else; it draws without a display.

Colours are few and always doubled by a line style, a marker or a label, so that a grey print can be read too.
"""

import colorsys
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from ct.command import printable
from ct.volumes import BadInput
from engine import runs

INK, PALE = "#222222", "#b5b5b5"
# distinct in colour and, through the line styles or markers, in grey
STYLES = (("#222222", "-"), ("#c0392b", "--"), ("#1f618d", "-."), ("#1e8449", (0, (6, 1))), ("#b9770e", ":"),
          ("#6c3483", (0, (3, 1, 1, 1))), ("#7f8c8d", (0, (1, 2))), ("#17a2b8", (0, (8, 2, 2, 2, 2, 2))))
MARKERS = "osD^vPX*"
# BTCV's organs 1 to 13, the same in every picture: warm left, cold right, vessels red and blue
ORGAN_COLOURS = ("#8e44ad", "#f1c40f", "#e67e22", "#27ae60", "#f5b7b1", "#a0522d", "#76d7c4", "#e74c3c", "#3498db",
                 "#1a5fb4", "#d4e157", "#ff5fb0", "#00e5ff")


@functools.cache
def organ_colours() -> np.ndarray:
    """(255, 3) in [0, 1], a colour a label: black, ORGAN_COLOURS, then always the one least like those before."""
    chosen = [[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in ("#000000", *ORGAN_COLOURS)]
    hues = np.arange(48) / 48  # no grey and nothing dark, which CT is
    candidates = np.array([colorsys.hsv_to_rgb(h, s, v) for h in hues for s in (0.45, 0.7, 1) for v in (0.55, 0.75, 1)])
    eye = np.sqrt([2, 4, 3])  # green differs most
    apart = np.min([np.linalg.norm((candidates - c) * eye, axis=1) for c in chosen], axis=0)
    while len(chosen) < 255:
        chosen.append(candidates[apart.argmax()])
        apart = np.minimum(apart, np.linalg.norm((candidates - chosen[-1]) * eye, axis=1))
    return np.array(chosen)


def pyplot():
    """matplotlib.pyplot that draws without a display. Raises BadInput when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput("pictures need matplotlib: pip install -r requirements-dev.txt (or pip install matplotlib)"
                       ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.edgecolor": INK, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.titlesize": 9, "axes.titlelocation": "left", "legend.frameon": False,
                         "legend.fontsize": 8, "lines.linewidth": 1.3, "figure.dpi": 150, "savefig.bbox": "tight"})
    return plt


def attempt(draw: Callable[..., None], *args) -> bool:
    """draw(path, ...), one of the pictures below, and whether it was drawn.

    One that cannot be drawn, whatever the reason, is told in one line and ends nothing.
    """
    try:
        draw(*args)
    except BadInput as e:  # no matplotlib
        _tell_once(str(e))
        return False
    except Exception as e:  # a broken matplotlib, its settings, a font, a disk, a bug: what was computed is worth more
        if plt := sys.modules.get("matplotlib.pyplot"):
            plt.close("all")
        _tell_once(printable(f"{args[0]}: not drawn ({type(e).__name__}: {e})"))
        return False
    return True


@functools.cache
def _tell_once(line: str) -> None:
    print(line, file=sys.stderr)


def _save(plt, figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with runs.whole(path) as f:
        try:
            figure.savefig(f, format="png")
        finally:
            plt.close(figure)


def _style(i: int) -> dict:
    colour, line = STYLES[i % len(STYLES)]
    return {"color": colour, "linestyle": line}


# ------------------------------------------------------------------------------------------------- pre-training


def spectrum(path: Path, runs: Sequence[tuple[str, np.ndarray, float]], title: str) -> None:
    """Fig. 1: sorted singular values of the features' covariance, log scale, and the effective ranks beside them.

    runs: (name, descending singular values, effective rank) of each. Values are divided by the largest: the scale of
    features is no sign of collapse, how fast the values fall is. Numerical zeros fall below the axis.
    """
    plt = pyplot()
    figure, (axes, bars) = plt.subplots(1, 2, figsize=(9.2, 3.8), width_ratios=[3, 2], layout="constrained")
    for i, (name, values, rank) in enumerate(runs):
        shown = values[values > values[0] * 1e-12] / values[0]
        apart = max(1, len(shown) // 8)  # markers, where many curves of one grey would be too much for line styles
        axes.plot(np.arange(1, len(shown) + 1), shown, **_style(i), marker=MARKERS[i % len(MARKERS)], markersize=4,
                  fillstyle="none" if i % 2 else "full", markevery=(apart * (2 * i + 1) // (2 * len(runs)), apart),
                  label=name)
        bars.barh(i, rank, color=_style(i)["color"], height=0.6)
        bars.annotate(f"{rank:.1f}", (rank, i), (3, 0), textcoords="offset points", va="center")
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set_xlabel("index of the singular value, largest first")
    axes.set_ylabel("singular value of the covariance / the largest")
    axes.set_title(title)
    axes.legend()
    bars.set_yticks(range(len(runs)), [name for name, _, _ in runs])
    bars.invert_yaxis()
    bars.set_xlim(0, 1.15 * max(rank for _, _, rank in runs))
    bars.set_xlabel(f"dimensions that are used, of {max(len(values) for _, values, _ in runs)}")
    bars.set_title("effective rank: the lower, the more collapsed")
    _save(plt, figure, path)


def overview(path: Path, views: Sequence[np.ndarray], spectra: Sequence[tuple[str, np.ndarray]],
             maps: Sequence[tuple[str, np.ndarray]], image: np.ndarray) -> None:
    """README's strip: a slice and two views of it, what pre-training sees; the spectra; the slice segmented.

    views: (S, S) in [0, 1]; spectra: (name, descending singular values); maps: (caption, labels (H, W)) of `image`
    (H, W) uint8.
    """
    plt = pyplot()
    figure, grid = plt.subplots(1, 4 + len(maps), figsize=(2.1 * (5 + len(maps)), 2.5), layout="constrained",
                                width_ratios=[1, 1, 1, 1.9, *[1] * len(maps)])
    box, curves = _body(image), grid[3]
    pictures = [("a CT slice", _coloured(image, None)[box]), ("a query view", views[0]), ("its key view", views[1]),
                *((caption, _coloured(image, labels)[box]) for caption, labels in maps)]
    for axes, (caption, picture) in zip([*grid[:3], *grid[4:]], pictures, strict=True):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axes.set_title(caption)
        axes.axis("off")
    for i, (name, values) in enumerate(spectra):
        shown = values[values > values[0] * 1e-6] / values[0]
        curves.plot(np.arange(1, len(shown) + 1), shown, **_style(i), label=name)
    curves.set_yscale("log")
    curves.set_title("singular values of the features (Fig. 1)")
    curves.set_xlabel("index, largest first")
    curves.legend(loc="lower left", fontsize=7)
    _save(plt, figure, path)


def curves(path: Path, log_records: Sequence[dict], chance: float) -> None:
    """A pre-training run from the records of its log.jsonl; `chance` is the level of Eq. 1 for random features.

    Panels for what the log holds: the losses, accuracy, similarities, probe, effective ranks, learning rate.
    """
    plt = pyplot()
    panels = [("loss", {"loss_global": "global (Eq. 1)", "loss_local": "local (Eq. 2)"}),
              ("the own key ranks first", {"instance_accuracy": "held out, among fresh keys",
                                           "instance_chance": "chance of that",
                                           "queue_accuracy": "against the queue's old keys"}),
              ("held-out gap: cosine of one slice less of two", {"held_out_gap": "gap"}),
              ("mean cosine similarity", {"similarity_positive": "positives", "similarity_negative": "negatives",
                                          "held_out_positive": "held out: of one slice",
                                          "held_out_negative": "held out: of two slices"}),
              ("probe: mean Dice, labelled slices", {"probe_dice": "now", "probe_dice_start": "before the first step"}),
              ("effective rank", {"effective_rank": "backbone's features", "effective_rank_embedding": "embeddings"}),
              ("learning rate", {"lr": "learning rate"})]
    series = {key: np.array([(r["step"], r[key]) for r in log_records if r.get(key) is not None], float).reshape(-1, 2)
              for _, keys in panels for key in keys}
    if not series["loss_local"][:, 1].any():
        series["loss_local"] = series["loss_local"][:0]
    panels = [(title, keys) for title, keys in panels if any(len(series[k]) for k in keys)]
    rows = -(-len(panels) // 3)
    figure, grid = plt.subplots(rows, 3, figsize=(9.6, 2.5 * rows), squeeze=False, sharex=True, layout="constrained")
    for axes, (title, keys) in zip(grid.flat, panels, strict=False):
        for i, (key, label) in enumerate(k for k in keys.items() if len(series[k[0]])):
            _curve(axes, *series[key].T, label, _style(i))
        if not title.startswith(("loss", "mean cosine", "probe")):  # what cannot be negative starts at zero
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        if title == "loss":
            axes.axhline(chance, color=PALE, linewidth=1, zorder=0)
            axes.annotate(f"chance {chance:.2f}", (1, chance), xycoords=("axes fraction", "data"), ha="right",
                          va="bottom", fontsize=7, color="#777777")
        axes.set_title(title)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend()
        axes.set_xlabel("step")
    for axes in list(grid.flat)[len(panels):]:
        axes.remove()
    for axes in figure.axes[-3:]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    _save(plt, figure, path)


def _curve(axes, steps: np.ndarray, values: np.ndarray, label: str, style: dict) -> None:
    """One curve; a dense and noisy one is pale, with its running mean over a fiftieth of the run on top."""
    half = len(steps) // 100
    if half and label != "learning rate":
        axes.plot(steps, values, color=style["color"], alpha=0.25, linewidth=0.6)
        total = np.cumsum(np.insert(values, 0, 0.0))
        first = np.maximum(np.arange(len(steps)) - half, 0)
        last = np.minimum(np.arange(len(steps)) + half + 1, len(steps))
        values = (total[last] - total[first]) / (last - first)
    axes.plot(steps, values, marker="o" if len(steps) < 40 else None, markersize=3, label=label, **style)


def over_steps(path: Path, panels: dict[str, tuple[dict[str, tuple], dict[str, Sequence[tuple]]]]) -> None:
    """What backbones are worth over the steps of their pre-training: a panel for each kind of slices, a curve a row.

    panels: {title: (levels, curves)}: {name: (mean Dice in %, standard deviation or None)} of what is not trained
    further, a line across the panel, and {row: [(step, mean, standard deviation or None), ...]}. Curves stand a little
    aside of each other, so that bars stay apart.
    """
    plt = pyplot()
    figure, grid = plt.subplots(1, len(panels), figsize=(1.2 + 4.2 * len(panels), 3.6), squeeze=False, sharey=True,
                                layout="constrained")
    names = list(dict.fromkeys(name for parts in panels.values() for part in parts for name in part))
    for axes, (title, (levels, curves)) in zip(grid[0], panels.items(), strict=True):
        for name, (mean, deviation) in levels.items():
            style = _style(names.index(name))
            axes.axhline(mean, label=name, **style)
            axes.axhspan(mean - (deviation or 0), mean + (deviation or 0), color=style["color"], alpha=0.1, linewidth=0)
        for name, points in curves.items():
            i = names.index(name)
            steps, means, bars = (np.array(x, float) for x in zip(*points, strict=True))
            axes.errorbar(steps * 1.015 ** (i - len(names) / 2), means, bars, capsize=2, elinewidth=0.8,
                          marker=MARKERS[i % len(MARKERS)], markersize=4, fillstyle="none" if i % 2 else "full",
                          label=name, **_style(i))
        axes.set_xscale("log")
        ticks = [step for step, *_ in next(iter(curves.values()), ())]  # rows of thinned slices have others, unnamed
        axes.set_xticks(ticks, [f"{step:,}" for step in ticks])
        axes.minorticks_off()
        axes.set_xlabel("steps of pre-training, from the start")
        axes.set_title(title)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center")
    grid[0][0].set_ylabel("Dice in %, frozen linear head")
    _save(plt, figure, path)


def contact_sheet(path: Path, slices: Sequence[np.ndarray], titles: Sequence[str],
                  labels: Sequence[np.ndarray] | None = None, names: Sequence[str] = ()) -> None:
    """Slices (H, W) uint8 of any sizes, each under its title, in the order given: what a store holds, at a glance.

    labels (H, W) uint8, where there are any: the organs in their colours, so that a mirrored label is seen; names: of
    the labels 0, 1, ...
    """
    plt = pyplot()
    columns = min(8, max(1, len(slices)))
    rows, width = -(-len(slices) // columns), 1.35 * columns
    legend, below = _legend(np.unique(np.concatenate([np.unique(x) for x in labels])) if labels else (), names, width)
    figure, grid = plt.subplots(rows, columns, figsize=(width, 1.52 * rows + below * bool(legend["handles"])),
                                squeeze=False, layout="constrained")
    for axes, image, title, organs in zip(grid.flat, slices, titles, labels or [None] * len(slices), strict=False):
        axes.imshow(_coloured(image, organs))
        axes.set_title(title, fontsize=6, loc="center", pad=2)
    for axes in grid.flat:
        axes.axis("off")
    if legend["handles"]:
        figure.legend(**legend)
    _save(plt, figure, path)


def _legend(seen: Iterable[int], names: Sequence[str], width: float) -> tuple[dict, float]:
    """What names the organs `seen` below a figure of `width` inches, and the inches that it takes.

    Of many organs in smaller print; as many columns, each as wide as its longest name, as there is room.
    """
    from matplotlib.patches import Patch

    seen = sorted({int(c) for c in seen if 0 < c < len(names)})
    print_size = 8 if len(seen) <= 28 else 6.5
    widths = {n: sum(max(map(len, c), default=0) + 6.5 for c in np.array_split([names[c] for c in seen], n))
              for n in range(1, 8)}
    columns = max((n for n, taken in widths.items() if taken * print_size < 112.3 * width), default=1)
    handles = [Patch(color=organ_colours()[c], label=names[c]) for c in seen]
    return ({"handles": handles, "fontsize": print_size, "loc": "outside lower center", "ncols": columns,
             "handlelength": 1, "handleheight": 1}, max(0.75, 0.42 + 0.0205 * print_size * -(-len(seen) // columns)))


# ------------------------------------------------------------------------------------------------- segmentation


def overlays(path: Path, rows: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]], title: str,
             names: Sequence[str]) -> None:
    """Validation slices, two a line: image, truth, prediction, the organs in their fixed colours.

    rows: (caption, image, truth, prediction), the latter three (H, W) uint8; names: of the labels 0, 1, ...
    """
    plt = pyplot()
    lines = -(-len(rows) // 2)
    legend, below = _legend((c for _, _, *maps in rows for c in np.union1d(*maps)), names, 10.6)
    figure, grid = plt.subplots(lines, 7, figsize=(10.6, 1.83 * lines + 0.15 + below), squeeze=False,
                                layout="constrained", width_ratios=[1, 1, 1, 0.06, 1, 1, 1])  # a gap between two slices
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.02, wspace=0, hspace=0.01)
    for axes in grid.flat:
        axes.axis("off")
    for i, (caption, image, truth, prediction) in enumerate(rows):
        three, box = grid[i // 2, 4 * (i % 2):][:3], _body(image)
        for axes, labels, name in zip(three, (None, truth, prediction), (caption, "truth", "prediction"), strict=True):
            axes.imshow(_coloured(image, labels)[box])
            axes.set_title(name, fontsize=7, pad=2)
    figure.legend(**legend)
    figure.suptitle(title + "\n", fontsize=9, x=0.01, ha="left")
    _save(plt, figure, path)


def _body(image: np.ndarray) -> tuple[slice, slice]:
    """The part of a slice to show: the square around what is no air, with a little of the air."""
    shown = image > int(image.min()) + 30
    if not shown.any():
        return slice(None), slice(None)
    (top, bottom), (left, right) = (np.flatnonzero(shown.any(axis))[[0, -1]] for axis in (1, 0))
    half = 0.52 * max(bottom - top, right - left) + 2
    return tuple(slice(max(0, int(middle - half)), int(middle + half) + 1)
                 for middle in ((top + bottom) / 2, (left + right) / 2))


def _coloured(image: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """(H, W) uint8 and its labels -> (H, W, 3) in [0, 1]: organs tinted, their borders in full colour."""
    grey = np.repeat(image[..., None] / 255, 3, 2)
    if labels is None:
        return grey
    organ = (labels > 0) & (labels < 255)
    tint = organ_colours()[np.where(organ, labels, 0)]
    edge = np.zeros_like(organ)
    for axis in (0, 1):
        for step in (-1, 1):
            edge |= np.roll(labels, step, axis) != labels
    share = np.where(organ, np.where(edge, 1.0, 0.45), 0.0)[..., None]
    return grey * (1 - share) + tint * share


def validation(path: Path, records: Sequence[dict], title: str) -> None:
    """mDS on the validation set over training, from the records of validation.jsonl; the last is what is reported."""
    plt = pyplot()
    steps = [r["step"] for r in records]
    figure, axes = plt.subplots(figsize=(4.8, 2.9))
    for i, (key, label) in enumerate((("mDS", "mDS: the organs"), ("mDice_with_background", "with background"))):
        values = [np.nan if r[key] is None else 100 * r[key] for r in records]
        axes.plot(steps, values, marker="o", markersize=3, label=label, **_style(i))
        axes.annotate(f"{values[-1]:.2f}", (steps[-1], values[-1]), (4, 0), textcoords="offset points", va="center",
                      fontsize=8)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("iteration (the last is the one reported)")
    axes.set_ylabel("Dice in %, pooled")
    axes.set_title(title)
    axes.legend()
    _save(plt, figure, path)


def report(path: Path, cells: Sequence[dict]) -> None:
    """Dice of each organ by method, from `report.cells`: a row for each data set and split, a column a protocol."""
    plt = pyplot()
    cells = [c for c in cells if c["values"]]
    rows = {(c["data"], c["split"]): c["names"] for c in cells}
    protocols = list(dict.fromkeys(c["protocol"] for c in cells))
    methods = list(dict.fromkeys(c["label"] for c in cells))
    looks = {m: {"marker": MARKERS[i % len(MARKERS)], "color": STYLES[i % len(STYLES)][0], "linestyle": "none",
                 "markersize": 4.5, "fillstyle": "none" if i % 2 else "full"} for i, m in enumerate(methods)}
    step = min(0.22, 0.66 / len(methods))  # aside, so that equal values stay visible
    aside = {m: step * (i - (len(methods) - 1) / 2) for i, m in enumerate(methods)}
    heights = [0.9 + 0.18 * (1 + len(organs)) for organs in rows.values()]
    figure, grid = plt.subplots(len(rows), len(protocols), figsize=(1.6 + 2.7 * len(protocols), 0.6 + sum(heights)),
                                squeeze=False, sharex=True, sharey="row", layout="constrained", height_ratios=heights)
    for ((data, split), organs), line in zip(rows.items(), grid, strict=True):
        where, places = "generated phantom" if data == "phantom" else data, np.arange(len(organs))
        for protocol, axes in zip(protocols, line, strict=True):
            for c in cells:
                if (c["data"], c["split"], c["protocol"]) == (data, split, protocol):
                    shown = [*(100 * np.array(c["organs"], float)), np.mean(c["values"])]
                    axes.plot(shown, np.arange(len(shown)) + aside[c["label"]], **looks[c["label"]])
            axes.set_title(f"{protocol}, {split} % of the training volumes\n{where}", fontsize=8)
            axes.hlines([*places, len(organs)], 0, 100, color="#e8e8e8", linewidth=0.8, zorder=0)
            axes.set_xlim(-2, 102)
        line[0].set_yticks([*places, len(organs)], [*organs, "mean (mDS)"])
        line[0].get_yticklabels()[-1].set_weight("bold")
        line[0].set_ylim(len(organs) + 0.6, -0.6)
    for axes in grid[-1]:
        axes.set_xlabel("Dice in %, pooled over the validation set")
    handles = [plt.Line2D([], [], label=m, **look) for m, look in looks.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(5, len(handles)))
    _save(plt, figure, path)
