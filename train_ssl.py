"""Pre-train a ResNet on CT slices: MoCo v2, with the paper's local loss (--local) and ZCA whitening (--zca).

    python train_ssl.py --local --zca                                  the paper's method, one GPU or the CPU
    python train_ssl.py --local --zca --geometric                      beyond it: crops and flips kept, cells aligned
    torchrun --nproc-per-node 8 train_ssl.py --local --zca             eight GPUs, the same result
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train_ssl.py --local --zca
    python train_ssl.py --data my_ct --name mine                       plain MoCo v2 on a folder of NIfTI volumes

The same command again continues a run that stopped. Every random number of step t comes from (seed, purpose, t)
for the whole global batch, so a run does not depend on the number of processes or on where it was interrupted.
"""

import argparse
import contextlib
import inspect
import math
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))  # which PYTHONSAFEPATH leaves out
    import ct
    ct.importing()

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import augment
import datasets
from ct import audit, intake, prepare, stores
from ct.command import number, whole
from ct.volumes import BadInput
from engine import backbones, figures, launch, leaks, monitor, origin, passes, probe, processes, recipes, runs, seeds
from engine.recipes import LR, PAPER, PHANTOM, START
from engine.signals import StopRequest
from local_loss import CELLS
from moco import MoCo
from views import resize
from whitening import whiten_last_norm

# ------------------------------------------------------------------------------------------------------ settings

