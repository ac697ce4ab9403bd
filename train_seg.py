"""Measure a backbone by segmenting BTCV's 13 organs, Tables 1 and 2, or those of anyone's labelled CT.

    python train_seg.py --split 12.5                       the paper's method, three protocols, three draws
    python train_seg.py --split 100 --backbone all         all methods of Table 2
    python train_seg.py --split 25 --backbone my_backbone.pth --protocol linear-frozen --draw 0
    python train_seg.py --data Task09_Spleen --split 25    one's own labels: MSD, nnU-Net, TotalSegmentator ...
    python train_seg.py --report                           both tables and a figure of what has been run so far
    python train_seg.py --predict my_ct --run RUN          the organs of anyone's CT, by one of the runs above
    torchrun --nproc-per-node 4 train_seg.py --split 100   several GPUs, with synchronised batch statistics

What is done is skipped; what stopped continues. The reported model is the last iteration's: the validation curve
chooses nothing.
"""

import argparse
import functools
import hashlib
import json
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))  # which PYTHONSAFEPATH leaves out
    import ct
    ct.importing()

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import datasets
from ct import intake, prepare
from ct.command import counted, duration, number, whole
from ct.volumes import BadInput
from engine import backbones, evaluate, launch, leaks, origin, pace, predict, processes, report, runs, seeds
from engine.recipes import PHANTOM_RECIPES, SEGMENTATION, SEGMENTATION_PHANTOM
from engine.report import DRAWS
from engine.signals import StopRequest
from segment import PROTOCOLS, Segmenter, loss_bytes

BACKBONE = "moco-local-zca"  # the run that is measured where no other is named
EVAL_INTERVAL = 4000  # iterations between two points of the validation curve, a checkpoint before each
LOG_INTERVAL = 10  # iterations between two looks at the loss

# ------------------------------------------------------------------------------------------------------ settings

MOMENTUM, WEIGHT_DECAY, LR_END, POWER = 0.9, 5e-4, 1e-4, 0.9  # mmsegmentation's schedule_40k


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; what it leaves to the data or the protocol is None until `resolve_defaults` and `recipe`."""
    parser = launch.Parser(prog="train_seg.py", description=__doc__.split("\n\n")[0],
                           epilog="Defaults are the paper's; in brackets the preset of the built-in phantom "
                           f"({'/'.join(PROTOCOLS)}).")
    parser.common("BTCV")
    prepare.task_flags(parser)
    prepare.images_flag(parser)
    by_protocol = {key: "/".join(f"{PHANTOM_RECIPES[p][key]}" for p in PROTOCOLS) for key in ("iterations", "lr")}
    by_protocol["whole_slices"] = "/".join("yes" if PHANTOM_RECIPES[p]["whole_slices"] else "no" for p in PROTOCOLS)
    add = parser.with_defaults(SEGMENTATION | {"whole_slices": "no"}, SEGMENTATION_PHANTOM | by_protocol)
    add("--split", help="percent of the training volumes: 12.5, 25 or 100")
    add("--draw", type=whole(0), help="one of the random subsets of volumes, 0 to 2 (default: all)")
    add("--protocol", choices=PROTOCOLS, help="how a head is trained (default: all three ways)")
    add("--backbone", help="a RUN of --out or its folder, a FILE of weights, imagenet, random or all (default: "
        "moco-local-zca)")
    add("--row", help="name of --backbone FILE in the tables (default: the file's name)")
    add("--whitening", choices=("bn", "fold"), default="bn",
        help="how to fine-tune a whitened run: a plain BN, as in the paper, or folded; frozen, it is always folded")
    add("--arch", help="architecture of --backbone imagenet, random or FILE")
    add("--iterations", type=whole(1), help="training iterations")
    add("--crop-size", type=whole(32), help="pixels of a training crop's side, and of a slice's when evaluated")
    add("--batch-size", type=whole(2), help="crops an iteration, over all processes")
    add("--lr", type=number(above=0), help="learning rate of the first iteration")
    add("--whole-slices", action=argparse.BooleanOptionalAction, help="linear-frozen trains on whole slices instead "
        "of random crops: features are computed once, which is fast, but the paper takes crops")
    add("--no-flip", dest="flip", action="store_false", help="do not mirror training crops: a mirrored left kidney "
        "looks like a right one but keeps its label (mmseg mirrors by default; whole slices are never mirrored)")
    add("--compile", action="store_true", help="compile a training iteration with torch.compile; dropout and the "
        "last digits differ (tried on a CPU only)")
    add("--eval-every", type=whole(1), default=EVAL_INTERVAL, metavar="N", help="iterations between two points of the "
        "validation curve, by which no model is chosen")
    add("--overwrite", action="store_true", help="start over if a run exists")
    add("--save-predictions", action="store_true", help="write predictions of the validation set as NIfTI")
    add("--report", action="store_true", help="print Tables 1 and 2 of all results; writes report.{md,csv,png}")
    add("--predict", type=Path, metavar="VOLUME|FOLDER", help="write label maps of these CT volumes; no training")
    add("--run", help="with --predict: the segmentation run of --out, or its folder")
    add("--predict-out", type=Path, metavar="FOLDER", help="with --predict: where to write (default: predictions in "
        "the run's folder); another volume's prediction is never overwritten")
    return parser.parse_args(argv)


def resolve_defaults(args: argparse.Namespace, phantom: bool) -> None:
    """Fill the defaults that all runs share, and refuse what cannot work (BadInput); see `recipe` for the rest."""
    launch.fill(args, SEGMENTATION_PHANTOM if phantom else SEGMENTATION)
    args.phantom = phantom
    if args.split is None:
        raise BadInput("--split is missing: give --split 12.5, 25 or 100 (or --report)")
    if args.split not in DRAWS:
        raise BadInput(f"--split {args.split}: no such split; there are {', '.join(DRAWS)}")
    args.draws = range(DRAWS[args.split]) if args.draw is None else [args.draw]
    for draw in args.draws:
        if draw not in range(DRAWS[args.split]):
            raise BadInput(f"--draw {draw}: split {args.split} has random subsets 0 to {DRAWS[args.split] - 1}")
    args.protocols = PROTOCOLS if args.protocol is None else (args.protocol,)


def recipe(args: argparse.Namespace, protocol: str) -> argparse.Namespace:
    """The settings of one run: `args` with what the phantom's preset has for its protocol."""
    given = {k: v for k, v in vars(args).items() if v is not None}
    preset = PHANTOM_RECIPES[protocol] if args.phantom else {}
    run = argparse.Namespace(**(vars(args) | preset | given))
    run.whole_slices = run.whole_slices and protocol == "linear-frozen"  # no other has features that stay
    return run


