"""Is it learning, is it collapsing: what a pre-training says of itself, its log and bar, the monitor of collapse."""

import math
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

import augment
import metrics
from ct.command import announce, counted, duration
from engine import origin, pace, processes, recipes, runs, seeds
from views import resize

LOG_INTERVAL = 10  # steps between two looks at the losses; each look waits for the device
# What `Trainer.step` returns of a step; the queue's accuracy, cosine to the own key and to the queue: MoCo.query_stats
STATS = ("loss", "loss_global", "loss_local", "queue_accuracy", "similarity_positive", "similarity_negative",
         "grad_norm")
EARLIEST = 50  # steps: on the phantom, healthy runs had a margin of 0.01 to 0.02 after 23 and of 0.04 to 0.16 after 46


def judged_from(trainer) -> int:
    """The step from which a run says that it does not tell slices apart: a tenth of all, EARLIEST at least."""
    return max(EARLIEST, math.ceil(trainer.horizon / 10))


class CollapseMonitor:
    """Is it collapsing? Looked at each epoch on the held-out slices; the training is not touched by it."""

    def __init__(self, trainer, store):
        self.trainer, batches = trainer, trainer.batches
        self.slices = torch.from_numpy(store.batch(batches.held_out))
        self.views = [augment.draw(seeds.rng(batches.seed, seeds.LOOKS, i), len(self.slices), batches.geometric,
                                   batches.recipe) for i in (1, 2)]

    @torch.no_grad()
    def look(self, step: int) -> dict[str, float]:
        """All in evaluation mode, with the encoders as they are now, so that no key is older than another.

        Of the slices as they are: effective ranks of the pooled features and of the embeddings (unit length, as Eq. 1
        sees them). Of two fixed views of each: mean cosines of query and key of one slice and of two, the first less
        the second (the similarity margin, `held_out_gap`), and the share of queries to which their own key is the
        nearest of all (`instance_accuracy`, by chance 1 / number of slices).
        """
        moco, batches, device = self.trainer.moco.eval(), self.trainer.batches, self.trainer.device
        outputs: list[tuple] = []
        for start in range(0, len(self.slices), moco.group):
            part = slice(start, start + moco.group)
            slices = self.slices[part].to(device)
            with processes.autocast(self.trainer.amp, device):
                pooled = moco.encoder_q.features(resize.whole(slices, batches.view_px))[1]
                views = [augment.apply(slices, {k: v[part] for k, v in drawn.items()}, batches.view_px)
                         for drawn in self.views]
                # `forward`, not the call that --compile replaces: a look an epoch is not worth graphs of its own, whose
                # outputs the next replay would overwrite
                outputs.append((pooled, moco.encoder_q.projector(pooled), moco.encoder_q.forward(views[0])[1],
                                moco.encoder_k.forward(views[1])[1]))
        moco.train()
        features, *embeddings = (torch.cat(x).float() for x in zip(*outputs, strict=True))
        embeddings, queries, keys = (F.normalize(x, dim=1) for x in embeddings)
        ranks = [metrics.effective_rank(metrics.singular_values(x.cpu().numpy())) if x.isfinite().all() else math.nan
                 for x in (features, embeddings)]  # where one is not finite, the checkpoint that follows is refused
        cosines = queries @ keys.mT
        own, count = cosines.diagonal().sum(), len(cosines)
        positive, negative = (own / count).item(), ((cosines.sum() - own) / (count * (count - 1))).item()
        nearest = cosines.argmax(1) == torch.arange(count, device=cosines.device)
        self.trainer.gap = positive - negative
        return {"effective_rank": ranks[0], "effective_rank_embedding": ranks[1], "held_out_positive": positive,
                "held_out_negative": negative, "held_out_gap": positive - negative,
                "instance_accuracy": nearest.float().mean().item(), "instance_chance": 1 / count,
                "queue_filled": min(1.0, step * batches.batch_size / len(moco.queue))}

    def warning(self, found: dict[str, float], step: int) -> str:
        """What a look found means where it is bad, else ''. Nothing is said before the queue was full for an epoch; but
        that the model does not tell slices apart is said from `judged_from` on at the latest, never before EARLIEST.
        """
        args, width = self.trainer.args, self.trainer.moco.encoder_q.projector[0].in_features
        settled = self.trainer.batches.steps_per_epoch + args.queue // args.batch_size
        if found["held_out_gap"] < metrics.LEAST_GAP:
            if step < max(EARLIEST, min(settled, judged_from(self.trainer))):
                return ""
            mends = ["an initial checkpoint that is not random (--init)"] * (args.init == "random")
            deep = args.arch not in recipes.BASIC and args.init != "imagenet"
            mends += ["--arch resnet18"] * deep  # docs/measurements.md, "ResNet-50 from random weights"
            mends += ["a shorter --queue"] * (args.queue > args.batch_size) + ["a lower --lr"]
            return (f"warning: after {step:,} of {self.trainer.horizon:,} steps the model does not tell slices apart "
                    "(similarity margin, the mean cosine of two views of one slice minus that of two slices: "
                    f"{found['held_out_gap']:.3f}; instance accuracy {found['instance_accuracy']:.3f}, chance "
                    f"{found['instance_chance']:.3f}). Its loss and the queue's accuracy come from stale keys, and its "
                    f"effective rank means nothing. Try {', '.join(mends)}")
        if step >= settled and found["effective_rank"] < min(width, 10 * (len(self.slices) - 1)) / 100:
            return (f"warning: slices are told apart (similarity margin {found['held_out_gap']:.2f}), but the {width} "
                    f"features have an effective rank of {found['effective_rank']:.1f}: few directions are used "
                    "(dimensional collapse, Fig. 1)" + "; whitening is meant for that (--zca)" * (not args.zca))
        return ""