MOMENTUM, DIM = 0.9, 128  # mmselfsup's mocov2_resnet50_8xb32-coslr-200e, as the weight decay
# flags that change no number but by rounding, and what is noted beside them: in no config
NOT_IN_CONFIG = ("steps", "out", "name", "overwrite", "workers", "store", "data", "compile", "amp", "deterministic",
                 "checkpoint_minutes", "groups_per_pass", "probe", "images")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; what it leaves to the data is None until `resolve_defaults`."""
    parser = launch.Parser(prog="train_ssl.py", description=__doc__.split("\n\n")[0],
                           epilog="Defaults are the paper's; in brackets the preset of the built-in phantom.")
    parser.common("AbdomenCT-1K")
    prepare.images_flag(parser)
    parser.set_defaults(window=None)  # a recipe has its own
    add = parser.with_defaults(PAPER, PHANTOM | {"init": "phantom-start, trained first"})
    add("--local", action="store_true", help="local loss on the first stage's feature map, Eq. 2")
    add("--zca", action="store_true", help="ZCA whitening in place of the backbone's last BN, Eq. 5")
    add("--geometric", action=argparse.BooleanOptionalAction,
        help="crop and flip augmentation (default: on without --local, off with it; if you give both, Eq. 2 compares "
        "what both crops show, which goes beyond the paper)")
    add("--recipe", choices=("paper", "author"), default="paper", help="whose settings to take where you give no "
        "flag: the paper's, or those of the first author's published code (docs/decisions.md)")
    add("--arch", help="any torchvision resnet")
    add("--init", help="initial checkpoint: imagenet, random, a RUN of --out or a FILE")
    add("--name", help="name of the run (default [author-]moco[-local][-zca][-nogeo|-aligned][-everyN][-seedN])")
    add("--overwrite", action="store_true", help="start over if a run of this name exists")
    add("--size", type=whole(1), help="pixels of a stored slice's side")
    add("--image-size", type=whole(1), help="pixels of a view's side")
    add("--batch-size", type=whole(1), help="slices a step, over all processes")
    add("--bn-group", type=whole(1), help="size of a micro-batch (ghost batch): the slices that share "
        "batch statistics, as those on one GPU do")
    add("--every", type=whole(1), default=1, metavar="N", help="train on each N-th slice of a volume")
    add("--epochs", type=whole(1), help="epochs in all, over which the learning rate falls to 0")
    add("--steps", type=whole(0), help="total steps after which to stop (default: all epochs)")
    add("--lr", type=number(above=0), help="learning rate of the first step; a value of yours is not scaled "
        f"by the batch ({LR} x batch / 256)")
    add("--weight-decay", type=number(0), help="weight decay of SGD, on all parameters")
    add("--queue", type=whole(1), help="keys in the queue, a multiple of the batch")
    add("--ema", type=number(0, 1), help="momentum of the key encoder")
    add("--temperature", type=number(above=0), default=PAPER["temperature"], help="temperature of Eq. 1")
    add("--temperature-local", type=number(above=0), default=PAPER["temperature_local"], help="temperature of Eq. 2")
    add("--lambda-local", type=number(0), default=PAPER["lambda_local"], help="weight of the local loss, Eq. 3")
    add("--patches", type=whole(1), default=PAPER["patches"], help="patches per image, K of Eq. 2")
    add("--zca-group", type=whole(0), help="channels that are whitened together; 0: all")
    add("--zca-iterations", type=whole(1), default=PAPER["zca_iterations"], help="steps T of Newton's iteration")
    add("--groups-per-pass", type=whole(1), metavar="N", help="micro-batches in one pass; more need more memory, "
        "and results differ by rounding only (default: on a GPU as many as fit)")
    add("--probe", type=Path, metavar="FOLDER", help="labelled CT, in any layout that train_seg.py reads: once an "
        "epoch, the Dice of a linear map from frozen features to its organs; takes seconds, does not change the run")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile a pass with torch.compile (default: on a "
        f"GPU, if at least {passes.COMPILED_FROM:,} steps are to come; compiling took two to four minutes)")
    return parser.parse_args(argv)


def resolve_defaults(args: argparse.Namespace, phantom: bool) -> None:
    """Fill the defaults of the paper or of the phantom, and refuse what cannot work. Raises BadInput."""
    defaults, author = PHANTOM if phantom else PAPER, args.recipe == "author"
    launch.fill(args, recipes.author(args, defaults, phantom) if author else defaults)
    if args.geometric is None:
        args.geometric = author or not args.local
    args.lr = LR * args.batch_size / 256 if args.lr is None else args.lr
    if args.local and args.patches > CELLS**2:
        raise BadInput(f"--patches {args.patches}: a feature map has {CELLS**2} non-overlapping cells")
    if args.image_size < 32 or (args.local and args.image_size < 4 * CELLS):
        raise BadInput(f"--image-size {args.image_size}: too small for a ResNet of stride 32; give 32 or more")
    if args.queue % args.batch_size:
        raise BadInput(f"--queue {args.queue}: must be a multiple of --batch-size {args.batch_size}")
    args.init = args.init or recipes.start_of(args)
    args.name = recipes.name_of(args, phantom) if args.name is None else args.name
    backbones.fit_name("--name", args.name, "", "seg")


# --------------------------------------------------------------------------------------------- model and one step

# The step ends with buffers that are equal everywhere: DDP need not send rank 0's before each forward.
NO_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(
    DistributedDataParallel.__init__).parameters else "broadcast_buffers"  # deprecated since torch 2.13


def open_start(args: argparse.Namespace, phantom: bool) -> backbones.Backbone:
    """What --init names, with all that is known of it. Raises BadInput, where it has not the run's architecture too."""
    start = backbones.open_backbone(args.init, args.out, args.arch, args.seed, "fold", phantom)
    refuse_other(args, start.arch)
    return start


def refuse_other(args: argparse.Namespace, arch: str) -> None:
    """Raise BadInput where the initial checkpoint's architecture is not the run's."""
    if arch != args.arch:
        raise BadInput(f"--init {args.init}: is a {arch}; give --arch {arch} or another --init")


def build(args: argparse.Namespace, phantom: bool = False, start: backbones.Backbone | None = None) -> MoCo:
    """The two encoders from `start`, by default what --init names, whitened with --zca. Raises BadInput.

    The projector and the queue are drawn from where `open_start` left torch's generator: call one behind the other.
    """
    backbone = (start or open_start(args, phantom)).net
    if args.zca:
        width = backbone.fc.in_features
        args.zca_group = args.zca_group or width
        if width % args.zca_group:
            raise BadInput(f"--zca-group {args.zca_group}: must divide the {width} channels of {args.arch}")
        whiten_last_norm(backbone, args.recipe == "author", group_size=args.zca_group, iterations=args.zca_iterations)
    return MoCo(backbone, DIM, args.queue, args.bn_group, args.ema, args.temperature, args.local,
                args.temperature_local, args.lambda_local)


