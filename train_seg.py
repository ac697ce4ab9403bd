"""Measure a backbone by segmenting BTCV's 13 organs: Tables 1 and 2.

    python train_seg.py --split 12.5                       the paper's method, three protocols, three draws
    python train_seg.py --split 100 --backbone all         all rows of Table 2
    python train_seg.py --split 25 --backbone my_backbone.pth --protocol linear-frozen --draw 0
    python train_seg.py --report                           both tables from what has been run so far
    torchrun --nproc-per-node 4 train_seg.py --split 100   several GPUs, with synchronised batch statistics

What is done is skipped; what stopped continues. The reported model is the last iteration's.
"""

import functools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import augment
import datasets
import metrics
import runtime
from runtime import BadInput
from segment import PROTOCOLS, Segmenter

MOMENTUM, WEIGHT_DECAY, LR_END, POWER = 0.9, 5e-4, 1e-4, 0.9  # mmsegmentation's schedule_40k
PAPER = dict(arch="resnet50", iterations=40_000, crop_size=512, batch_size=16, lr=0.01)
PHANTOM = dict(arch="resnet18", iterations=300, crop_size=128, batch_size=4, lr=0.05)
CHECKPOINT = 4000  # iterations between two checkpoints and evaluations
FLUSH = 10  # iterations between two looks at the loss
SPLITS = {"12.5": 3, "25": 3, "100": 1}  # draws of each
ROWS = {"No SSL": "imagenet", "MoCo v2": "moco", "Ours: local": "moco-local", "Ours: decorrelation": "moco-zca",
        "Ours: both": "moco-local-zca"}  # Table 2's rows and the backbones they are
# mean Dice in %, as printed in the paper: (split, row) -> linear frozen, linear fine-tuned, DeepLabv3+
PRINTED = {
    ("12.5", "No SSL"): ("", "42.55 ± 2.41", "53.17 ± 3.86"),
    ("12.5", "MoCo v2"): ("", "46.04 ± 4.37", "54.55 ± 6.33"),
    ("12.5", "Ours: both"): ("", "52.32 ± 4.75", "56.47 ± 4.41"),
    ("25", "No SSL"): ("", "62.95 ± 7.17", "67.78 ± 6.00"),
    ("25", "MoCo v2"): ("", "66.17 ± 6.16", "68.56 ± 6.5"),
    ("25", "Ours: both"): ("", "67.72 ± 5.39", "68.82 ± 4.67"),
    ("100", "No SSL"): ("32.61", "63.31", "78.79"),
    ("100", "MoCo v2"): ("44.30", "78.21", "81.09"),
    ("100", "Ours: local"): ("44.17", "78.98", "79.67"),
    ("100", "Ours: decorrelation"): ("45.27", "74.36", "81.02"),
    ("100", "Ours: both"): ("51.86", "79.38", "81.22"),
}


def parse(argv: list[str] | None):
    parser = runtime.Parser(prog="train_seg.py", description=__doc__.split("\n\n")[0],
                            epilog="Defaults are the paper's; in brackets the preset of the built-in phantom.")
    parser.common()
    add = parser.add_argument
    add("--split", help="percent of BTCV's training volumes: 12.5, 25 or 100")
    add("--draw", type=int, help="one of the random choices of volumes, 0 to 2 (default: all)")
    add("--protocol", choices=PROTOCOLS, help="default: all three")
    add("--backbone", help="a RUN of --out, a FILE of weights, imagenet, random or all (default moco-local-zca)")
    add("--whitening", choices=("bn", "fold"), default="bn",
        help="a whitened run, fine-tuned: plain BN as in the paper, or folded; frozen is always folded")
    add("--arch", help="of --backbone imagenet, random or FILE (resnet50) [resnet18]")
    add("--iterations", type=int, help="(40000) [300]")
    add("--crop-size", type=int, help="pixels of a training crop's side (512) [128]")
    add("--batch-size", type=int, help="crops an iteration, over all processes (16) [4]")
    add("--overwrite", action="store_true", help="start over what has been run")
    add("--report", action="store_true", help="print Tables 1 and 2 of what has been run, beside the paper's")
    return parser.parse_args(argv)


