"""Every picture. matplotlib is needed here and nowhere else; it draws without a display.

Methods and classes have their colours of `engine.methods` in every picture. Colours are always doubled by a line
style, a marker or a label, so that a grey print can be read too.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from ct.command import printable
from ct.volumes import BadInput
from engine import runs
from engine.methods import looks, organ_colours

INK, PALE = "#222222", "#b5b5b5"
SERIES = (("#222222", "-"), ("#7c8fa6", "--"), ("#4b647d", "-."), ("#a9b4c0", ":"))  # of one run: no method's colours
FILLS = ("full", "none", "left", "right", "bottom", "top")  # of markers: of several lines of one method


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
                         "legend.fontsize": 8, "lines.linewidth": 1.3, "lines.markersize": 4.5, "figure.dpi": 150,
                         "savefig.bbox": "tight"})
    return plt


def attempt(draw: Callable[..., None], *args) -> bool:
    """draw(path, ...), one of the pictures below, and whether it was drawn.

    One that cannot be drawn, whatever the reason, is reported in one line and ends nothing.
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
    """How the i-th of up to four curves of one run looks."""
    colour, line = SERIES[i % len(SERIES)]
    return {"color": colour, "linestyle": line}


def _styles(names: Sequence[str]) -> list[dict]:
    """How a picture's lines look, each by its method; several of one method differ in how their markers are filled."""
    look, names = looks(names), [*names]
    return [{"color": look[name].colour, "linestyle": look[name].line, "marker": look[name].marker,
             "fillstyle": FILLS[names[:i].count(name) % len(FILLS)]} for i, name in enumerate(names)]


def _columns(names: Sequence[str], width: float, size: float) -> int:
    """Into how many columns, each as wide as its longest name, a legend of this print fits within `width` inches."""
    taken = {n: sum(max(map(len, c), default=0) + 6.5 for c in np.array_split(names, n)) for n in range(1, 8)}
    return max((n for n, characters in taken.items() if characters * size < 112.3 * width), default=1)


# ------------------------------------------------------------------------------------------------- pre-training


