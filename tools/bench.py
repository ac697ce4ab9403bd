"""Speed, as ratios taken in one run (A B A B, medians), since absolute times drift on shared machines.

    python -m tools.bench             every row with its target; at most 10 minutes on 2 CPU cores
    python -m tools.bench --quick     small networks, at most 2 minutes: is anything broken?
    python -m tools.bench --peers     lightly, kornia and torchvision's transforms beside ours (requirements-bench.txt)

bare step: query forward and backward plus key forward of the encoder alone, same type, layout and groups.
All rows compute on the GPU where there is one; those that do not say so.
"""

import contextlib
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

import augment
import datasets
import train_ssl
from ct.command import Parser
from ct.volumes import BadInput
from engine import launch, origin, processes, runs, seeds
from tools import peers, stores
from tools.measure import Table, alternated, cpu_flags, medians, seconds
from tools.setting import Setting
from tools.stores import SIDE

ROOT = Path(__file__).parent.parent
NO_GPU = "no GPU here"
NO_PEERS = "only with --peers, where lightly and kornia are installed (requirements-bench.txt)"
READERS = 8  # processes at once: a machine of eight GPUs
PAPER_BATCH = 256
PAPER_STEPS = 200 * ((215_325 - datasets.HELD_OUT) // PAPER_BATCH)


def steps(table: Table, s: Setting) -> None:
    """The full step against the bare step, plain and with both contributions."""
    what = f"{s.arch}, {s.size} px, batch {s.batch} as {s.batch // s.group} x {s.group}, {s.amp}"
    slices, plain = s.slices(), s.trainer()
    ours, aligned = s.trainer("--local", "--zca"), s.trainer("--local", "--zca", "--geometric")
    found = medians(s.repeats, bare=s.bare(plain), moco=lambda: plain.step(0, slices),
                    both=lambda: ours.step(0, slices), aligned=lambda: aligned.step(0, slices))
    # a small network's step is short enough for the fixed costs of Python to show
    for name, flags, most in (("moco", "", 1.08 if s.quick else 1.06), ("both", " --local --zca", 1.11),
                              ("aligned", " --local --zca --geometric", 1.13)):
        ratio = found[name] / found["bare"]
        table.add(f"full step{flags} / bare step, {what}", ratio,
                  f"{ratio:.3f} ({found[name]:.2f} s / {found['bare']:.2f} s)", most=most)


def queue_growth(table: Table) -> None:
    """A queue of sixteen times the length, at a small step, where it shows most."""
    small = Setting(True)
    times = {str(q): small.trainer(queue=q) for q in (4096, 65536)}
    grown = medians(6, **{q: (lambda t=t: t.step(0, small.slices())) for q, t in times.items()})
    table.add("growth: small step with a queue of 65,536 / of 4,096", grown["65536"] / grown["4096"])


END_TO_END = (("MoCo v2", (), 0.95), ("--local --zca", ("--local", "--zca"), 0.92),
              ("--local --zca --compile", ("--local", "--zca", "--compile"), 0.92))


def end_to_end(table: Table, s: Setting, folder: Path, rows: tuple = END_TO_END) -> None:
    """On a GPU: from a store through views to the optimizer step, against bare compute and torchvision's loader."""
    whole, hours = "store to step, {} / bare compute", "the paper's 200 epochs, {} (projection)"
    loader = "store to step, MoCo v2 / torchvision's PIL views from loader processes and the bare step"
    if s.device.type != "cuda":
        for name, _, least in rows:
            table.skip(whole.format(name), NO_GPU, least=least)
            table.skip(hours.format(name), NO_GPU, most=5, unit="hours")
        table.skip(loader, NO_GPU, least=3)
        return
    stores.write_store(folder / "gpu-data", folder / "gpu" / f"pretrain-{SIDE}", 20, s.stored, noise=True)
    store = datasets.prepare(folder / "gpu-data", folder / "gpu", "pretrain", size=SIDE)
    read, steps, rates = f"{store.size ** 2 * len(store) / 1e9:.2g} GB of noise, warm", range(s.steps), {}
    for name, flags, least in rows:
        trainer = s.trainer(*flags)

        def fetch(t: int, batches=trainer.batches) -> torch.Tensor:
            return torch.from_numpy(store.batch(batches.indices(t % batches.steps_per_epoch))).pin_memory()

        def run(trainer=trainer, fetch=fetch) -> None:
            ahead = datasets.prefetch(fetch, steps, os.cpu_count())
            for t, slices in datasets.on_device(ahead, s.device):
                trainer.step(t, slices)

        bare = s.bare(trainer)
        found = medians(3, whole=run, bare=lambda bare=bare: [bare() for _ in steps])
        ratio, rates[name] = found["bare"] / found["whole"], len(steps) * s.batch / found["whole"]
        table.add(whole.format(name), ratio, f"{ratio:.3f} ({rates[name]:.0f} images/s; {read})", least=least)
        table.add(hours.format(name), PAPER_STEPS * PAPER_BATCH / rates[name] / 3600, most=5, unit="hours")
    pairs, bare = peers.pil_loader(store, s.batch, len(steps), True), s.bare(s.trainer())

    def peer() -> None:
        for pair in pairs:
            [view.to(s.device, non_blocking=True) for view in pair]
            bare()

    rate = len(steps) * s.batch / medians(1, peer=peer)["peer"]
    table.add(loader, rates["MoCo v2"] / rate, f"{rates['MoCo v2'] / rate:.2f} ({rate:.0f} images/s, both {s.amp} and "
              f"channels_last; {pairs.num_workers} processes)", least=3)


def two_views(slices: torch.Tensor) -> Callable:
    """What makes two views of 224 px of each slice (N, H, H) uint8."""
    return lambda: augment.pair(slices, *(augment.draw(seeds.rng(0, purpose), len(slices))
                                          for purpose in (seeds.VIEW_Q, seeds.VIEW_K)), 224)


def views(table: Table, s: Setting) -> None:
    """Two views of a 512 slice at 224, ours and the peers': on one thread of the CPU, and all at once on a GPU."""
    slices, threads = s.slices()[:32], torch.get_num_threads()
    torch.set_num_threads(1)
    theirs = {**peers.pil_views(slices[:8]), "kornia, batched": peers.kornia_views(slices[:8])} if s.peers else {}
    found = medians(5, ours=two_views(slices), **theirs)
    torch.set_num_threads(threads)
    found = {name: (32 if name == "ours" else 8) / seconds for name, seconds in found.items()}
    least = 1000 if processes.precision("auto", torch.device("cpu")) == "bf16" else 500
    table.add("two views 512 -> 224, one thread of the CPU", found["ours"], least=least, unit="pairs/s")
    for name, target in (("lightly's MoCoV2Transform", {"least": 3}), ("torchvision v2 on PIL, 3 channels", {}),
                         ("torchvision v2 on PIL, 1 channel, no hue", {}), ("kornia, batched", {})):
        compare_views(table, f"the same against {name}", found["ours"], found.get(name), NO_PEERS, **target)
    alone, other = "two views 512 -> 224, batched on the GPU", "the same against kornia, batched on the GPU"
    if s.device.type != "cuda":
        table.skip(alone, NO_GPU)
        table.skip(other, NO_GPU)
        return
    slices = s.slices().to(s.device)
    found = medians(10, ours=two_views(slices), **{"kornia": peers.kornia_views(slices)} if s.peers else {})
    found = {name: len(slices) / seconds for name, seconds in found.items()}
    table.add(alone, found["ours"], unit="pairs/s")
    compare_views(table, other, found["ours"], found.get("kornia"), NO_PEERS)


def compare_views(table: Table, what: str, ours: float, theirs: float | None, why: str, **target) -> None:
    """A row: pairs/s of this code over those of another, or why there are none."""
    if theirs is None:
        table.skip(what, why, **target)
    else:
        table.add(what, ours / theirs, f"{ours / theirs:.1f} times ({theirs:.0f} pairs/s)", **target)


def lightly_step(table: Table, s: Setting) -> None:
    """Our step, views included, against lightly's MoCo step on ready-made views: as it ships and at its best.

    Its best is the faster of NCHW and channels_last, in bf16 where ours computes in it, unless float32 is faster.
    """
    rows = {"lightly's MoCo step as it ships / our step --local --zca": 3.3,
            "lightly's MoCo step at its best in float32 / our step --local --zca in float32": 1.2,
            "lightly's MoCo step at its best / our step --local --zca": 1.0,
            "lightly's MoCo step at its best / our step (MoCo v2)": 1.1}
    if not s.peers:
        for what, least in rows.items():
            table.skip(what, NO_PEERS, least=least)
        return
    slices, amps, both = s.slices(), sorted({"off", s.amp}), ("--local", "--zca")
    trainers = {f"{name} {amp}": s.trainer(*flags, amp=amp) for name, flags, amp in
                (("both", both, "off"), ("both", both, s.amp), ("plain", (), s.amp))}
    theirs = {f"{amp}, {layout}": peers.lightly_step(s.arch, s.size, s.batch, s.queue, s.device, amp, layout)
              for amp in amps for layout in peers.LAYOUTS}
    found = medians(2 if s.quick else 1, **theirs,
                    **{name: (lambda t=t: t.step(0, slices)) for name, t in trainers.items()})
    float32, best = (min((n for n in theirs if n.startswith(start)), key=found.get) for start in ("off", ""))
    pairs = (("off, NCHW", f"both {s.amp}"), (float32, "both off"), (best, f"both {s.amp}"), (best, f"plain {s.amp}"))
    for (what, least), (peer, ours) in zip(rows.items(), pairs, strict=True):
        ratio = found[peer] / found[ours]
        table.add(what, ratio, f"{ratio:.2f} (theirs {peer}, {found[peer]:.2f} s / ours {ours.split()[1]}, "
                  f"channels_last, {found[ours]:.2f} s; {s.device.type})", least=least)


def preparing(table: Table, folder: Path, s: Setting) -> None:
    """Preparing volumes against the mere decoding of them; its growth with processes and volumes."""
    count, made = 4 if s.quick else 8, iter(range(1000))
    files = stores.noise_volumes(folder / "data", count)

    def linked(count: int) -> Path:
        some = folder / f"some{count}"
        some.mkdir()
        for i in range(count):
            os.link(files[i % len(files)], some / f"{i}.nii.gz")
        return some

    def prepared(data: Path, workers: int) -> Callable:
        return lambda: datasets.prepare(data, folder / f"store{next(made)}", "pretrain", size=SIDE, workers=workers)

    work = {"one": prepared(folder / "data", 1), "two": prepared(folder / "data", 2),
            "half": prepared(linked(count // 2), 1)}
    if os.cpu_count() >= 8:
        work["eight"] = prepared(linked(4 * 8), 8)
    found = medians(2 if s.quick else 3, decode=lambda: [np.asarray(nib.load(f).dataobj) for f in files], **work)
    what = "prepare, {}, against nibabel's bare decoding of the same files in one"
    table.add(what.format("one process"), found["decode"] / found["one"], least=0.85)
    table.add(what.format("two processes"), found["decode"] / found["two"], least=1.8)
    each = what.format("eight processes, each of them")
    if "eight" in found:
        table.add(each, found["decode"] * (4 * 8 / count) / found["eight"] / 8, least=0.9)
    else:
        table.skip(each, f"{os.cpu_count()} cores here", least=0.9)
    table.add(f"growth: prepare of {count} volumes / of {count // 2}", found["one"] / found["half"])


def reading(table: Table, folder: Path) -> None:
    """Random slices from the store of what `preparing` prepared: warm, cold, for many processes, within an epoch."""
    data, warm = folder / "data", folder / "warm"
    store = datasets.prepare(data, warm, "pretrain", size=SIDE, workers=2)
    order = np.random.default_rng(0).permutation(len(store))
    what = f"random {SIDE} x {SIDE} slices from a {{}} store, {{}}"

    def rate() -> float:
        return len(order) / seconds(lambda: store.batch(order))

    table.add(what.format("warm", "one thread"), alternated(5, warm=rate)["warm"], least=5000, unit="slices/s")
    cold, many = what.format("cold", "one thread"), what.format("warm", f"{READERS} processes at once")
    if sys.platform != "linux":
        for row in (cold, many, "the same / one process"):
            table.skip(row, "only under Linux")
    else:
        files = sorted(store.folder.glob("*.npy"))
        if rates := [rate() for _ in range(3) if stores.forget(files)]:
            table.add(cold, statistics.median(rates), unit="slices/s")
        else:
            table.skip(cold, "this file system keeps its pages")
        found = alternated(3, one=partial(stores.read_at_once, store, 1),
                           many=partial(stores.read_at_once, store, READERS))
        table.add(many, found["many"], f"{found['many']:,.0f} slices/s in all ({os.cpu_count()} cores)")
        table.add("the same / one process", found["many"] / found["one"])
    args = ["--data", str(data), "--store", str(warm), "--out", str(folder / "runs"), "--arch", "resnet18",
            "--init", "random", "--image-size", "96", "--batch-size", "64", "--bn-group", "32", "--queue", "1024",
            "--epochs", "2"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train_ssl.main(args)
    log = runs.read_log(folder / "runs" / "moco" / "log.jsonl")
    table.add("share of an epoch spent waiting for data", statistics.fmean(r["data_share"] for r in log), most=0.02)


def startup(table: Table, folder: Path, s: Setting) -> None:
    """From imports done to the first batch on a store of the paper's size, of sparse files: it is opened, not read."""
    taken, what = {}, "imports done to first batch: 1,062 volumes, 215,325 slices in sparse files (opening)"
    for volumes, slices in ((106, 21_533), (1062, 215_325)):
        data, store = folder / f"d{volumes}", folder / f"s{volumes}"
        stores.write_store(data, store / f"pretrain-{SIDE}", volumes, slices)
        steps = 0 if volumes == 1062 and not s.quick else 40  # 0: an epoch
        out = subprocess.run([sys.executable, "-c", stores.START, *map(str, (data, store, volumes, steps))], text=True,
                             capture_output=True, cwd=ROOT)
        if out.returncode:
            table.skip(what, out.stderr.strip().splitlines()[-1], most=3, unit="s")
            return
        taken[volumes], first, settled, later = json.loads(out.stdout.splitlines()[-1])
    table.add(what, taken[1062], most=3, unit="s")
    table.add("resident memory of the main process then", first, most=1, unit="GiB")
    table.add(f"resident memory after {steps or 'an epoch of 840'} batches / after 10", later / settled,
              f"{later / settled:.3f} ({later:.2f} GiB)", most=1.02)
    table.add("growth: start-up with 10 times the slices", taken[1062] / taken[106])


SEGMENTATION = {"linear-frozen": 1.25, "linear-finetune": 1.25, "deeplabv3plus": None}  # whose decoder is no overhead


def segmentation(table: Table, s: Setting) -> None:
    """One iteration of each protocol against its dilated backbone alone: forward and, where it is trained, backward."""
    side = 96 if s.quick else 224
    for protocol, most in SEGMENTATION.items():
        trainer, read = s.segmentation(protocol, side)
        model, batch = trainer.model, trainer.args.batch_size
        ready = torch.randn(batch, 3, side, side, device=s.device).contiguous(memory_format=torch.channels_last)

        def bare(model=model, ready=ready) -> None:
            with processes.autocast(s.amp, s.device):
                layer4 = model.features(ready)[3]
            if not model.frozen:
                layer4.float().mean().backward()
                model.zero_grad()

        found = medians(s.repeats, iteration=lambda t=trainer, read=read: t.step(0, read), bare=bare)
        ratio = found["iteration"] / found["bare"]
        table.add(f"{protocol} iteration, {batch} crops of {side} px / bare forward"
                  f"{'' if model.frozen else ' and backward'}, {s.arch} at stride 8", ratio,
                  f"{ratio:.3f} ({1000 * found['iteration']:.1f} ms / {1000 * found['bare']:.1f} ms)", most=most)


MEMORY = """
import re, sys
from pathlib import Path
from tools.setting import Setting
s = Setting(False)
s.batch = int(sys.argv[1])
s.trainer("--local", "--zca", "--groups-per-pass", "1").step(0, s.slices())
# not getrusage: a started process inherits the peak of the one that starts it
print(int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**20)
"""


def memory(table: Table, s: Setting) -> None:
    """Peak memory of the paper's step group by group, 8 groups against 2: the GPU's, or the process's."""
    what = "peak memory group by group, batch 256 as 8 x 32 / batch 64 as 2 x 32, --local --zca"
    if s.quick or (s.device.type == "cpu" and sys.platform != "linux"):
        table.skip(what, "--quick" if s.quick else "on a CPU only under Linux", most=1.3)
        return
    peak = gpu_memory if s.device.type == "cuda" else cpu_memory
    small, large = peak(64), peak(256)
    shown = f"{large / small:.2f} ({large:.2f} GiB / {small:.2f} GiB; {s.device.type})"
    table.add(what, large / small, shown, most=1.3)


def cpu_memory(batch: int) -> float:
    """GiB of a process of its own at the peak of a step."""
    command = [sys.executable, "-c", MEMORY, str(batch)]
    return float(subprocess.run(command, text=True, capture_output=True, check=True, cwd=ROOT).stdout)


def gpu_memory(batch: int) -> float:
    """GiB that torch has allocated at the peak of a step, the second one: the first also makes the momentum buffers."""
    s, before = Setting(False), torch.cuda.memory_allocated()  # what other rows still hold
    s.batch = batch
    trainer, slices = s.trainer("--local", "--zca", "--groups-per-pass", "1"), s.slices()
    trainer.step(0, slices)
    torch.cuda.reset_peak_memory_stats()
    trainer.step(1, slices)
    return (torch.cuda.max_memory_allocated() - before) / 2**30


@launch.command
def main(argv: list[str] | None = None) -> None:
    """All rows, as Markdown or JSON."""
    parser = Parser(prog="python -m tools.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="small networks, at most 2 minutes")
    parser.add_argument("--peers", action="store_true", help="lightly, kornia and torchvision's transforms beside ours")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args(argv)
    for peer in ("lightly", "kornia"):
        if args.peers and not importlib.util.find_spec(peer):
            raise BadInput(f"{peer} is not installed: pip install -r requirements-bench.txt")
    s, table = Setting(args.quick, args.peers), Table(args.json)
    machine = {"hardware": processes.hardware(), "commit": origin.commit(), "date": time.strftime("%Y-%m-%d"),
               "precision": s.amp, "flags": cpu_flags()}
    if not args.json:
        print("; ".join(f"{k}: {v}" for k, v in machine.items()))
        print("\n| what | target | figure | met |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        views(table, s)
        preparing(table, Path(folder), s)
        reading(table, Path(folder))
        startup(table, Path(folder), s)
        segmentation(table, s)
        steps(table, s)
        if not s.quick:
            small = Setting(True)
            small.repeats = 10  # short steps vary
            steps(table, small)
        queue_growth(table)
        lightly_step(table, s)
        memory(table, s)
        end_to_end(table, s, Path(folder))
    if args.json:
        print(json.dumps({**machine, "rows": table.rows}))


if __name__ == "__main__":
    main()