class Trainer:
    """Model, optimizer and one step."""

    def __init__(self, args: argparse.Namespace, moco: MoCo, batches: datasets.Batches, ranks: processes.Processes,
                 amp: str):
        self.args, self.batches, self.device, self.amp = args, batches, ranks.device, amp
        self.moco = moco.to(self.device, memory_format=torch.channels_last)
        self.moco.groups_per_pass = args.groups_per_pass or passes.choose(self.moco, batches, amp, ranks)
        if args.compile:  # a pass is one graph; looks at held-out slices, one an epoch, are not worth their own
            self.moco.compile(dynamic=False)
            self.moco.encode_keys = torch.compile(self.moco.encode_keys, dynamic=False)
        self.model: nn.Module = self.moco
        self.no_sync = contextlib.nullcontext
        if ranks.world_size > 1:
            self.model = DistributedDataParallel(self.moco, gradient_as_bucket_view=True, **{NO_BUFFERS: False})
            self.no_sync = self.model.no_sync
        self.trained = [p for p in self.moco.parameters() if p.requires_grad]
        self.optimizer = runs.sgd(self.trained, args.lr, MOMENTUM, args.weight_decay, amp)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self.skipped = 0  # steps that fp16's scaler left out
        self.gap = None  # similarity margin of the last look at the held-out slices
        self.probe = None  # --probe: see `probe.begin`
        self.horizon = args.epochs * batches.steps_per_epoch  # total steps, wherever --steps ends this run

    def lr(self, t: int) -> float:
        """Cosine from --lr to 0 over the total steps; the first author's recipe has a schedule of its own."""
        if self.args.recipe == "author":
            return self.args.lr * recipes.author_schedule(t, self.horizon)
        return self.args.lr * 0.5 * (1 + math.cos(math.pi * t / self.horizon))

    def step(self, t: int, slices: Tensor) -> Tensor:
        """One optimizer step on this process's slices (B, H, W) uint8 -> its mean stats, (7,): monitor.STATS."""
        moco, batches = self.moco, self.batches

        # views: two of each slice, one grey channel (B, 1, S, S), and which of the 49 cells are its patches (B, K)
        slices = slices.to(self.device, non_blocking=True)
        view_q, view_k = augment.pair(slices, batches.views(t, seeds.VIEW_Q), batches.views(t, seeds.VIEW_K),
                                      batches.view_px)
        permutation = resize.to_device(batches.permutation(t), self.device)  # (N,), of the global batch
        patch_idx = resize.to_device(batches.patch_idx(t), self.device) if moco.local else None
        parts_k, parts_q = batches.common_parts(t) if batches.aligned else (None, None)

        # keys (B, dim) and their first-stage cells (B, 49, C), by the key encoder after its own small step
        moco.update_key_encoder()
        with processes.autocast(self.amp, self.device):
            keys, cells = moco.keys(view_k, permutation, parts_k)

        # query encoder, pass by pass: gradients add up, and processes exchange them once, with the last pass
        stats = 0
        for part in moco.passes(moco.encoder_q, len(slices)):
            share = (part.stop - part.start) / len(slices)
            exchange_later = self.no_sync if part.stop < len(slices) else contextlib.nullcontext
            with exchange_later():
                with processes.autocast(self.amp, self.device):
                    loss_global, loss_local = self.model(
                        view_q[part], keys[part], cells[part] if moco.local else None,
                        patch_idx[part] if moco.local else None, parts_q and tuple(x[part] for x in parts_q))
                loss = moco.total(loss_global, loss_local)  # Eq. 3
                self.scaler.scale(loss * share).backward()
            stats += share * torch.stack([loss, loss_global, loss_local, *moco.query_stats]).detach()

        # update
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.lr(t)
        self.scaler.unscale_(self.optimizer)
        norm = runs.gradient_norm(self.trained)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

        # enqueue
        moco.enqueue(keys)
        return torch.cat([stats, norm[None]])

    def state(self, step: int) -> dict:
        """What checkpoint.pt holds after so many steps: all that continuing, and opening the backbone, need."""
        return {"step": step, "model": self.moco.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "skipped": self.skipped, "gap": self.gap, "amp": self.amp,
                "threads": torch.get_num_threads(), "groups_per_pass": self.moco.groups_per_pass,
                "arch": self.args.arch, "horizon": self.horizon,
                "view_px": self.batches.view_px, "slice_px": self.batches.slice_px,
                "zca": [self.args.zca_group, self.args.zca_iterations] if self.args.zca else []}

    def load(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self.moco.load_state_dict(state["model"])
        runs.load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped, self.gap = state["skipped"], state["gap"]


# ------------------------------------------------------------------------------------------------------- the loop


def train(trainer: Trainer, store: datasets.Store, run: runs.Run, ranks: processes.Processes, first: int, last: int
          ) -> None:
    """Steps `first` to `last`, with log, looks for collapse and checkpoints; a stop request saves and exits."""
    args, batches = trainer.args, trainer.batches
    logger = monitor.MetricLogger(trainer, store, run, ranks, first, last)

    def fetch(t: int) -> Tensor:
        """This process's slices of step t, (B, H, W) uint8."""
        return resize.pinned(torch.from_numpy(store.batch(batches.indices(t)[batches.rank_slice])), ranks.device)

    asked = time.perf_counter()
    with StopRequest() as stop:
        ahead = datasets.prefetch(fetch, range(first, last), args.workers)
        for t, slices in datasets.on_device(ahead, ranks.device):
            waited = time.perf_counter() - asked
            logger.add(trainer.step(t, slices), waited)
            if t == first and args.compile:
                logger.compiled()
            stopping, done = ranks.any(stop.signal != 0), t + 1
            look = done % batches.steps_per_epoch == 0 or done in (monitor.judged_from(trainer), last)
            if log_due := len(logger.pending) == monitor.LOG_INTERVAL or look or stopping:
                logger.flush(done, say=look or stopping, look=look)
            if stopping or done == last or (log_due and ranks.any(run.overdue(args.checkpoint_minutes))):
                run.checkpoint(trainer.state(done))
            if stopping and done < last:
                if ranks.is_main:
                    print(f"stopped after step {done}; the same command continues", file=sys.stderr)
                raise SystemExit(stop.exit_code)
            asked = time.perf_counter()
    logger.bar.close()


# --------------------------------------------------------------------------------------------------------- a run


def pretrain(args: argparse.Namespace, start: backbones.Backbone, moco: MoCo, store: datasets.Store,
             ranks: processes.Processes, labelled: datasets.Store | None = None) -> None:
    """One run, from its first step or its checkpoint to backbone.pth; `labelled`: of --probe. Raises BadInput."""
    batches = batches_of(args, store, ranks)
    run = runs.Run(args.out / args.name, configure(args, start, store), args.overwrite, ranks.is_main)
    processes.on_main(ranks.is_main, lambda: leaks.keep(run.folder, store, start.source, args.out))
    saved = run.resume()
    amp = processes.precision(args.amp if not saved or args.amp != "auto" else saved["amp"], ranks.device)
    runs.announce_changes(saved, amp, ranks)
    horizon, first = args.epochs * batches.steps_per_epoch, saved["step"] if saved else 0
    last = horizon if args.steps is None else min(horizon, args.steps)
    if args.compile is None:
        args.compile = passes.worth_compiling(last - first, ranks.device, args.deterministic)
    trainer = Trainer(args, moco, batches, ranks, amp)
    trainer.probe = probe.begin(trainer, store, labelled, ranks)  # before a checkpoint: of the weights at the start
    if saved:
        trainer.load(saved)
        passes.keep(moco, batches, args.groups_per_pass, saved, ranks)
    if ranks.is_main:
        monitor.introduce(trainer, start, store, ranks, first, last)
    if first < last:
        train(trainer, store, run, ranks, first, last)
    if ranks.is_main:
        runs.save(backbones.export(trainer.moco.encoder_q.backbone), run.folder / "backbone.pth")
        print(f"{run.folder / 'backbone.pth'}: the backbone, whitening folded, under torchvision's names")
        log = runs.read_log(run.folder / "log.jsonl")
        for line in probe.summary(log):
            print(line)
        figures.attempt(figures.curves, run.folder / "curves.png", log, math.log(1 + args.queue),
                        math.log(args.patches))


def batches_of(args: argparse.Namespace, store: datasets.Store, ranks: processes.Processes) -> datasets.Batches:
    """What a run's steps are made of. Raises BadInput where the slices or the groups are not enough for one."""
    passes.check_groups(args.batch_size, args.bn_group, ranks.world_size)
    slices = store.of(every=args.every)
    batches = datasets.Batches(args, slices, ranks)
    if not batches.steps_per_epoch:
        raise BadInput(f"{store.data}: {len(slices)} slices are fewer than one batch of {args.batch_size} besides "
                       f"{len(batches.held_out)} held-out ones; lower --batch-size" + " or --every" * (args.every > 1))
    return batches


def configure(args: argparse.Namespace, start: backbones.Backbone, store: datasets.Store) -> dict:
    """What decides a run's result: config.json."""
    config = {k: v for k, v in vars(args).items() if k not in NOT_IN_CONFIG}
    config |= {"init": start.source, "init_checksum": start.pretraining["checksum"]}
    if start.pretraining["step"] is not None:  # a run: its settings are part of this one's
        config["start"] = start.config | {key: start.pretraining[key] for key in ("step", "horizon")}
    return config | {"data": store.name, "volumes": len(store.volumes), "slices": len(store),
                     "store": store.contents(), "normalisation": origin.NORMALISATION}


def slices_of(args: argparse.Namespace, data: Path) -> datasets.Store:
    """The slices of a folder of CT volumes at the run's size and window, prepared where missing. Raises BadInput."""
    return datasets.prepare(data, args.store or stores.default_store(data), "pretrain", tuple(args.window), args.size,
                            args.workers, images=args.images)


def begin(args: argparse.Namespace, store: datasets.Store, data: Path, ranks: processes.Processes,
          labelled: datasets.Store | None, given: str | None) -> None:
    """Train the phantom's initial checkpoint where it is missing: by its own settings, whichever method comes first.

    Raises BadInput where one is there that was made otherwise, unless --init names it, and before the training for what
    the method would be refused for after it.
    """
    kept = {k: v for k, v in vars(args).items() if k in NOT_IN_CONFIG}
    own = argparse.Namespace(**vars(parse([])) | kept | PHANTOM | START | dict(name=args.init, seed=args.seed))
    same = (tuple(own.window), own.size) == (tuple(args.window), args.size)
    slices, folder = store if same else slices_of(own, data), args.out / args.init
    if not processes.on_main(ranks.is_main, (folder / "backbone.pth").exists):
        refuse_other(args, own.arch)
        batches_of(args, store, ranks)
        start = open_start(own, True)
        return pretrain(own, start, build(own, True, start), slices, ranks, labelled)

    def compare() -> None:
        if other := runs.differences(folder, configure(own, open_start(own, True), slices)):
            raise BadInput(f"{folder}: was made with other settings ({other}); delete it, and it is trained again, or "
                           f"give --init {args.init} to start from it as it is")

    if given is None:
        processes.on_main(ranks.is_main, compare)


@launch.command
def main(argv: list[str] | None = None) -> None:
    """Slices, then the run; on the phantom its start first, where that is missing."""
    args = parse(argv)
    if args.steps == 0:
        print("--steps 0: nothing to do")
        return
    data, phantom = intake.locate(args.data, "AbdomenCT-1K")
    given = args.init
    resolve_defaults(args, phantom)
    # what is refused is refused before the slices are prepared, which takes long
    own_start = phantom and args.init == recipes.start_of(args)
    # in place of an initial checkpoint that may not be there yet, random weights
    now = argparse.Namespace(**vars(args) | {"init": "random"}) if own_start else args
    start = open_start(now, phantom)
    moco = build(now, phantom, start)
    store = slices_of(args, data)
    labelled = args.probe and datasets.prepare(args.probe, stores.default_store(args.probe), "segment",
                                               tuple(args.window), workers=args.workers)
    ranks = processes.start(args.deterministic)
    if ranks.is_main:
        see = audit.command_line(data, "pretrain", images=args.images)
        for line in audit.remarks(store.volumes, store.skipped, see=see):
            print(line)
    if own_start:
        begin(args, store, data, ranks, labelled, given)
        start = open_start(args, phantom)
        moco = build(args, phantom, start)
    pretrain(args, start, moco, store, ranks, labelled)


if __name__ == "__main__":
    main()