def lr(t: int, args: argparse.Namespace) -> float:
    """Polynomial decay from args.lr to LR_END over args.iterations (mmsegmentation's PolyLR)."""
    return (args.lr - LR_END) * (1 - t / args.iterations) ** POWER + LR_END


# ----------------------------------------------------------------------------------------------------- backbones


def choose_backbones(args: argparse.Namespace, phantom: bool) -> list[str]:
    """The names behind --backbone: runs of --out, files, imagenet or random. Raises BadInput for none."""
    prefix, seed = "phantom-" if phantom else "", seeds.seed_suffix(args.seed)
    if args.backbone != "all":
        return [backbones.resolve(args.backbone or BACKBONE + seed, args.out, phantom)]
    rows = [r for r in report.ROWS | report.BEYOND if r not in ("imagenet", "random")]
    folders = {r: args.out / f"{prefix}{r}{seed}" for r in rows}
    present = backbones.pretrained(folders.values(), args.window)
    if absent := [folders[r].name for r in rows[1:5] if not (folders[r] / backbones.CHECKPOINT).exists()]:
        print(f"not run yet, left out: {', '.join(absent)} (train_ssl.py)", file=sys.stderr)
    # beside them what they started from: ImageNet's weights, or random ones (and the run of those)
    inits = {config["init"] for config in present.values()}
    return ["imagenet" if "imagenet" in inits or not (inits or phantom) else "random", *(f.name for f in present)]


def announce_unlike(args: argparse.Namespace, names: list[str], phantom: bool, ranks: processes.Processes) -> None:
    """Say before all work which backbones are runs that have not come to their end, or saw other grey values."""
    for name in names:
        if ranks.is_main:
            origin.announce_input(name, args.out, args.window)
        if (args.out / name / "checkpoint.pt").exists():
            backbone = backbones.open_backbone(name, args.out, args.arch, args.seed, "fold", phantom)
            if backbone.unfinished and ranks.is_main:
                print(f"note: {backbone.name}: {backbone.unfinished}; it is measured as it is and marked in the tables")


# ------------------------------------------------------------------------------------------------- one iteration