def spectrum(path: Path, runs: Sequence[tuple[str, str, np.ndarray, float]], title: str) -> None:
    """Fig. 1: sorted singular values of the features' covariance, log scale, and the effective ranks beside them.

    runs: (method, label, descending singular values, effective rank) of each. Values are divided by the largest: the
    scale of features is no sign of collapse, how fast the values fall is. Numerical zeros fall below the axis.
    """
    plt = pyplot()
    figure, (axes, bars) = plt.subplots(1, 2, figsize=(9.2, 3.8), width_ratios=[3, 2], layout="constrained")
    for i, (style, (_, label, values, rank)) in enumerate(zip(_styles([r[0] for r in runs]), runs, strict=True)):
        shown = values[values > values[0] * 1e-12] / values[0]
        apart = max(1, len(shown) // 8)  # markers, where many curves of one grey would be too much for line styles
        axes.plot(np.arange(1, len(shown) + 1), shown, **style, label=label,
                  markevery=(apart * (2 * i + 1) // (2 * len(runs)), apart))
        bars.barh(i, rank, color=style["color"], height=0.6)
        bars.annotate(f"{rank:.1f}", (rank, i), (3, 0), textcoords="offset points", va="center")
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set_xlabel("index of the singular value, largest first")
    axes.set_ylabel("singular value of the covariance / the largest")
    axes.set_title(title)
    axes.legend()
    bars.set_yticks(range(len(runs)), [label for _, label, *_ in runs])
    bars.invert_yaxis()
    bars.set_xlim(0, 1.15 * max(rank for *_, rank in runs))
    bars.set_xlabel(f"dimensions that are used, of {max(len(values) for *_, values, _ in runs)}")
    bars.set_title("effective rank: the lower, the more collapsed")
    _save(plt, figure, path)


def overview(path: Path, views: Sequence[np.ndarray], spectra: Sequence[tuple[str, str, np.ndarray]],
             maps: Sequence[tuple[str, np.ndarray]], image: np.ndarray) -> None:
    """README's strip: a slice and two views of it, what pre-training sees; the spectra; the slice segmented.

    views: (S, S) in [0, 1]; spectra: (method, label, descending singular values); maps: (caption, labels (H, W)) of
    `image` (H, W) uint8.
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
    for style, (_, label, values) in zip(_styles([method for method, *_ in spectra]), spectra, strict=True):
        shown = values[values > values[0] * 1e-6] / values[0]
        curves.plot(np.arange(1, len(shown) + 1), shown, **style | {"marker": None}, label=label)
    curves.set_yscale("log")
    curves.set_title("singular values of the features (Fig. 1)")
    curves.set_xlabel("index, largest first")
    curves.legend(loc="lower left", fontsize=7)
    _save(plt, figure, path)


def curves(path: Path, log_records: Sequence[dict], chance: float, chance_local: float | None = None) -> None:
    """A pre-training run from the records of its log.jsonl, legends beside the curves.

    chance and chance_local: what Eq. 1 and Eq. 2 are for random features. Panels for what the log holds: the losses,
    accuracy, similarities, probe, effective ranks, learning rate.
    """
    plt = pyplot()
    panels = [("loss", {"loss_global": "global (Eq. 1)", "loss_local": "local (Eq. 2)"}),
              ("instance-discrimination accuracy", {"instance_accuracy": "held out, fresh keys",
                                                    "instance_chance": "its chance",
                                                    "queue_accuracy": "training, stale keys"}),
              ("similarity margin, held out", {"held_out_gap": "positive less negative"}),
              ("mean cosine similarity", {"similarity_positive": "positive, training",
                                          "similarity_negative": "negative, training",
                                          "held_out_positive": "positive, held out",
                                          "held_out_negative": "negative, held out"}),
              ("probe: mean Dice, labelled slices", {"probe_dice": "now", "probe_dice_start": "before the first step"}),
              ("effective rank", {"effective_rank": "backbone's features", "effective_rank_embedding": "embeddings"}),
              ("learning rate", {"lr": "learning rate"})]
    series = {key: np.array([(r["step"], r[key]) for r in log_records if r.get(key) is not None], float).reshape(-1, 2)
              for _, keys in panels for key in keys}
    if not series["loss_local"][:, 1].any():
        series["loss_local"], chance_local = series["loss_local"][:0], None
    panels = [(title, keys) for title, keys in panels if any(len(series[k]) for k in keys)]
    rows = -(-len(panels) // 2)
    figure, grid = plt.subplots(rows, 2, figsize=(10, 2.1 * rows), squeeze=False, sharex=True, layout="constrained")
    for axes, (title, keys) in zip(grid.flat, panels, strict=False):
        for i, (key, label) in enumerate(k for k in keys.items() if len(series[k[0]])):
            _curve(axes, *series[key].T, label, _style(i))
        for i, level in enumerate([chance, chance_local] if title == "loss" else []):
            if level is not None:
                name = "global" if i == 0 else "local"
                axes.axhline(level, color=_style(i)["color"], linewidth=0.8, linestyle=(0, (1, 2)), zorder=0,
                             label=f"{name}, chance {level:.2f}")
        if not title.startswith(("mean cosine", "probe")) and min(series[k][:, 1].min(initial=0) for k in keys) == 0:
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.set_title(title)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in list(grid.flat)[len(panels):]:
        axes.remove()
    for axes in figure.axes[-2:]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("step")
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


def over_steps(path: Path, panels: dict[str, tuple[dict[str, tuple], dict[str, Sequence[tuple]]]],
               labels: dict[str, str]) -> None:
    """What backbones are worth over the steps of their pre-training: a panel for each kind of slices, a curve a method.

    panels: {title: (levels, curves)}: {method: (mean Dice in %, standard deviation or None)} of what is not trained
    further, a line across the panel, and {method: [(step, mean, standard deviation or None), ...]}. labels: of methods
    that are not called by their names. Curves stand a little aside of each other, so that bars stay apart.
    """
    plt = pyplot()
    figure, grid = plt.subplots(1, len(panels), figsize=(1.5 + 4.2 * len(panels), 3.6), squeeze=False, sharey=True,
                                layout="constrained")
    names = list(dict.fromkeys(name for parts in panels.values() for part in parts for name in part))
    styles = dict(zip(names, _styles(names), strict=True))
    for axes, (title, (levels, curves)) in zip(grid[0], panels.items(), strict=True):
        for name, (mean, deviation) in levels.items():
            style = styles[name] | {"marker": None}
            axes.axhline(mean, label=labels.get(name, name), **style)
            axes.axhspan(mean - (deviation or 0), mean + (deviation or 0), color=style["color"], alpha=0.1, linewidth=0)
        for name, points in curves.items():
            steps, means, bars = (np.array(x, float) for x in zip(*points, strict=True))
            axes.errorbar(steps * 1.015 ** (names.index(name) - len(names) / 2), means, bars, capsize=2, elinewidth=0.8,
                          label=labels.get(name, name), **styles[name])
        axes.set_xscale("log")
        ticks = [step for step, *_ in next(iter(curves.values()), ())]  # of thinned slices they are others, unnamed
        axes.set_xticks(ticks, [f"{step:,}" for step in ticks])
        axes.minorticks_off()
        axes.set_xlabel("pre-training steps from the initial checkpoint")
        axes.set_title(title)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center")
    grid[0][0].set_ylabel("Dice in %, frozen linear head")
    _save(plt, figure, path)


def contact_sheet(path: Path, slices: Sequence[np.ndarray], titles: Sequence[str],
                  labels: Sequence[np.ndarray] | None = None, names: Sequence[str] = ()) -> None:
    """Slices (H, W) uint8 of any sizes, each under its title, in the order given: prepared slices at a glance.

    labels (H, W) uint8, where there are any: the classes in their colours, so that a mirrored label is seen; names: of
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
    """What names the classes `seen` below a figure of `width` inches, in smaller print if many; its height in inches.
    """
    from matplotlib.patches import Patch

    seen = sorted({int(c) for c in seen if 0 < c < len(names)})
    print_size = 8 if len(seen) <= 28 else 6.5
    columns = _columns([names[c] for c in seen], width, print_size)
    handles = [Patch(color=organ_colours()[c], label=names[c]) for c in seen]
    return ({"handles": handles, "fontsize": print_size, "loc": "outside lower center", "ncols": columns,
             "handlelength": 1, "handleheight": 1}, max(0.75, 0.42 + 0.0205 * print_size * -(-len(seen) // columns)))


# ------------------------------------------------------------------------------------------------- segmentation


def overlays(path: Path, rows: Sequence[tuple], title: str, names: Sequence[str],
             kinds: Sequence[str] = ("truth", "prediction")) -> None:
    """Slices with their labels, some a line: the image, then a picture for each of `kinds`, classes in fixed colours.

    rows: (caption, image, labels of each kind), all but the caption (H, W) uint8; names: of the labels 0, 1, ...
    """
    plt = pyplot()
    each, across = 1 + len(kinds), 6 // (1 + len(kinds))  # pictures of a slice, slices a line
    lines = -(-len(rows) // across)
    legend, below = _legend((c for _, _, *maps in rows for m in maps for c in np.unique(m)), names, 10.6)
    figure, grid = plt.subplots(lines, across * (each + 1) - 1, figsize=(10.6, 1.83 * lines + 0.15 + below),
                                squeeze=False, layout="constrained",  # a gap between two slices
                                width_ratios=[*[*[1] * each, 0.06] * across][:-1])
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.02, wspace=0, hspace=0.01)
    for axes in grid.flat:
        axes.axis("off")
    for i, (caption, image, *maps) in enumerate(rows):
        first, box = (each + 1) * (i % across), _body(image)
        for axes, labels, name in zip(grid[i // across, first:], (None, *maps), (caption, *kinds), strict=False):
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
    """(H, W) uint8 and its labels -> (H, W, 3) in [0, 1]: classes tinted, their borders in full colour."""
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
    """Dice of each class by method, from `report.cells`: a row for each data set and split, a column a protocol.

    Bars: the standard deviation over random subsets and seeds (n - 1), where there are several.
    """
    plt = pyplot()
    protocols = [p for p in dict.fromkeys(c["protocol"] for c in cells)
                 if any(c["values"] for c in cells if c["protocol"] == p)]
    cells = [c for c in cells if c["values"]]
    data = list(dict.fromkeys(c["data"] for c in cells))
    rows = {(c["data"], c["split"]): c["names"] for c in sorted(cells, key=lambda c: (
        data.index(c["data"]), float(c["split"])))}
    lines = list(dict.fromkeys((c["method"], c["label"]) for c in cells))
    styles = {label: style | {"linestyle": "none"}
              for (_, label), style in zip(lines, _styles([method for method, _ in lines]), strict=True)}
    step = min(0.22, 0.66 / len(lines))  # aside, so that equal values stay visible
    aside = {label: step * (i - (len(lines) - 1) / 2) for i, (_, label) in enumerate(lines)}
    heights, width = [0.9 + 0.18 * (1 + len(names)) for names in rows.values()], 2.4 + 2.7 * len(protocols)
    figure, grid = plt.subplots(len(rows), len(protocols), figsize=(width, 0.6 + sum(heights)), squeeze=False,
                                sharex=True, sharey="row", layout="constrained", height_ratios=heights)
    for ((where, split), names), line in zip(rows.items(), grid, strict=True):
        places = np.arange(len(names) + 1)
        for protocol, axes in zip(protocols, line, strict=True):
            for c in cells:
                if (c["data"], c["split"], c["protocol"]) == (where, split, protocol):
                    means = [*(100 * np.array(c["organs"], float)), np.mean(c["values"])]
                    axes.errorbar(means, places + aside[c["label"]], xerr=[*c["deviations"], c["deviation"]],
                                  elinewidth=0.8, **styles[c["label"]])
            axes.set_title(f"{protocol}, {split} % of the training volumes\n"
                           f"{'generated phantom' if where == 'phantom' else where}", fontsize=8)
            axes.hlines(places, 0, 100, color="#e8e8e8", linewidth=0.8, zorder=0)
            axes.set_xlim(-2, 102)
        line[0].set_yticks(places, [*names, "mean (mDS)"])
        line[0].get_yticklabels()[-1].set_weight("bold")
        line[0].set_ylim(len(names) + 0.6, -0.6)
    for axes in grid[-1]:
        axes.set_xlabel("Dice in %, pooled over the validation set")
    handles = [plt.Line2D([], [], label=label, **style) for label, style in styles.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=_columns([*styles], width, 8))
    _save(plt, figure, path)
