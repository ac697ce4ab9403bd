"""Fig. 1: the singular values of backbone features on validation slices, of BTCV or of your own labelled CT.

    python svd_spectrum.py                          all pre-training runs of --out
    python svd_spectrum.py moco moco-local-zca imagenet my_backbone.pth
    python svd_spectrum.py --positions              every position of the feature map a vector of its own

A feature is the backbone's last map (stride 32) in evaluation mode, whitening folded, averaged over its positions
unless you give --positions. The singular values are those of the features' covariance. The effective rank is the exp of
the entropy of l / sum(l), l the eigenvalues of the centred covariance; spectrum.csv has RankMe beside it, which takes
the singular values of the features themselves.
n vectors cannot span more than n - 1 dimensions: the 762 slices of BTCV's validation set end a pooled spectrum of
2048 values at 761.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))  # which PYTHONSAFEPATH leaves out
    import ct
    ct.importing()

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import datasets
import metrics
from ct import intake, prepare
from ct.command import whole
from ct.volumes import BadInput
from engine import backbones, figures, launch, methods, origin, processes, report
from views import resize

PAPER, PHANTOM = dict(arch="resnet50", image_size=224), dict(arch="resnet18", image_size=64)


class Row(NamedTuple):
    """A backbone's line of spectrum.csv and curve of Fig. 1, with the remarks of the tables: marks in bold."""

    name: str
    method: str
    label: str  # in the figure
    vectors: int
    values: np.ndarray  # singular values of the covariance, descending
    rank: float
    rankme: float
    remarks: list[str]


@torch.no_grad()
def features(backbone: nn.Module, slices: torch.Tensor, size: int, positions: bool, device: torch.device,
             amp: str = "off") -> np.ndarray:
    """Slices (N, S, S) uint8 -> last feature maps' vectors (N, C), or (N x positions, C), float32."""
    stages = nn.Sequential(*list(backbone.children())[:-2]).to(device).eval()  # without avgpool and fc
    vectors = []
    for part in slices.split(32):
        with processes.autocast(amp, device):
            maps = stages(resize.whole(part.to(device), size)).float()  # (B, C, S/32, S/32)
        vectors.append(maps.movedim(1, -1).flatten(0, 2) if positions else maps.mean((2, 3)))
    return torch.cat(vectors).cpu().numpy()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; what it leaves to the data is None."""
    parser = launch.Parser(prog="svd_spectrum.py", description=__doc__.split("\n\n")[0],
                           epilog="Defaults are the paper's; in brackets those of the built-in phantom.")
    parser.common("BTCV", trains=False)
    prepare.task_flags(parser)
    add = parser.with_defaults(PAPER, PHANTOM)
    parser.add_argument("backbones", nargs="*", help="runs of --out or their folders, files, imagenet or random "
                        "(default: all runs)")
    add("--backbone", action="append", default=[], help="one more backbone, named as in train_seg.py")
    add("--positions", action="store_true", help="take every position of the last map as a vector, not their mean")
    add("--image-size", type=whole(1), help="pixels of a slice's side")
    add("--arch", help="architecture of imagenet, random and files")
    return parser.parse_args(argv)


def runs_in(out: Path, phantom: bool, window: Sequence[float]) -> list[str]:
    """The pre-training runs of a folder, those on the phantom or the others. Raises BadInput for none."""
    found = backbones.pretrained(sorted(p.parent for p in out.glob(f"*/{backbones.CHECKPOINT}")), window)
    names = [folder.name for folder, config in found.items() if (config["data"] == "phantom") == phantom]
    if not names:
        raise BadInput(f"{out}: no pre-training run there; python train_ssl.py --local --zca makes one")
    return sorted(names, key=lambda n: (len(n), n))


def squares(store: datasets.Store, size: int) -> torch.Tensor:
    """The validation slices (N, size, size) uint8, padded to square with air, then resized."""
    numbers = tqdm(store.of(store.task.cases("val")), "slices", disable=None, leave=False)
    return torch.from_numpy(np.concatenate([prepare.square(store.slice(int(i))[None], size) for i in numbers]))


def write(path: Path, data: str, title: str, rows: list[Row]) -> list[Path]:
    """PATH.csv with all numbers and PATH.png, Fig. 1; returns those that were written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    longest = max(len(row.values) for row in rows)
    table = [["backbone", "data", "vectors", "effective_rank", "rankme", "remarks", *range(1, 1 + longest)]]
    table += [[row.name, data, row.vectors, f"{row.rank:.4f}", f"{row.rankme:.4f}",
               "; ".join(row.remarks).replace("**", ""), *(f"{v:.6e}" for v in row.values)] for row in rows]
    report.write_csv(path.with_suffix(".csv"), table)
    curves = [(row.method, "\n".join([row.label, *report.doubts(row.remarks)]), row.values, row.rank) for row in rows]
    if figures.attempt(figures.spectrum, path.with_suffix(".png"), curves, title):
        return [path.with_suffix(".png"), path.with_suffix(".csv")]
    return [path.with_suffix(".csv")]


@launch.command
def main(argv: list[str] | None = None) -> None:
    """The spectrum and the ranks of each backbone's features of the validation slices."""
    args = parse(argv)
    data, phantom = intake.locate(args.data, "BTCV")
    launch.fill(args, PHANTOM if phantom else PAPER)
    backbones.architecture(args.arch)
    names = [backbones.resolve(n, args.out, phantom) for n in
             args.backbones + args.backbone or runs_in(args.out, phantom, args.window)]
    store, ranks, remarks = datasets.open_labelled(args, data)
    amp = processes.precision(args.amp, ranks.device)
    if not ranks.is_main:  # the work of one process, which alone writes
        return
    if phantom:
        origin.announce_phantom(store)
    for line in remarks:
        print(line)
    for name in names:
        origin.announce_input(name, args.out, args.window)
    slices, rows = squares(store, max(args.image_size, 32)), []
    for name in tqdm(names, "features", unit="run", disable=None, leave=False):
        backbone = backbones.open_backbone(name, args.out, args.arch, args.seed, "fold", phantom)
        vectors = features(backbone.net, slices, args.image_size, args.positions, ranks.device, amp)
        values = metrics.singular_values(vectors)
        result = {"backbone": backbone.name, "data": store.name, "window": args.window, "pretraining": backbone.made}
        row = Row(backbone.name, methods.method_of(result), methods.label(result), len(vectors), values,
                  metrics.effective_rank(values), metrics.rankme(vectors), report.remarks_on(result))
        remarks = f" ({'; '.join(row.remarks)})".replace("**", "") if row.remarks else ""
        tqdm.write(f"{name}: effective rank {row.rank:.2f} of {vectors.shape[1]}, RankMe {row.rankme:.2f}, "
                   f"{row.vectors:,} vectors of {len(slices)} slices{remarks}")
        rows.append(row)
    kind = "positions of" if args.positions else "one for each of"
    what = f"{rows[0].vectors:,} vectors ({kind} {len(slices)} slices)" + f", in {amp}" * (amp != "off")
    where = "the phantom's validation slices" if phantom else f"{store.name}, validation slices"
    path = args.out / ("spectrum-positions" if args.positions else "spectrum")
    written = write(path, store.name, f"{where}; {what}", rows)
    print(f"{', '.join(map(str, written))}: {what}")


if __name__ == "__main__":
    main()