def count_skipped(trainer, records: list[dict]) -> None:
    """Under fp16 a gradient that is not finite ends no run: the scaler leaves its step out, counted here."""
    if trainer.amp != "fp16":
        return
    for r in records:
        if not math.isfinite(r["grad_norm"]):
            trainer.skipped, r["grad_norm"] = trainer.skipped + 1, None
        r["skipped"] = trainer.skipped


class MetricLogger:
    """What the steps gave: kept on the device, then averaged over the processes, logged and shown."""

    def __init__(self, trainer, store, run, ranks, first: int, last: int):
        self.args, self.store, self.run, self.trainer, self.ranks = trainer.args, store, run, trainer, ranks
        self.first, self.last, self.chance = first, last, math.log(1 + trainer.args.queue)
        self.bar = tqdm(total=last, initial=first, unit="step", disable=None if ranks.is_main else True)
        self.collapse = CollapseMonitor(trainer, store) if ranks.is_main else None
        self.seen = self.alarm = ""  # in the last look
        self.pending: list[torch.Tensor] = []  # (7,) a step: STATS
        self.waited = 0.0  # for slices, since the last flush
        batches, encoders = trainer.batches, (trainer.moco.encoder_q, trainer.moco.encoder_k)
        operations = sum(pace.operations(encoder, pace.features_of(batches.view_px)) for encoder in encoders)
        self.pace = pace.Pace(operations, batches.batch_size, ranks, trainer.amp, first, last)

    def add(self, stats: torch.Tensor, waited: float) -> None:
        """One step's STATS, (7,) on the device, and the seconds for which its slices were waited for."""
        self.pending.append(stats)
        self.waited += waited

    def compiled(self) -> None:
        """After the first step, in which the compiler ran: say how long it took, and leave it out of all rates."""
        self.pending[-1].tolist()  # waits for the device
        took = self.pace.restart(self.first + 1)
        if self.ranks.is_main:
            tqdm.write(f"compiled; the first step took {duration(took)}")

    def flush(self, done: int, say: bool, look: bool) -> None:
        """Log what is pending up to step `done`; say: also a line where there is no bar; look: for collapse."""
        trainer, args = self.trainer, self.args
        steps = range(done - len(self.pending), done)
        stats = processes.mean_over_processes(torch.stack(self.pending), self.ranks).tolist()  # waits for the device
        times = self.pace.read(done)
        times["data_share"] = round(self.waited / self.pace.spent, 4)

        # a record a step, the last one also with what a look found
        records = [{"step": t + 1, **dict(zip(STATS, values, strict=True)), "lr": trainer.lr(t), **times}
                   for t, values in zip(steps, stats, strict=True)]
        count_skipped(trainer, records)
        runs.refuse_non_finite(records, lambda step: [self.store.where(*self.store.place(i))
                                                      for i in trainer.batches.indices(step - 1)], self.run)
        record, warning = records[-1], ""
        if look and self.collapse:
            found = self.collapse.look(done) | (trainer.probe.look() if trainer.probe else {})
            warning = self.collapse.warning(found, done)
            self.seen = (f", instance accuracy {found['instance_accuracy']:.2f} (chance {found['instance_chance']:.2f})"
                         f", similarity margin {found['held_out_gap']:.2f}"
                         f", effective rank {found['effective_rank']:.1f}")
            if trainer.probe:
                self.seen += f", probe {100 * found['probe_dice']:.1f} % (at first {100 * trainer.probe.start:.1f} %)"
            apart = found["held_out_gap"] >= metrics.LEAST_GAP or done < judged_from(trainer)
            self.alarm = "" if apart else "DOES NOT TELL SLICES APART, "
            record |= found  # every look, also the one where --steps ends and a longer run would not look
        self.run.log(records)

        # the same, shown
        text = f"{self.alarm}loss {record['loss_global']:.2f} (chance {self.chance:.2f})"
        if args.local:
            text += f" local {record['loss_local']:.2f}"
        text += f", {pace.words(times)}{self.seen}"
        if trainer.skipped:
            text += f", {trainer.skipped} steps skipped"
        self.bar.set_postfix_str(text)
        self.bar.update(len(steps))
        to_go = f"about {duration(times['seconds_left'])} to go"
        if self.ranks.is_main and steps.start == self.first and done < self.last:
            tqdm.write(to_go)
        if self.ranks.is_main and self.bar.disable and say:
            print(f"step {done}/{self.last}: {text}" + f", {to_go}" * (done < self.last), flush=True)
        if warning:
            tqdm.write(warning, file=sys.stderr)
        self.pending, self.waited = [], 0.0
        self.pace.go_on()


