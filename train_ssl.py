"""Pre-train a ResNet on CT slices: MoCo v2, with the paper's local loss (--local) and ZCA whitening (--zca).

    torchrun train_ssl.py --local --zca                                the paper's method, one GPU or the CPU
    torchrun --nproc-per-node 8 train_ssl.py --local --zca             eight GPUs, the same result
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train_ssl.py --local --zca
    python train_ssl.py --data my_ct --name mine                       plain MoCo v2 on a folder of NIfTI volumes

The same command again continues a run that stopped. Every random number of step t comes from (seed, purpose, t)
for the whole global batch, so a run does not depend on the number of processes or on where it was interrupted.
"""

import argparse
import contextlib
import math
import sys
import time
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import augment
import datasets
import figures
import metrics
import runtime
from local_loss import CELLS
from moco import GroupStatistics, MoCo
from runtime import BadInput
from whitening import whiten_last_norm

MOMENTUM, WEIGHT_DECAY, DIM = 0.9, 1e-4, 128  # mmselfsup's mocov2_resnet50_8xb32-coslr-200e
PAPER = dict(arch="resnet50", init="imagenet", image_size=224, batch_size=256, bn_group=32, epochs=200, lr=None,
             queue=65536, ema=0.999, zca_group=64, size=datasets.SIZE)
PHANTOM = dict(arch="resnet18", init="random", image_size=128, batch_size=64, bn_group=16, epochs=3, lr=0.03,
               queue=1024, ema=0.99, zca_group=32, size=192)
HELD_OUT = 128  # slices (an eighth of a small data set) on which the signs of collapse are looked at: never trained on
FLUSH = 10  # steps between two looks at the losses; each look waits for the device


def parse(argv: list[str] | None):
    parser = runtime.Parser(prog="train_ssl.py", description=__doc__.split("\n\n")[0],
                            epilog="Defaults are the paper's; in brackets the preset of the built-in phantom.")
    parser.common()
    add = parser.add_argument
    add("--local", action="store_true", help="local loss on the first stage's feature map, Eq. 2 (no geometry)")
    add("--zca", action="store_true", help="ZCA whitening in place of the backbone's last BN, Eq. 5")
    add("--geometric", action=argparse.BooleanOptionalAction, help="crops and flips (default: unless --local)")
    add("--arch", help="any torchvision resnet (resnet50) [resnet18]")
    add("--init", help="imagenet, random or a FILE of weights (imagenet) [random]")
    add("--name", help="of the run (default moco[-local][-zca])")
    add("--overwrite", action="store_true", help="start over where a run of this name exists")
    add("--size", type=int, help="pixels of a stored slice's side (512) [192]")
    add("--image-size", type=int, help="pixels of a view's side (224) [128]")
    add("--batch-size", type=int, help="slices a step, over all processes (256) [64]")
    add("--bn-group", type=int, help="slices that share batch statistics (32) [16]")
    add("--epochs", type=int, help="horizon of the schedule (200) [3]")
    add("--steps", type=int, help="stop after so many optimizer steps in all (default: all epochs)")
    add("--lr", type=float, help="learning rate as it is (0.03 x batch / 256) [0.03]")
    add("--queue", type=int, help="keys kept, a multiple of the batch (65536) [1024]")
    add("--ema", type=float, help="momentum of the key encoder (0.999) [0.99]")
    add("--temperature", type=float, default=0.2, help="of Eq. 1")
    add("--temperature-local", type=float, default=0.2, help="of Eq. 2")
    add("--lambda-local", type=float, default=1.0, help="weight of the local loss, Eq. 3")
    add("--patches", type=int, default=20, help="K of Eq. 2")
    add("--zca-group", type=int, help="channels whitened together (64) [32]")
    add("--zca-iterations", type=int, default=5, help="T of Newton's iteration")
    add("--compile", action="store_true", help="torch.compile the encoders")
    return parser.parse_args(argv)


