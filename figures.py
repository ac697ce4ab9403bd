"""Every picture. matplotlib is needed here and nowhere else."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from volumes import BadInput

INK = "#222222"
# distinct in colour and, through the line styles, in grey
STYLES = (("#222222", "-"), ("#c0392b", "--"), ("#1f618d", "-."), ("#1e8449", (0, (6, 1))), ("#b9770e", ":"),
          ("#6c3483", (0, (3, 1, 1, 1))))


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
                         "legend.frameon": False, "figure.dpi": 150, "savefig.bbox": "tight"})
    return plt


def spectrum(path: Path, runs: Sequence[tuple[str, np.ndarray, float]], title: str) -> None:
    """Fig. 1: sorted singular values of the features' covariance, log scale.

    runs: (name, descending singular values, effective rank) of each; numerical zeros fall below the axis.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5.6, 3.8))
    for (name, values, rank), (colour, line) in zip(runs, STYLES * (1 + len(runs) // len(STYLES)), strict=False):
        shown = values[values > values[0] * 1e-12]
        axes.plot(np.arange(1, len(shown) + 1), shown, color=colour, linestyle=line, linewidth=1.4,
                  label=f"{name}  (effective rank {rank:.1f})")
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set_xlabel("singular value rank index")
    axes.set_ylabel("singular value of the covariance")
    axes.set_title(title, fontsize=9, loc="left")
    axes.legend(fontsize=8)
    figure.savefig(path)
    plt.close(figure)