def settle(args, phantom: bool) -> None:
    for key, value in (PHANTOM if phantom else PAPER).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    if args.split is None:
        raise BadInput("--split is missing: give --split 12.5, 25 or 100 (or --report)")
    if args.split not in SPLITS:
        raise BadInput(f"--split {args.split}: no such split; there are {', '.join(SPLITS)}")
    for key, least in (("iterations", 1), ("crop_size", 32), ("batch_size", 2)):
        if getattr(args, key) < least:
            raise BadInput(f"--{key.replace('_', '-')} {getattr(args, key)}: must be at least {least}")
    args.draws = range(SPLITS[args.split]) if args.draw is None else [args.draw]
    for draw in args.draws:
        if draw not in range(SPLITS[args.split]):
            raise BadInput(f"--draw {draw}: split {args.split} has draws 0 to {SPLITS[args.split] - 1}")
    args.protocols = PROTOCOLS if args.protocol is None else (args.protocol,)


# ----------------------------------------------------------------------------------------------------- backbones


def choose_backbones(args, phantom: bool) -> list[str]:
    """The names behind --backbone: runs of --out, files, imagenet or random. Raises BadInput for none."""
    prefix = "phantom-" * phantom
    untrained = "random" if phantom else "imagenet"
    if args.backbone == "all":
        runs = [prefix + r for r in (*list(ROWS.values())[1:], "moco-nogeo", "moco-zca-nogeo")]
        absent = [r for r in runs[:4] if not (args.out / r / "checkpoint.pt").exists()]
        if absent:
            print(f"not run yet, left out: {', '.join(absent)} (train_ssl.py)", file=sys.stderr)
        return [untrained] + [r for r in runs if (args.out / r / "checkpoint.pt").exists()]
    name = args.backbone or prefix + "moco-local-zca"
    if name in ("imagenet", "random") or (args.out / name / "checkpoint.pt").exists():
        return [name]
    if (args.out / (prefix + name) / "checkpoint.pt").exists():
        return [prefix + name]
    if Path(name).is_file():
        return [name]
    raise BadInput(f"--backbone {name}: no such run in {args.out} and no such file; pre-train it first "
                   "(torchrun train_ssl.py --local --zca) or name another")


# ------------------------------------------------------------------------------------------------------ training