def settle(args, phantom: bool) -> None:
    """Fill the defaults of the paper or of the phantom, and refuse what cannot work."""
    for key, value in (PHANTOM if phantom else PAPER).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    if args.geometric is None:
        args.geometric = not args.local
    if args.local and args.geometric:
        raise BadInput("--local with --geometric: locations of the two views would no longer correspond; drop one")
    args.lr = 0.03 * args.batch_size / 256 if args.lr is None else args.lr
    for key in ("size", "image_size", "batch_size", "bn_group", "epochs", "queue", "patches", "zca_group",
                "zca_iterations"):
        if getattr(args, key) < 1:
            raise BadInput(f"--{key.replace('_', '-')} {getattr(args, key)}: must be at least 1")
    if args.local and args.patches > CELLS**2:
        raise BadInput(f"--patches {args.patches}: a feature map has {CELLS**2} non-overlapping cells")
    if args.image_size < 32 or (args.local and args.image_size < 4 * CELLS):
        raise BadInput(f"--image-size {args.image_size}: too small for a ResNet of stride 32; give 32 or more")
    if args.queue % args.batch_size:
        raise BadInput(f"--queue {args.queue}: must be a multiple of --batch-size {args.batch_size}")
    if args.name is None:
        control = "-nogeo" if not args.geometric and not args.local else ""
        args.name = "moco" + "-local" * args.local + "-zca" * args.zca + control
        args.name = "phantom-" * phantom + args.name


def check_groups(args, world: int) -> None:
    if args.batch_size % (world * args.bn_group):
        raise BadInput(f"--batch-size {args.batch_size}: must be a multiple of {world} processes x --bn-group "
                       f"{args.bn_group} = {world * args.bn_group}")
    if args.batch_size == args.bn_group:
        warnings.warn("one group only: shuffling keys then does nothing and the model can cheat through its batch "
                      "statistics; lower --bn-group or raise --batch-size", stacklevel=2)


def build(args) -> MoCo:
    runtime.seed_torch(args.seed, runtime.INIT)
    backbone = runtime.build_backbone(args.init, args.arch)
    if args.zca:
        width = backbone.fc.in_features
        if width % args.zca_group:
            raise BadInput(f"--zca-group {args.zca_group}: must divide the {width} channels of {args.arch}")
        whiten_last_norm(backbone, group_size=args.zca_group, iterations=args.zca_iterations)
    return MoCo(backbone, DIM, args.queue, args.bn_group, args.ema, args.temperature, args.local,
                args.temperature_local, args.lambda_local)