class Trainer:
    """Model, optimizer and one iteration; its state is what continuing, and with config.json predicting, needs."""

    def __init__(self, args: argparse.Namespace, model: Segmenter, crops: datasets.Crops,
                 ranks: processes.Processes, amp: str):
        self.args, self.crops, self.store, self.amp = args, crops, crops.store, amp
        self.ranks, self.device = ranks, ranks.device
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.net: nn.Module = model
        if args.compile:  # its call, which is the loss; prediction, of slices of any size, calls other methods
            model.compile(dynamic=False)
        if ranks.world_size > 1:
            self.net = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model))
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = runs.sgd(trained, args.lr, MOMENTUM, WEIGHT_DECAY, amp)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self.backbone = backbones.checksum(model.backbone)  # before training
        self.cached = self.features_once() if args.whole_slices else None
        self.started = time.time()

    def step(self, t: int, pairs: list) -> torch.Tensor:
        """One optimizer step on this process's slices and labels -> its loss, a scalar on the device."""
        seeds.seed_torch(self.args.seed, seeds.DROPOUT, t, self.ranks.rank)

        # images (B, 3, S, S), or of whole slices the `features` that were computed once, of which the linear head needs
        # the last, layer4's (B, C, S/8, S/8); labels (B, S, S)
        if self.cached:
            layer4, labels = (torch.stack([self.cached[i][part] for i in pairs]) for part in (0, 1))
            images = (None, None, None, layer4)
        else:
            images, labels = self.crops.apply(t, pairs)

        # loss and gradients
        with processes.autocast(self.amp, self.device):
            loss = self.net(images, labels)
        self.scaler.scale(loss).backward()

        # update
        for group in self.optimizer.param_groups:
            group["lr"] = lr(t, self.args)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def features_once(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """{slice number: (layer4's output (C, h, w), labels)} of the split. Raises BadInput where they are too many."""
        numbers, cached = [int(i) for i in self.crops.slices], {}
        for part in (numbers[i : i + 32] for i in range(0, len(numbers), 32)):
            images, labels = self.crops.whole(part)
            with processes.autocast(self.amp, self.device):
                features = self.model.features(images.contiguous(memory_format=torch.channels_last))[3]
            needed = len(numbers) * (features[0].nbytes + labels[0].nbytes)
            if needed > processes.memory(self.device) / 2:
                raise BadInput(f"--whole-slices: the features of {len(numbers):,} slices at {self.args.crop_size} px "
                               f"take {needed / 1e9:,.0f} GB; lower --crop-size or give --no-whole-slices")
            cached |= zip(part, zip(features, labels, strict=True), strict=True)
        return cached

    def state(self, done: int) -> dict:
        """What checkpoint.pt holds after `done` iterations."""
        return {"step": done, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "amp": self.amp, "threads": torch.get_num_threads(),
                "backbone": self.backbone, "wall_s": time.time() - self.started}

    def load(self, state: dict) -> int:
        """Go on from a checkpoint; returns its step."""
        self.model.load_state_dict(state["model"])
        runs.load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.backbone, self.started = state["backbone"], time.time() - state["wall_s"]
        return state["step"]


# ------------------------------------------------------------------------------------------------------- the loop


def train(trainer: Trainer, run: runs.Run, first: int) -> None:
    """Iterations `first` to the last, with log, checkpoints and validation curve; a stop request saves and exits."""
    args, crops, ranks, title = trainer.args, trainer.crops, trainer.ranks, run.folder.name
    bar = tqdm(desc=title, total=args.iterations, initial=first, unit="it", disable=None if ranks.is_main else True)
    kept = next(iter(trainer.cached.values()))[0] if trainer.cached else None
    operations = pace.operations(trainer.model, pace.iteration_of(args.crop_size, kept))
    pending, speed = [], pace.Pace(operations, args.batch_size, ranks, trainer.amp, first, args.iterations)
    with StopRequest() as stop:
        if 0 < first < args.iterations and first % args.eval_every == 0:  # stopped between checkpoint and validation?
            processes.on_main(ranks.is_main, functools.partial(evaluate.validate, trainer, run, first, stop))
        for t, pairs in datasets.prefetch(crops.fetch, range(first, args.iterations), args.workers):
            pending.append(trainer.step(t, pairs))
            if t == first:  # it compiles, and on a GPU tries the convolutions: no measure of those to come
                took = speed.restart(t + 1)
                if args.compile and ranks.is_main:
                    tqdm.write(f"{title}: compiled in {duration(took)}")
            stopping, done = ranks.any(stop.signal != 0), t + 1
            due = done % args.eval_every == 0 or done == args.iterations
            if log_due := len(pending) == LOG_INTERVAL or due or stopping:
                losses = processes.mean_over_processes(torch.stack(pending), ranks).tolist()  # waits for the device
                times = speed.read(done)
                records = [{"step": step, "loss": loss, "lr": lr(step - 1, args), **times}
                           for step, loss in enumerate(losses, done - len(losses) + 1)]
                runs.refuse_non_finite(records, lambda step: [trainer.store.where(*trainer.store.place(i))
                                                              for i in crops.indices(step - 1)], run)
                run.log(records)
                text = f"loss {records[-1]['loss']:.3f}, {pace.words(times)}"
                bar.set_postfix_str(text)
                bar.update(len(records))
                pending = []
                if ranks.is_main and done == first + LOG_INTERVAL < args.iterations:
                    tqdm.write(f"{title}: {text}, about {duration(times['seconds_left'])} to go")
            # before the validation, which may take longer than a scheduler waits
            if due or stopping or (log_due and ranks.any(run.overdue(args.checkpoint_minutes))):
                run.checkpoint(trainer.state(done))
            if due and done < args.iterations and not stopping:
                processes.on_main(ranks.is_main, functools.partial(evaluate.validate, trainer, run, done, stop))
                stopping = ranks.any(stop.signal != 0)
            if due:
                speed.go_on()
            if stopping and done < args.iterations:
                raise SystemExit(stop.exit_code)
    bar.close()


# --------------------------------------------------------------------------------------------------------- a run


def measure(args: argparse.Namespace, name: str, protocol: str, draw: int, store: datasets.Store,
            ranks: processes.Processes) -> str:
    """One backbone, protocol, split and random subset (draw), to its result; returns what the backbone is called."""
    args = recipe(args, protocol)
    whitening = "fold" if protocol == "linear-frozen" else args.whitening
    # before the run folder: a backbone that does not fit leaves nothing behind
    backbone = backbones.open_backbone(name, args.out, args.arch, args.seed, whitening, store.is_phantom,
                                       args.row)
    seed = seeds.seed_suffix(args.seed)  # a run of this seed has it in its name already
    title = f"{backbone.name.removesuffix(seed)}{seed}-{protocol}-{args.split}-{draw}"
    if store.task.recorded:  # not BTCV's organs
        title += f"-{store.task.prefix}"
    folder = args.out / "seg" / title
    config = configure(args, backbone, protocol, draw, store)
    run = runs.Run(folder, config, args.overwrite, ranks.is_main)
    # main decides for all: another machine's view of a shared folder may be seconds old
    if processes.on_main(ranks.is_main, (folder / "result.json").exists):
        if ranks.is_main:
            result = runs.read_json(folder / "result.json", "mDS", remedy="delete it, and this run is measured again")
            print(f"{title}: done before, mDS {100 * result['mDS']:.2f} %")
            if args.save_predictions:
                predict.files(dict(evaluate.validation_files(store).values()), folder, args.amp, ranks.device)
        return backbone.name
    saved = run.resume()
    amp = processes.precision(args.amp if not saved or args.amp != "auto" else saved["amp"], ranks.device)
    runs.announce_changes(saved, amp, ranks)
    crops = datasets.Crops(args, store, store.of(config["cases"]), ranks)
    trainer = Trainer(args, Segmenter(backbone.net, protocol, len(store.task.organs)), crops, ranks, amp)
    first = trainer.load(saved) if saved else 0
    curve = folder / "validation.jsonl"
    if ranks.is_main and curve.exists():  # as the log: cut back to the checkpoint
        records = [r for r in runs.read_log(curve) if r["step"] <= min(first, args.iterations - 1)]
        runs.write_text(curve, "".join(json.dumps(r) + "\n" for r in records))
    train(trainer, run, first)
    made = {"pretraining": backbone.made, "leaks": leaks.find(store, config["cases"], name, args.out)}
    processes.on_main(ranks.is_main, lambda: evaluate.finish(trainer, run, config | made))
    return backbone.name


def configure(args: argparse.Namespace, backbone: backbones.Backbone, protocol: str, draw: int,
              store: datasets.Store) -> dict:
    """What decides a run's result, and what its model is: config.json."""
    task = store.task
    sums = [hashlib.sha256(task.file(*split).read_bytes()).hexdigest() for split in ((args.split, draw), ("val",))]
    return {"backbone": backbone.name, "arch": backbone.arch, "pretraining": backbone.pretraining,
            "protocol": protocol, "split": args.split, "draw": draw,
            "whitening": "fold" if protocol == "linear-frozen" else args.whitening, "iterations": args.iterations,
            "crop_size": args.crop_size, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed,
            "whole_slices": args.whole_slices, "window": list(args.window),
            "data": store.name, "slices": len(store),
            "cases": task.cases(args.split, draw),
            "store": store.contents({*task.cases(args.split, draw), *task.cases("val")}),
            "split_sha256": sums[0], "validation_sha256": sums[1], **task.recorded,
            **({} if args.whole_slices else {"flip": args.flip})}


def introduce(args: argparse.Namespace, titles: list[str], store: datasets.Store, ranks: processes.Processes) -> None:
    """Say what will be run, on what, and the memory that its classes take."""
    if store.is_phantom:
        origin.announce_phantom(store)
    recipes = [recipe(args, protocol) for protocol in args.protocols]
    iterations = dict.fromkeys(f"{r.iterations:,}" for r in recipes)
    crops = "crops" if args.flip else "unmirrored crops"
    shown = dict.fromkeys("whole slices" if r.whole_slices else crops for r in recipes)
    planned = counted(len(titles) * len(args.protocols) * len(args.draws), "run")
    subsets = f"{counted(len(args.draws), 'random subset')} of " * (args.split != "100")
    print(f"{planned}: {', '.join(titles)} x {', '.join(args.protocols)} x {subsets}{args.split} % of the training "
          f"volumes, {'/'.join(iterations)} iterations of {args.batch_size} {'/'.join(shown)} of {args.crop_size} px "
          f"each, in {args.out / 'seg'}; {processes.hardware()}")
    classes, crops = len(store.task.organs), args.batch_size // ranks.world_size
    needed = max(loss_bytes(p, crops, classes, args.crop_size) for p in args.protocols)
    print(f"{counted(classes - 1, 'class')} and background: logits and loss take "
          f"{needed / 1e6:,.0f} MB of the device's memory")


@launch.command
def main(argv: list[str] | None = None) -> None:
    """The report, predictions, or all runs that the flags name and their table."""
    args = parse(argv)
    if args.report:  # of several processes one is enough, and it alone writes
        return report.write_report(args.out) if processes.launched()[0] == 0 else None
    if args.predict or args.run or args.predict_out:
        if not (args.predict and args.run):
            raise BadInput("--predict VOLUME_OR_FOLDER and --run RUN: give both")
        paths, skipped = predict.find_volumes(args.predict, args.images)
        folder, ranks = predict.find_run(args.run, args.out), processes.start(args.deterministic)
        if ranks.is_main:
            predict.files(paths, folder, args.amp, ranks.device, args.predict_out, skipped)
        return
    data, phantom = intake.locate(args.data, "BTCV")
    resolve_defaults(args, phantom)
    backbones.architecture(args.arch)
    names = choose_backbones(args, phantom)
    titles = [backbones.title_of(name, args.row) for name in names]
    store, ranks, remarks = datasets.open_labelled(args, data)
    for split in [(args.split, d) for d in args.draws] + [("val",)]:
        store.of(store.task.cases(*split))
    if ranks.world_size > 1 and ranks.device.type == "cpu":
        raise BadInput("segmentation on several processes needs GPUs (synchronised batch statistics); "
                       "run python train_seg.py as one process")
    if args.batch_size % ranks.world_size:
        raise BadInput(f"--batch-size {args.batch_size}: must be a multiple of {ranks.world_size} processes")
    if ranks.is_main:
        introduce(args, titles, store, ranks)
        trained = {case for draw in args.draws for case in store.task.cases(args.split, draw)}
        remarks += [line for name in names for line in leaks.lines(leaks.find(store, trained, name, args.out), name)]
        for line in dict.fromkeys(remarks):
            print(line)
    announce_unlike(args, names, phantom, ranks)
    measured = {measure(args, name, protocol, draw, store, ranks)
                for name in names for draw in args.draws for protocol in args.protocols}
    if ranks.is_main:
        report.conclude(args.out, args.split, measured, {"data": store.name, "slices": len(store)})


if __name__ == "__main__":
    main()
