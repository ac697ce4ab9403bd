"""Whose settings: the paper's, the phantom's, others' (--recipe); what runs are called, and what they warn of."""

import argparse
from pathlib import Path

from ct.prepare import SIZE, WINDOW
from engine.seeds import seed_suffix

BASIC = ("resnet18", "resnet34")  # ResNets of basic blocks; all others have bottlenecks
LR = 0.03  # of a batch of 256; in proportion to the batch
# What no preset changes: temperatures and lambda of Eq. 1 to 3, K of Eq. 2, T of Newton's iteration.
TERMS = dict(temperature=0.2, temperature_local=0.2, lambda_local=1.0, patches=20, zca_iterations=5)
PAPER = dict(arch="resnet50", init="imagenet", image_size=224, batch_size=256, bn_group=32, epochs=200, lr=None,
             queue=65536, ema=0.999, zca_group=64, size=SIZE, weight_decay=1e-4, window=WINDOW) | TERMS
# The phantom's preset: see docs/training.md, "Few slices". Its methods begin with a run of START, the stand-in for
# ImageNet weights: MoCo v2 without crops and flips, which learns from random weights where MoCo v2 with them does not.
PHANTOM = dict(arch="resnet18", image_size=64, batch_size=64, bn_group=32, epochs=10, lr=0.01, queue=256, ema=0.99,
               zca_group=64, size=192, weight_decay=1e-4, window=WINDOW) | TERMS
START = dict(init="random", local=False, zca=False, geometric=False, every=1, epochs=6, steps=None, overwrite=False,
             recipe="paper")

SEGMENTATION = dict(arch="resnet50", iterations=40_000, crop_size=512, batch_size=16, lr=0.01, whole_slices=False)
# On the phantom the frozen head sees whole slices, so that their features are computed once.
SEGMENTATION_PHANTOM = dict(arch="resnet18", crop_size=96, batch_size=16)
PHANTOM_RECIPES = {"linear-frozen": dict(iterations=300, lr=0.2, whole_slices=True),
                   "linear-finetune": dict(iterations=100, lr=0.05, whole_slices=False),
                   "deeplabv3plus": dict(iterations=60, lr=0.05, whole_slices=False)}

# The first author's published code (Jamshidhsp/med_selfsup, e6e1990), as far as flags reach it: docs/decisions.md has
# each with its file, and what is not imitated. Its 16 bits have no HU window: this one holds what a CT's 12 bits hold.
AUTHOR = dict(window=(-1024, 3071), weight_decay=1e-6, zca_group=0)
AUTHOR_SIZES = dict(image_size=336, lr=0.03, epochs=300)  # the phantom keeps its own, with its batch, queue and EMA
FEW = 20_000  # slices: below, the paper's settings are looked at for what cannot work


def row(args: argparse.Namespace) -> str:
    """The row of the tables that a pre-training's method is: Table 2's, with a suffix where its views are not the
    paper's. It names a run without --name.
    """
    name = "moco"
    if args.local:
        name += "-local"
    if args.zca:
        name += "-zca"
    if args.local and args.geometric:
        name += "-aligned"
    if not (args.local or args.geometric):
        name += "-nogeo"
    name += f"-every{args.every}" * (args.every > 1)
    if args.recipe == "author":
        name = "author-" + name.removeprefix("moco-")
    return name


def author(args: argparse.Namespace, defaults: dict, phantom: bool) -> dict:
    """`defaults` with the first author's in their place.

    The batch is that of two GPUs, 2 x 64; with --zca, the full method, of one: there all images share batch statistics.
    """
    defaults = defaults | AUTHOR
    if not phantom:
        defaults |= AUTHOR_SIZES | dict(batch_size=64 if args.zca else 128)
    batch = args.batch_size or defaults["batch_size"]
    return defaults | dict(bn_group=batch if args.zca else max(1, batch // 2))


def author_schedule(t: int, horizon: int) -> float:
    """The share of the learning rate that step t has: all of it, from epoch 5 of 300 on a third, and slowly more.

    mmengine's LinearLR with begin=5, end=500 and its defaults: 1/3 at the beginning and 1 at the end, which 300 epochs
    do not reach. With other total steps the epochs are shares of them.
    """
    begin, end = horizon * 5 / 300, horizon * 500 / 300
    return 1.0 if t < begin else 1 / 3 + 2 / 3 * (t - begin) / (end - begin - 1)


def start_of(args: argparse.Namespace) -> str:
    """The run that is the initial checkpoint of the phantom's methods with this seed."""
    return "phantom-start" + seed_suffix(args.seed)


def name_of(args: argparse.Namespace, phantom: bool) -> str:
    """A run's name where none is given: its row of the tables and its seed."""
    return "phantom-" * phantom + row(args) + seed_suffix(args.seed)


def advice(args: argparse.Namespace, trained: int, horizon: int) -> list[str]:
    """What cannot work with few slices to train on, as lines with the flags that can; [] where nothing is wrong.

    The paper's settings are for 215,325 slices; those that were seen to work on a few hundred or thousand stand in
    docs/training.md, "Few slices".
    """
    if trained >= FEW:
        return []
    wrong = []
    if args.queue > max(trained // 2, args.batch_size):
        fitting = args.batch_size * min(4, max(1, trained // 2 // args.batch_size))
        wrong.append(f"the queue of {args.queue:,} keys holds {args.queue / trained:.1f} keys of every slice, so that "
                     f"stale keys of the query's own slice are among its negatives (--queue {fitting})")
    if horizon * (1 - args.ema) < 1:
        quicker = "--ema 0.99" if args.ema > 0.99 else "more --epochs"
        wrong.append(f"the key encoder moves {1 - args.ema:.4g} of the way a step, too slow for {horizon:,} steps "
                     f"({quicker})")
    if horizon < 1000 and args.geometric and args.init == "random":
        wrong.append(f"from random weights, {horizon:,} steps with crops were never enough to tell slices apart (first "
                     "a run with --no-geometric --name start, then --init start)")
    if args.arch not in BASIC and args.geometric and args.init != "imagenet" and not Path(args.init).is_file():
        wrong.append(f"a {args.arch} that starts from what few slices have taught it may never tell slices apart with "
                     "crops: a ResNet-50 did not (--arch resnet18; docs/measurements.md, \"ResNet-50 from random "
                     "weights\")")
    return wrong


def remarks(args: argparse.Namespace) -> list[str]:
    """What is known of a run's method, whatever its data; [] where nothing is."""
    found = []
    if args.local and not args.geometric:
        found.append("without crops and flips, as the paper words it, features segmented real CT worse than MoCo v2's "
                     "with them, and at twice the views' side worse than random weights (docs/measurements.md, "
                     "\"Trained longer\"); --geometric keeps both and aligns the patches")
    if args.recipe == "author":
        low, high = args.window
        found.append(f"the first author's settings, as far as flags reach (docs/decisions.md); 8 bits over {low:g} to "
                     f"{high:g} HU are {(high - low) / 255:.1f} HU a level; segment with --window {low:g} {high:g} too")
    return found