class Batches:
    """Which slices, views, shuffle and patches step t has: a function of (seed, t) alone.

    Of the store's slices, `held_out` are kept apart; the others are trained on.
    """

    def __init__(self, args, slices: int, processes: runtime.Processes):
        drawn = runtime.rng(args.seed, runtime.SIGNS).permutation(slices)
        self.held_out, self.trained = np.split(drawn, [min(HELD_OUT, max(2, slices // 8))])
        self.args, self.steps_per_epoch = args, len(self.trained) // args.batch_size
        share = args.batch_size // processes.world
        self.local = slice(processes.rank * share, (processes.rank + 1) * share)
        self.epoch, self.order = -1, None

    def indices(self, t: int) -> np.ndarray:
        """Slice numbers of step t's global batch: an epoch is a shuffled pass without its last partial batch."""
        epoch, position = divmod(t, self.steps_per_epoch)
        order = self.order if epoch == self.epoch else runtime.rng(self.args.seed, runtime.SLICES,
                                                                   epoch).permutation(self.trained)
        self.epoch, self.order = epoch, order
        return order[position * self.args.batch_size :][: self.args.batch_size]

    def views(self, t: int, purpose: int) -> dict[str, np.ndarray]:
        drawn = augment.draw(runtime.rng(self.args.seed, purpose, t), self.args.batch_size, self.args.geometric)
        return {k: v[self.local] for k, v in drawn.items()}

    def permutation(self, t: int) -> torch.Tensor:
        return torch.from_numpy(runtime.rng(self.args.seed, runtime.SHUFFLE, t).permutation(self.args.batch_size))

    def patches(self, t: int) -> torch.Tensor:
        """(B, K): K of the 49 cells per image, without replacement."""
        draw = runtime.rng(self.args.seed, runtime.PATCHES, t).random((self.args.batch_size, CELLS**2))
        return torch.from_numpy(draw.argsort(1)[self.local, : self.args.patches].copy())


class Trainer:
    """Model, optimizer and one step."""

    def __init__(self, args, moco: MoCo, batches: Batches, processes: runtime.Processes, amp: str):
        self.args, self.batches, self.device, self.amp = args, batches, processes.device, amp
        self.moco = moco.to(self.device, memory_format=torch.channels_last)
        if args.compile:
            self.moco.encoder_q.compile()
            self.moco.encoder_k.compile()
        self.model: nn.Module = self.moco
        if processes.world > 1:
            self.model = DistributedDataParallel(self.moco, broadcast_buffers=False)
        self.statistics = GroupStatistics(self.moco.encoder_q)
        self.trained = [p for p in self.moco.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.trained, args.lr, MOMENTUM, weight_decay=WEIGHT_DECAY)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self.skipped = 0  # steps that fp16's scaler left out
        self.horizon = args.epochs * batches.steps_per_epoch

    def lr(self, t: int) -> float:
        return self.args.lr * 0.5 * (1 + math.cos(math.pi * t / self.horizon))

    def step(self, t: int, slices: torch.Tensor) -> torch.Tensor:
        """One optimizer step on this process's slices (B, H, W) uint8.

        Returns its mean (L, L_global, L_local, accuracy, cosine to the own key, to the queue) and the norm of the
        step's gradient.
        """
        args, moco = self.args, self.moco
        slices = slices.to(self.device, non_blocking=True)
        drawn_q = self.batches.views(t, runtime.VIEW_Q)
        view_k = augment.apply(slices, self.batches.views(t, runtime.VIEW_K), args.image_size)
        patches = self.batches.patches(t).to(self.device) if args.local else None
        moco.update_key_encoder()
        with runtime.autocast(self.amp, self.device):
            keys, cells = moco.keys(view_k, self.batches.permutation(t).to(self.device))
        groups = len(slices) // args.bn_group
        parts = [slice(g * args.bn_group, (g + 1) * args.bn_group) for g in range(groups)]
        self.statistics.begin()
        records = []
        for part in parts:
            # gradients add up over the groups; DDP exchanges them once, with the last
            several = self.model is not moco and part is not parts[-1]
            view_q = augment.apply(slices[part], {k: v[part] for k, v in drawn_q.items()}, args.image_size)
            with self.statistics.group(), self.model.no_sync() if several else contextlib.nullcontext():
                with runtime.autocast(self.amp, self.device):
                    loss_global, loss_local = self.model(view_q, keys[part], cells[part] if args.local else None,
                                                         patches[part] if args.local else None)
                loss = moco.total(loss_global, loss_local)
                self.scaler.scale(loss / groups).backward()
            losses = torch.stack([loss.detach(), loss_global.detach(), loss_local.detach()])
            records.append(torch.cat([losses, moco.signs]))
        self.statistics.finish()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(t)
        self.scaler.unscale_(self.optimizer)
        norm = runtime.gradient_norm(self.trained)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        moco.enqueue(keys)
        return torch.cat([torch.stack(records).mean(0), norm[None]])

    def count_skipped(self, records: list[dict]) -> None:
        """Under fp16 a gradient that is not finite ends no run: the scaler leaves its step out, counted here."""
        for r in records if self.amp == "fp16" else ():
            if not math.isfinite(r["grad_norm"]):
                self.skipped, r["grad_norm"] = self.skipped + 1, None
            r["skipped"] = self.skipped

    def state(self, step: int) -> dict:
        return {"step": step, "model": self.moco.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "skipped": self.skipped, "amp": self.amp,
                "threads": torch.get_num_threads(), "arch": self.args.arch,
                "zca": [self.args.zca_group, self.args.zca_iterations] if self.args.zca else []}

    def load(self, state: dict) -> int:
        self.moco.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]
        return state["step"]


@runtime.command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    data, phantom = datasets.locate(args.data, "AbdomenCT-1K")
    settle(args, phantom)
    store = datasets.prepare(data, args.store or datasets.default_store(data), "pretrain", tuple(args.window),
                             args.size, args.workers)
    processes = runtime.start()
    check_groups(args, processes.world)
    batches = Batches(args, len(store), processes)
    if not batches.steps_per_epoch:
        raise BadInput(f"{data}: {len(store)} slices are fewer than one batch of {args.batch_size} besides "
                       f"{len(batches.held_out)} held-out ones; lower --batch-size")
    kept = ("steps", "out", "name", "overwrite", "workers", "store", "data", "compile", "amp")
    config = {k: v for k, v in vars(args).items() if k not in kept}
    moco = build(args)  # before the run folder: weights that do not fit leave nothing behind
    config |= {"data": "phantom" if phantom else data.name, "volumes": len(store.volumes), "slices": len(store)}
    run = runtime.Run(args.out / args.name, config, args.overwrite, processes.is_main)
    saved = run.resume()
    amp = runtime.precision(args.amp if not saved or args.amp != "auto" else saved["amp"], processes.device)
    runtime.announce_changes(saved, amp, processes)
    trainer = Trainer(args, moco, batches, processes, amp)
    first = trainer.load(saved) if saved else 0
    last = min(trainer.horizon, args.steps or trainer.horizon)
    if processes.is_main:
        introduce(args, store, phantom, processes, amp, first, last, trainer)
    if first < last:
        train(args, store, processes, run, trainer, first, last)
    if processes.is_main:
        runtime.save(runtime.export(trainer.moco.encoder_q.backbone), run.folder / "backbone.pth")
        print(f"{run.folder / 'backbone.pth'}: the backbone, whitening folded, under torchvision's names")
        figures.attempt(figures.curves, run.folder / "curves.png", runtime.read_log(run.folder / "log.jsonl"),
                        math.log(1 + args.queue))


def introduce(args, store, phantom, processes, amp, first, last, trainer) -> None:
    """Say what will be done, on what, and what it takes."""
    if phantom:
        runtime.announce_phantom()
    megabytes = sum(p.numel() for p in trainer.moco.encoder_q.parameters()) * 4 * 3 * 2 / 1e6 + args.queue * DIM * 8e-6
    print(f"{args.name}: {args.arch} from {args.init} on {len(store):,} slices of {len(store.volumes):,} volumes "
          f"({store.folder}), {runtime.hardware()}")
    print(f"{last:,} steps of {args.batch_size} = {args.batch_size // args.bn_group} groups of {args.bn_group} on "
          f"{processes.world} process(es), precision {amp}, {args.image_size} px; about {megabytes:,.0f} MB in "
          f"{args.out / args.name}; the time needed is told after {FLUSH} steps")
    if args.queue > len(store):
        print(f"note: the queue of {args.queue:,} is longer than the {len(store):,} slices; a slice will meet its own "
              "earlier keys as negatives (--queue)", file=sys.stderr)
    if first:
        print("finished before; nothing left to train" if first >= last else f"continuing after step {first:,}")


class Signs:
    """Is it collapsing? Looked at each epoch on the held-out slices; the training is not touched by it."""

    def __init__(self, trainer: Trainer, store: datasets.Store):
        self.trainer, args = trainer, trainer.args
        self.slices = torch.from_numpy(store.batch(trainer.batches.held_out))
        self.views = [augment.draw(runtime.rng(args.seed, runtime.SIGNS, i), len(self.slices), args.geometric)
                      for i in (1, 2)]

    @torch.no_grad()
    def look(self, step: int) -> dict[str, float]:
        """All in evaluation mode: effective ranks of the pooled features and of the embeddings (unit length, as
        Eq. 1 sees them) of the slices as they are; mean cosines of two fixed views, of one slice and of two.
        """
        moco, args, device = self.trainer.moco.eval(), self.trainer.args, self.trainer.device
        outputs: list[tuple] = []
        for start in range(0, len(self.slices), args.bn_group):
            part = slice(start, start + args.bn_group)
            slices = self.slices[part].to(device)
            with runtime.autocast(self.trainer.amp, device):
                pooled = moco.encoder_q.features(augment.whole(slices, args.image_size))[1]
                views = [augment.apply(slices, {k: v[part] for k, v in drawn.items()}, args.image_size)
                         for drawn in self.views]
                outputs.append((pooled, moco.encoder_q.projector(pooled), moco.encoder_q(views[0])[1],
                                moco.encoder_k(views[1])[1]))
        moco.train()
        features, *embeddings = (torch.cat(x).float() for x in zip(*outputs, strict=True))
        embeddings, queries, keys = (F.normalize(x, dim=1) for x in embeddings)
        ranks = [metrics.effective_rank(metrics.singular_values(x.cpu().numpy())) if x.isfinite().all() else math.nan
                 for x in (features, embeddings)]  # where one is not finite, the checkpoint that follows is refused
        cosines = queries @ keys.mT
        own, count = cosines.diagonal().sum(), len(cosines)
        return {"effective_rank": ranks[0], "effective_rank_embedding": ranks[1],
                "held_out_positive": (own / count).item(),
                "held_out_negative": ((cosines.sum() - own) / (count * (count - 1))).item(),
                "queue_filled": min(1.0, step * args.batch_size / args.queue)}

    def warning(self, signs: dict[str, float]) -> str:
        """What the signs mean where they are bad, else ''."""
        width = self.trainer.moco.encoder_q.projector[0].in_features
        if signs["held_out_negative"] > 0.9:
            return (f"warning: views of different slices have a mean cosine of {signs['held_out_negative']:.2f}: "
                    "everything is mapped to one point (complete collapse); check --lr and the data")
        if signs["effective_rank"] < min(width, 10 * (len(self.slices) - 1)) / 100:
            return (f"warning: the {width} features have an effective rank of {signs['effective_rank']:.1f}: only so "
                    "many directions are used (dimensional collapse, Fig. 1); see --local --zca")
        return ""


class Journal:
    """What the steps gave: kept on the device, then averaged over the processes, logged and shown, FLUSH at a time."""

    def __init__(self, args, store, run, trainer: Trainer, processes, first: int, last: int):
        self.args, self.store, self.run, self.trainer, self.processes = args, store, run, trainer, processes
        self.first, self.last, self.chance = first, last, math.log(1 + args.queue)
        self.bar = tqdm(total=last, initial=first, unit="step", disable=None if processes.is_main else True)
        self.signs = Signs(trainer, store) if processes.is_main else None
        self.rank = ""  # of the last look
        self.pending, self.waited, self.since = [], 0.0, time.perf_counter()

    def flush(self, done: int, tell: bool, look: bool) -> None:
        """Log what is pending up to step `done`; tell: also a line where there is no bar; look: for collapse."""
        values = runtime.mean_over_processes(torch.stack(self.pending), self.processes).tolist()
        now, trainer = time.perf_counter(), self.trainer
        spent = now - self.since
        rate = len(values) * self.args.batch_size / spent
        records = [{"step": step, "loss": v[0], "loss_global": v[1], "loss_local": v[2], "accuracy": v[3],
                    "similarity_positive": v[4], "similarity_negative": v[5], "grad_norm": v[6],
                    "lr": trainer.lr(step - 1), "images_per_s": round(rate, 2),
                    "data_share": round(self.waited / spent, 4)}
                   for step, v in enumerate(values, done - len(values) + 1)]
        trainer.count_skipped(records)
        runtime.refuse_non_finite(records, lambda step: [self.store.where(*self.store.place(i))
                                                         for i in trainer.batches.indices(step - 1)], self.run)
        told, warning = records[-1], ""
        if look and self.signs:
            told |= self.signs.look(done)
            warning, self.rank = self.signs.warning(told), f", effective rank {told['effective_rank']:.1f}"
        text = (f"loss {told['loss_global']:.2f} (chance {self.chance:.2f})"
                + (f" local {told['loss_local']:.2f}" if self.args.local else "")
                + f" accuracy {told['accuracy']:.2f}, {rate:.1f} images/s"
                + self.rank + (f", {trainer.skipped} steps skipped" if trainer.skipped else ""))
        self.run.log(records)
        self.bar.set_postfix_str(text)
        self.bar.update(len(values))
        if self.processes.is_main and self.first + FLUSH == done:
            tqdm.write(f"about {runtime.duration((self.last - done) * self.args.batch_size / rate)} to go")
        if self.processes.is_main and self.bar.disable and tell:
            print(f"step {done}/{self.last}: {text}", flush=True)
        if warning:
            tqdm.write(warning, file=sys.stderr)
        self.pending, self.waited, self.since = [], 0.0, time.perf_counter()


def train(args, store, processes, run, trainer, first, last) -> None:
    batches, journal = trainer.batches, Journal(args, store, run, trainer, processes, first, last)

    def fetch(t: int) -> torch.Tensor:
        slices = torch.from_numpy(store.batch(batches.indices(t)[batches.local]))
        return slices.pin_memory() if processes.device.type == "cuda" else slices

    asked = time.perf_counter()
    with runtime.StopRequest() as stop:
        for t, slices in datasets.prefetch(fetch, range(first, last), args.workers):
            journal.waited += time.perf_counter() - asked
            journal.pending.append(trainer.step(t, slices))
            stopping, done = processes.any(stop.signal != 0), t + 1
            epoch_ends = done % batches.steps_per_epoch == 0 or done == last
            if len(journal.pending) == FLUSH or epoch_ends or stopping:
                journal.flush(done, epoch_ends or stopping, done % batches.steps_per_epoch == 0)
            if epoch_ends or stopping:
                run.checkpoint(trainer.state(done))
            if stopping and done < last:
                if processes.is_main:
                    print(f"stopped after step {done}; the same command continues", file=sys.stderr)
                raise SystemExit(stop.exit_code)
            asked = time.perf_counter()
    journal.bar.close()


if __name__ == "__main__":
    main()
