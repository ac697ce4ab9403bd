"""Fig. 1: the spectrum of the covariance of backbone features on validation slices, BTCV's or others, for any runs.

    python svd_spectrum.py                          all pre-training runs of --out
    python svd_spectrum.py moco moco-local-zca imagenet my_backbone.pth
    python svd_spectrum.py --positions              every position of the feature map a vector of its own

Features: the backbone's last map (stride 32) in evaluation mode, whitening folded, averaged over its positions
unless --positions. Effective rank: exp of the entropy of l / sum(l), l the eigenvalues of the centred covariance;
spectrum.csv has RankMe beside it, which takes the singular values of the features themselves.
n vectors cannot span more than n - 1 dimensions: the 762 slices of BTCV's validation set end a pooled spectrum of
2048 values at 761.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import augment
import datasets
import metrics
from ct import audit, intake, prepare, stores, tasks
from ct.command import whole
from ct.volumes import BadInput
from engine import backbones, figures, processes, report


@torch.no_grad()
def features(backbone: nn.Module, slices: torch.Tensor, size: int, positions: bool, device: torch.device,
             amp: str = "off") -> np.ndarray:
    """Slices (N, S, S) uint8 -> last feature maps' vectors (N, C), or (N x positions, C), float32."""
    stages = nn.Sequential(*list(backbone.children())[:-2]).to(device).eval()
    vectors = []
    for part in slices.split(32):
        with processes.autocast(amp, device):
            maps = stages(augment.whole(part.to(device), size)).float()
        vectors.append(maps.movedim(1, -1).flatten(0, 2) if positions else maps.mean((2, 3)))
    return torch.cat(vectors).cpu().numpy()


@processes.command
def main(argv: list[str] | None = None) -> None:
    parser = processes.Parser(prog="svd_spectrum.py", description=__doc__.split("\n\n")[0])
    parser.common("BTCV")
    prepare.task_flags(parser)
    parser.add_argument("backbones", nargs="*", help="runs of --out or their folders, files, imagenet or random "
                        "(default: all runs)")
    parser.add_argument("--backbone", action="append", default=[], help="one more, by the name it has in train_seg.py")
    parser.add_argument("--positions", action="store_true", help="every position of the last map, not their mean")
    parser.add_argument("--image-size", type=whole(1), help="pixels of a slice's side (224) [64 on the phantom]")
    parser.add_argument("--arch", help="of imagenet, random and files (resnet50) [resnet18]")
    args = parser.parse_args(argv)
    data, phantom = intake.locate(args.data, "BTCV")
    args.image_size = args.image_size or (64 if phantom else 224)
    args.arch = args.arch or ("resnet18" if phantom else "resnet50")
    backbones.architecture(args.arch)
    names = [backbones.resolve(n, args.out, phantom) for n in
             args.backbones + args.backbone or runs_in(args.out, phantom)]
    store = datasets.prepare(data, args.store or stores.default_store(data), "segment", tuple(args.window),
                             workers=args.workers, names=args.labels, organs=args.organs)
    device = processes.start(args.deterministic).device
    if phantom:
        processes.announce_phantom()
    drawn = tasks.draw_splits(store.task, [v["id"] for v in store.volumes], args.val, args.val_cases,
                              args.patient_regex)
    for line in audit.remarks(store.volumes, store.skipped, store.task) + drawn:
        print(line)
    slices = store.of(store.task.cases("val"))
    squares = torch.from_numpy(np.concatenate([prepare.square(store.slice(int(i))[None], max(args.image_size, 32))
                                               for i in tqdm(slices, "slices", disable=None, leave=False)]))
    runs = []
    for name in tqdm(names, "features", unit="run", disable=None, leave=False):
        backbone = backbones.open_backbone(name, args.out, args.arch, args.seed, "fold", phantom)
        vectors = features(backbone.net, squares, args.image_size, args.positions, device)
        values = metrics.singular_values(vectors)
        runs.append((backbone.name, values, metrics.effective_rank(values), metrics.rankme(vectors)))
        tqdm.write(f"{name}: effective rank {runs[-1][2]:.2f} of {vectors.shape[1]}, RankMe {runs[-1][3]:.2f}, "
                   f"{len(vectors):,} vectors of {len(slices)} slices"
                   + f" (unfinished: {backbone.unfinished})" * bool(backbone.unfinished))
    what = f"{len(vectors):,} vectors ({'positions of' if args.positions else 'one for each of'} {len(slices)} slices)"
    where = "the phantom's validation slices" if phantom else f"{store.name}, validation slices"
    path = args.out / ("spectrum-positions" if args.positions else "spectrum")
    args.out.mkdir(parents=True, exist_ok=True)
    header = ["backbone", "data", "vectors", "effective_rank", "rankme", *range(1, 1 + max(len(r[1]) for r in runs))]
    report.write_csv(path.with_suffix(".csv"), [header, *(
        [name, "phantom" if phantom else store.name, len(vectors), f"{rank:.4f}", f"{rankme:.4f}",
         *(f"{v:.6e}" for v in values)] for name, values, rank, rankme in runs)])
    labelled = [(report.label(name, phantom), values, rank) for name, values, rank, _ in runs]
    drawn = figures.attempt(figures.spectrum, path.with_suffix(".png"), labelled, f"{where}; {what}")
    print(f"{', '.join(str(path.with_suffix(x)) for x in ['.png'] * drawn + ['.csv'])}: {what}")


def runs_in(out: Path, phantom: bool) -> list[str]:
    """The pre-training runs of a folder, those on the phantom or the others. Raises BadInput for none."""
    found = backbones.pretrained(sorted(p.parent for p in out.glob(f"*/{backbones.CHECKPOINT}")))
    names = [folder.name for folder, config in found.items() if (config["data"] == "phantom") == phantom]
    if not names:
        raise BadInput(f"{out}: no pre-training run there; torchrun train_ssl.py --local --zca makes one")
    return sorted(names, key=lambda n: (len(n), n))


if __name__ == "__main__":
    main()