class Crops:
    """Which slices and crops iteration t has: a function of (seed, t) alone."""

    def __init__(self, args, store: datasets.Store, slices: np.ndarray, processes: runtime.Processes):
        self.args, self.store, self.slices = args, store, slices
        share = args.batch_size // processes.world
        self.local = slice(processes.rank * share, (processes.rank + 1) * share)
        self.order = functools.lru_cache(2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return runtime.rng(self.args.seed, runtime.SLICES, epoch).permutation(self.slices)

    def indices(self, t: int) -> list[int]:
        """Slice numbers of the global batch: one shuffled pass over the split after the other."""
        places = range(t * self.args.batch_size, (t + 1) * self.args.batch_size)
        return [int(self.order(p // len(self.slices))[p % len(self.slices)]) for p in places]

    def fetch(self, t: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.from_numpy(self.store.slice(i)), torch.from_numpy(self.store.slice(i, label=True)))
                for i in self.indices(t)[self.local]]

    def apply(self, t: int, pairs: list, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = augment.draw_crops(runtime.rng(self.args.seed, runtime.CROPS, t), self.args.batch_size)
        drawn = {k: v[self.local] for k, v in drawn.items()}
        images, labels = zip(*pairs, strict=True)
        return augment.apply_crops([i.to(device, non_blocking=True) for i in images],
                                   [x.to(device, non_blocking=True) for x in labels], drawn, self.args.crop_size)


def lr(t: int, args) -> float:
    """Polynomial decay from args.lr to LR_END over args.iterations (mmsegmentation's PolyLR)."""
    return (args.lr - LR_END) * (1 - t / args.iterations) ** POWER + LR_END


def train(args, name: str, protocol: str, draw: int, store: datasets.Store, phantom: bool,
          processes: runtime.Processes) -> None:
    """One run: one backbone, protocol, split and draw, from the start or its checkpoint to its result."""
    title = f"{Path(name).stem if Path(name).is_file() else name}-{protocol}-{args.split}-{draw}"
    whitening = "fold" if protocol == "linear-frozen" else args.whitening
    config = {"backbone": name, "protocol": protocol, "split": args.split, "draw": draw, "whitening": whitening,
              "iterations": args.iterations, "crop_size": args.crop_size, "batch_size": args.batch_size,
              "lr": args.lr, "seed": args.seed, "window": args.window,
              "data": "phantom" if phantom else Path(store.data).name, "cases": datasets.cases(args.split, draw),
              "slices": len(store)}
    model = None
    if args.overwrite or not (args.out / "seg" / title / "result.json").exists():
        # before the run folder: a backbone that does not fit leaves nothing behind
        model = Segmenter(runtime.open_backbone(name, args.out, args.arch, args.seed, whitening, phantom), protocol,
                          len(datasets.ORGANS))
    run = runtime.Run(args.out / "seg" / title, config, args.overwrite, processes.is_main)
    if model is None:
        if processes.is_main:
            result = json.loads((run.folder / "result.json").read_text())
            print(f"{title}: done before, mDS {100 * result['mDS']:.2f} %")
        return
    started = time.time()
    saved = run.resume()
    amp = runtime.precision(args.amp if not saved or args.amp != "auto" else saved["amp"], processes.device)
    runtime.announce_changes(saved, amp, processes)
    model = model.to(processes.device, memory_format=torch.channels_last)
    net = model
    if processes.world > 1:
        net = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, args.lr, MOMENTUM, weight_decay=WEIGHT_DECAY)
    scaler = torch.amp.GradScaler(processes.device.type, enabled=amp == "fp16")
    first = 0
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        first = saved["step"]
    crops = Crops(args, store, store.of(datasets.cases(args.split, draw)), processes)
    steps = range(first, args.iterations)
    bar = tqdm(desc=title, total=args.iterations, initial=first, unit="it", disable=None if processes.is_main else True)
    pending = []
    with runtime.StopRequest() as stop:
        for t, pairs in datasets.prefetch(crops.fetch, steps, args.workers):
            runtime.seed_torch(args.seed, runtime.DROPOUT, t)
            images, labels = crops.apply(t, pairs, processes.device)
            with runtime.autocast(amp, processes.device):
                loss = net(images, labels)
            scaler.scale(loss).backward()
            for group in optimizer.param_groups:
                group["lr"] = lr(t, args)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            pending.append(loss.detach())
            done = t + 1
            stopping = processes.any(stop.signal != 0)
            if len(pending) == FLUSH or done == args.iterations or stopping:
                values = runtime.mean_over_processes(torch.stack(pending), processes).tolist()
                records = [{"step": done - len(values) + i + 1, "loss": v, "lr": lr(done - len(values) + i, args)}
                           for i, v in enumerate(values)]
                runtime.refuse_non_finite(records, lambda step: [store.where(*store.place(i))
                                                                 for i in crops.indices(step - 1)], run)
                run.log(records)
                bar.set_postfix_str(f"loss {values[-1]:.3f}")
                bar.update(len(values))
                pending = []
            if done % CHECKPOINT == 0 or done == args.iterations or stopping:
                run.checkpoint({"step": done, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                "scaler": scaler.state_dict(), "amp": amp, "threads": torch.get_num_threads()})
            if stopping and done < args.iterations:
                raise SystemExit(stop.exit_code)
    bar.close()
    if processes.is_main:
        table, volumes = evaluate(model, store, store.of(datasets.cases("val")), args.crop_size, amp, processes.device)
        result = {**config, **metrics.summarise(table, volumes), "wall_s": round(time.time() - started, 1),
                  "amp": amp, "hardware": runtime.hardware(), "commit": runtime.commit(),
                  "date": time.strftime("%Y-%m-%d")}
        runtime.write_text(run.folder / "result.json", json.dumps(result) + "\n")
        with open(args.out / "results.jsonl", "a") as f:
            f.write(json.dumps(result) + "\n")
        print(f"{title}: mDS {100 * result['mDS']:.2f} % (13 organs, pooled over the validation set), with background "
              f"{100 * result['mDice_with_background']:.2f} %, {runtime.duration(result['wall_s'])}")


@torch.no_grad()
def predict(model: Segmenter, images: torch.Tensor, side: int, amp: str) -> torch.Tensor:
    """Slices (B, H, W) uint8 -> labels (B, H, W) uint8: shorter side resized to `side`, logits resized back."""
    height, width = images.shape[1:]
    scale = side / min(height, width)
    resized = F.interpolate(images[:, None].float() / 255, (round(height * scale), round(width * scale)),
                            mode="bilinear", antialias=True)
    with runtime.autocast(amp, images.device):
        logits = model(augment.normalise(resized).contiguous(memory_format=torch.channels_last))
    return F.interpolate(logits, (height, width), mode="bilinear").argmax(1).to(torch.uint8)


def evaluate(model: Segmenter, store: datasets.Store, slices: np.ndarray, side: int, amp: str,
             device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """The table of counts of `slices`, at the masks' own resolution: (slices, classes, 3), and their volumes."""
    was_training = model.training
    model.eval()
    table, volumes = [], np.array([store.place(int(i))[0] for i in slices])
    for volume in tqdm(np.unique(volumes), "evaluating", unit="volume", disable=None, leave=False):
        for part in np.array_split(slices[volumes == volume], max(1, (volumes == volume).sum() // 8)):
            images = torch.from_numpy(np.stack([store.slice(int(i)) for i in part])).to(device)
            predicted = predict(model, images, side, amp).cpu().numpy()
            for i, p in zip(part, predicted, strict=True):
                table.append(metrics.counts(p, store.slice(int(i), label=True), len(datasets.ORGANS)).T)
    model.train(was_training)
    return np.stack(table), volumes


# -------------------------------------------------------------------------------------------------------- report


def report(out: Path) -> str:
    """Tables 1 and 2 in Markdown: the paper's figures and ours in columns of their own, a table per data set."""
    path = out / "results.jsonl"
    if not path.exists():
        raise BadInput(f"{path}: no results yet; run python train_seg.py --split 12.5 first")
    newest = {(r["data"], r["split"], r["backbone"], r["protocol"], r["draw"]): r
              for r in map(json.loads, path.read_text().splitlines())}
    text = []
    for data in sorted({k[0] for k in newest}):
        results = [r for k, r in newest.items() if k[0] == data]
        where = "the generated phantom: these are not BTCV results" if data == "phantom" else data
        for title, cells in (("Table 1", [k for k in PRINTED if k[1] in ("No SSL", "MoCo v2", "Ours: both")]),
                             ("Table 2", [k for k in PRINTED if k[0] == "100"])):
            text += [f"\n{title}, ours on {where}. Mean Dice over 13 organs in %, pooled over the validation set; "
                     "± standard deviation over draws (n - 1).", "",
                     "| split | method | " + " | ".join(f"{p}, paper | {p}, ours" for p in PROTOCOLS) + " |",
                     "|---" * (2 + 2 * len(PROTOCOLS)) + "|"]
            for split, row in cells:
                line = [f"{split} %", row]
                for protocol, printed in zip(PROTOCOLS, PRINTED[split, row], strict=True):
                    line += [printed, _cell(results, split, _names(row, data), protocol)]
                text.append("| " + " | ".join(line) + " |")
        known = {n for row in ROWS for n in _names(row, data)}
        others = [f"- {r['backbone']}, {r['protocol']}, {r['split']} %, draw {r['draw']}: {100 * r['mDS']:.2f}"
                  for r in results if r["backbone"] not in known]
        if others:
            text += ["", "Other backbones:", "", *others]
    return "\n".join(text)


def _names(row: str, data: str) -> tuple[str, ...]:
    if data == "phantom":
        return ("random",) if row == "No SSL" else (f"phantom-{ROWS[row]}",)
    return (ROWS[row],)


def _cell(results: list[dict], split: str, backbones: tuple[str, ...], protocol: str) -> str:
    values = [100 * r["mDS"] for r in results
              if r["split"] == split and r["backbone"] in backbones and r["protocol"] == protocol]
    if not values:
        return "not run"
    mean, deviation = metrics.mean_std(values)
    if SPLITS[split] == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {deviation:.2f}" if len(values) == SPLITS[split] else f"{mean:.2f} (n = {len(values)})"


@runtime.command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.report:
        print(report(args.out))
        return
    data, phantom = datasets.locate(args.data, "BTCV")
    settle(args, phantom)
    names = choose_backbones(args, phantom)
    store = datasets.prepare(data, args.store or datasets.default_store(data), "segment", tuple(args.window),
                             workers=args.workers)
    for cases in [datasets.cases(args.split, d) for d in args.draws] + [datasets.cases("val")]:
        store.of(cases)
    processes = runtime.start()
    if processes.world > 1 and processes.device.type == "cpu":
        raise BadInput("segmentation on several processes needs GPUs (synchronised batch statistics); "
                       "run python train_seg.py as one process")
    if args.batch_size % processes.world:
        raise BadInput(f"--batch-size {args.batch_size}: must be a multiple of {processes.world} processes")
    if processes.is_main:
        if phantom:
            runtime.announce_phantom()
        print(f"{len(names) * len(args.protocols) * len(args.draws)} runs: {', '.join(names)} x "
              f"{', '.join(args.protocols)} x {len(args.draws)} draw(s) of {args.split} %, {args.iterations:,} "
              f"iterations of {args.batch_size} crops of {args.crop_size} px each, in {args.out / 'seg'}; "
              f"{runtime.hardware()}")
    for name in names:
        for draw in args.draws:
            for protocol in args.protocols:
                train(args, name, protocol, draw, store, phantom, processes)
    if processes.is_main:
        print(report(args.out))


if __name__ == "__main__":
    main()