def introduce(trainer, start, store, ranks: processes.Processes, first: int, last: int) -> None:
    """Say what will be done, on what, and what it takes."""
    args, trained = trainer.args, len(trainer.batches.trained)
    if store.is_phantom:
        origin.announce_phantom(store)
    weights = sum(p.numel() for p in trainer.moco.encoder_q.parameters())
    megabytes = 2 * 4 * (3 * weights + trainer.moco.queue.numel()) / 1e6  # two checkpoints
    thinned = f"{trained + len(trainer.batches.held_out):,} (one in {args.every}) of " * (args.every > 1)
    print(f"{args.name}: {args.arch} from {start.source} on {thinned}{len(store):,} slices of {len(store.volumes):,} "
          f"volumes ({store.folder}), {processes.hardware()}")
    groups = counted(args.batch_size // args.bn_group, "micro-batch")
    alike = counted(ranks.world_size, "process")
    soon = counted(min(LOG_INTERVAL, trainer.batches.steps_per_epoch), "step")
    print(f"{counted(last, 'step')} of {args.batch_size} slices = {groups} of {args.bn_group}, "
          f"{trainer.moco.groups_per_pass} in one pass, on {alike}, precision {trainer.amp}, {args.image_size} px; "
          f"about {megabytes:,.0f} MB on disk in {args.out / args.name}; the time needed is printed after {soon}"
          + ", the first of which compiles for some minutes" * args.compile)
    origin.announce_input(start.source, args.out, args.window)
    if start.unfinished:
        print(f"note: {start.source}: {start.unfinished}; this run starts from it as it is")
    if start.untrained:
        announce(f"WARNING: this run starts from {start.source}, and {start.untrained}.\nRuns from such an initial "
                 "checkpoint stayed at chance. Train another one first, with a lower --lr, a\nshorter --queue, more "
                 "steps or --no-geometric (docs/training.md, Few slices); or give --init imagenet.", sys.stderr)
    for line in recipes.remarks(args):
        print(f"note: {line}")
    for line in recipes.advice(args, trained, trainer.horizon):
        print(f"note: with {trained:,} slices to train on, {line}", file=sys.stderr)
    if first >= trainer.horizon:
        print(f"finished before: all {first:,} steps are done")
    elif first >= last:
        print(f"finished before: --steps {last} was reached; {first:,} of {trainer.horizon:,} total steps are done; "
              "a higher --steps, or none, goes on")
    elif first:
        print(f"continuing after step {first:,}")
