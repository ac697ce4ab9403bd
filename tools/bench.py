"""Speed, as ratios taken in one run (A B A B, medians), since absolute times drift on shared machines.

    python -m tools.bench             every row with its target; at most 10 minutes on 2 CPU cores
    python -m tools.bench --quick     small networks, at most 2 minutes: is anything broken?
    python -m tools.bench --peers     lightly, kornia and torchvision's transforms beside ours (requirements-bench.txt)

bare step: query forward and backward plus key forward of the encoder alone, same type, layout and groups.
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
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import nn

import augment
import datasets
import train_ssl
from ct import prepare
from ct.command import Parser
from ct.volumes import BadInput
from engine import backbones, processes, runs
from segment import Segmenter

ROOT = Path(__file__).parent.parent
SIDE = 512  # of the slices on disk
NO_GPU = "no GPU here"
PAPER_BATCH = 256
PAPER_STEPS = 200 * ((215_325 - datasets.HELD_OUT) // PAPER_BATCH)


class Table:
    """Rows (what, target, figure, met); printed as they come."""

    def __init__(self, quiet: bool):
        self.rows, self.quiet = [], quiet

    def add(self, what: str, figure: float | None, target: str = "", text: str = "", met: bool | None = None) -> None:
        text = text or f"{figure:.3g}"
        self.rows.append({"what": what, "target": target, "figure": figure, "text": text, "met": met})
        if not self.quiet:
            mark = {None: "", True: "yes", False: "NO"}[met]
            print(f"| {what} | {target} | {text} | {mark} |", flush=True)

    def skip(self, what: str, target: str, why: str) -> None:
        self.add(what, None, target, f"not measured: {why}")


def medians(repeats: int, **work: Callable) -> dict[str, float]:
    """Seconds of each callable: one round to warm up, then A B A B; medians."""
    times = {name: [] for name in work}
    for round_ in range(repeats + 1):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


class Setting:
    """What is timed: the paper's network, or a small one with --quick."""

    def __init__(self, quick: bool, peers: bool = False):
        self.quick, self.peers = quick, peers
        self.without_peers = "only with --peers, where lightly and kornia are installed (requirements-bench.txt)"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.ranks = processes.Processes(0, 1, self.device)
        self.amp = processes.precision("auto", self.device)
        self.arch, self.size, self.batch, self.group = ("resnet18", 96, 32, 16) if quick else ("resnet50", 224, 64, 32)
        self.queue, self.repeats = (4096, 3) if quick else (65536, 2)
        if self.device.type == "cuda" and not quick:
            self.batch, self.repeats = 256, 10

    def trainer(self, *flags: str, amp: str | None = None, queue: int | None = None) -> train_ssl.Trainer:
        args = train_ssl.parse(["--arch", self.arch, "--init", "random", "--image-size", str(self.size), "--batch-size",
                                str(self.batch), "--bn-group", str(self.group), "--queue", str(queue or self.queue),
                                *flags])
        train_ssl.settle(args, False)
        batches = datasets.Batches(args, 10 * self.batch, self.ranks)
        return train_ssl.Trainer(args, train_ssl.build(args), batches, self.ranks, amp or self.amp)

    def slices(self) -> torch.Tensor:
        return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (self.batch, SIDE, SIDE), np.uint8))

    def bare(self, trainer: train_ssl.Trainer, amp: str | None = None) -> Callable:
        """Query forward and backward plus key forward of the trainer's encoders, group by group, and nothing else."""
        views = torch.randn(self.batch, 3, self.size, self.size, device=self.device)
        query, key = trainer.moco.encoder_q, trainer.moco.encoder_k

        def step() -> None:
            for part in views.split(self.group):
                with torch.no_grad(), processes.autocast(amp or self.amp, self.device):
                    key(part)
            for part in views.split(self.group):
                with processes.autocast(amp or self.amp, self.device):
                    loss = query(part)[1].float().mean()
                loss.backward()
            query.zero_grad(set_to_none=True)

        return step


def steps(table: Table, s: Setting) -> None:
    """The full step against the bare step, plain and with both contributions; the step's growth with the queue."""
    what = f"{s.arch}, {s.size} px, batch {s.batch} as {s.batch // s.group} x {s.group}, {s.amp}"
    slices, plain = s.slices(), s.trainer()
    ours, aligned = s.trainer("--local", "--zca"), s.trainer("--local", "--zca", "--geometric")
    found = medians(s.repeats, bare=s.bare(plain), moco=lambda: plain.step(0, slices),
                    both=lambda: ours.step(0, slices), aligned=lambda: aligned.step(0, slices))
    for name, flags, target in (("moco", "", 1.06), ("both", " --local --zca", 1.11),
                                ("aligned", " --local --zca --geometric", 1.13)):
        ratio = found[name] / found["bare"]
        table.add(f"full step{flags} / bare step, {what}", ratio, f"at most {target}",
                  f"{ratio:.3f} ({found[name]:.2f} s / {found['bare']:.2f} s)", ratio <= target)
    small = Setting(True)
    times = {str(q): small.trainer(queue=q) for q in (4096, 65536)}
    grown = medians(6, **{q: (lambda t=t: t.step(0, small.slices())) for q, t in times.items()})
    table.add("growth: small step with a queue of 65,536 / of 4,096", grown["65536"] / grown["4096"])


END_TO_END = (("MoCo v2", (), 0.95), ("--local --zca", ("--local", "--zca"), 0.92),
              ("--local --zca --compile", ("--local", "--zca", "--compile"), 0.92))


def end_to_end(table: Table, s: Setting, folder: Path) -> None:
    """On a GPU: from a store through views to the optimizer step, against bare compute and torchvision's loader."""
    whole, loader = "store to step, {} / bare compute", "store to step, MoCo v2 / torchvision's PIL views, float32"
    alone, hours = "two views 512 -> 224, batched", "the paper's 200 epochs, {} (projection)"
    if s.device.type != "cuda":
        for name, _, target in END_TO_END:
            table.skip(whole.format(name), f"at least {target}", NO_GPU)
            table.skip(hours.format(name), "under 6 hours", NO_GPU)
        table.skip(loader, "at least 3", NO_GPU)
        table.skip(alone, "", NO_GPU)
        return
    _sparse_store(folder / "gpu-data", folder / "gpu" / f"pretrain-{SIDE}", 100, 20_000)
    store = datasets.prepare(folder / "gpu-data", folder / "gpu", "pretrain", size=SIDE)
    steps, rates = range(20), {}
    for name, flags, target in END_TO_END:
        trainer = s.trainer(*flags)

        def fetch(t: int, batches=trainer.batches) -> torch.Tensor:
            return torch.from_numpy(store.batch(batches.indices(t % batches.steps_per_epoch))).pin_memory()

        def run(trainer=trainer, fetch=fetch) -> None:
            for t, slices in datasets.prefetch(fetch, steps, os.cpu_count()):
                trainer.step(t, slices)

        bare = s.bare(trainer)
        found = medians(3, whole=run, bare=lambda bare=bare: [bare() for _ in steps])
        ratio, rates[name] = found["bare"] / found["whole"], len(steps) * s.batch / found["whole"]
        table.add(whole.format(name), ratio, f"at least {target}", f"{ratio:.3f} ({rates[name]:.0f} images/s)",
                  ratio >= target)
        needed = PAPER_STEPS * PAPER_BATCH / rates[name] / 3600
        table.add(hours.format(name), needed, "under 6 hours", f"{needed:.1f} hours", needed < 6)
    peer = medians(1, peer=pil_epoch(s, store, len(steps)))["peer"]
    ratio = rates["MoCo v2"] / (len(steps) * s.batch / peer)
    table.add(loader, ratio, "at least 3", None, ratio >= 3)
    slices, drawn = s.slices().to(s.device), augment.draw(processes.rng(0, processes.VIEW_Q), s.batch)
    rate = s.batch / medians(10, views=lambda: [augment.apply(slices, drawn, 224) for _ in "ab"])["views"]
    table.add(alone, rate, "", f"{rate:.0f} pairs/s")


def pil_epoch(s: Setting, store: datasets.Store, steps: int) -> Callable:
    """Steps as most people write them: torchvision's transforms on PIL images in a DataLoader, float32 compute."""
    from PIL import Image

    transform, bare = pil_transform(3), s.bare(s.trainer(amp="off"), "off")

    class Views(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return (steps + 1) * s.batch

        def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
            picture = Image.fromarray(store.slice(i)).convert("RGB")
            return transform(picture), transform(picture)

    loader = torch.utils.data.DataLoader(Views(), s.batch, num_workers=os.cpu_count(), persistent_workers=True)

    def run() -> None:
        for _, pair in zip(range(steps), loader, strict=False):
            [view.to(s.device) for view in pair]
            bare()

    return run


def views(table: Table, s: Setting) -> None:
    """Two views of a 512 slice at 224 on one thread, ours and the peers'."""
    slices, threads = s.slices()[:32], torch.get_num_threads()
    torch.set_num_threads(1)

    def ours() -> None:
        for purpose in (processes.VIEW_Q, processes.VIEW_K):
            augment.apply(slices, augment.draw(processes.rng(0, purpose), len(slices)), 224)

    work = {"ours": ours} | peers_views(s, slices[:8])
    found = {name: (32 if name == "ours" else 8) / seconds for name, seconds in medians(5, **work).items()}
    torch.set_num_threads(threads)
    table.add("two views 512 -> 224, one thread", found["ours"], "at least 600 pairs/s",
              f"{found['ours']:.0f} pairs/s", found["ours"] >= 600)
    for name, target in (("lightly's MoCoV2Transform", 3), ("torchvision v2 on PIL, 3 channels", 0),
                         ("torchvision v2 on PIL, 1 channel, no hue", 0), ("kornia, batched", 0)):
        what, goal = f"the same against {name}", f"at least {target} times" if target else ""
        if name in found:
            ratio = found["ours"] / found[name]
            table.add(what, ratio, goal, f"{ratio:.1f} times ({found[name]:.0f} pairs/s)",
                      ratio >= target if target else None)
        else:
            table.skip(what, goal, s.without_peers)


def peers_views(s: Setting, slices: torch.Tensor) -> dict[str, Callable]:
    """What makes two views of each of these slices (N, 512, 512) in the libraries that --peers found."""
    if not s.peers:
        return {}
    import kornia.augmentation as K
    from lightly.transforms import MoCoV2Transform
    from PIL import Image

    pictures = [Image.fromarray(x.numpy()) for x in slices]
    coloured, light = [p.convert("RGB") for p in pictures], MoCoV2Transform(input_size=224)
    batched = nn.Sequential(
        K.RandomResizedCrop((224, 224), (0.2, 1.0)), K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2), K.RandomGaussianBlur((23, 23), (0.1, 2.0), p=0.5), K.RandomHorizontalFlip(),
        K.Normalize(torch.full((3,), 0.45), torch.full((3,), 0.225)))
    three, one = pil_transform(3), pil_transform(1)
    return {"lightly's MoCoV2Transform": lambda: [light(p) for p in coloured],
            "torchvision v2 on PIL, 3 channels": lambda: [three(p) for p in coloured for _ in "ab"],
            "torchvision v2 on PIL, 1 channel, no hue": lambda: [one(p) for p in pictures for _ in "ab"],
            "kornia, batched": lambda: [batched(slices[:, None].expand(-1, 3, -1, -1).float() / 255) for _ in "ab"]}


def pil_transform(channels: int) -> Callable:
    """MoCo v2's view of a PIL image by torchvision: for 3 channels with hue and grayscale, for 1 without."""
    from torchvision.transforms import v2

    jitter = v2.ColorJitter(0.4, 0.4, *((0.4, 0.1) if channels == 3 else ()))
    return v2.Compose([
        v2.RandomResizedCrop(224, (0.2, 1.0)), v2.RandomApply([jitter], 0.8),
        *[v2.RandomGrayscale(0.2)] * (channels == 3), v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], 0.5),
        v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.45] * channels, [0.225] * channels)])


def lightly_step(table: Table, s: Setting) -> None:
    """Our step --local --zca, views included, against lightly's MoCo step on ready-made views."""
    compared = (("shipped", f"as both ship (ours {s.amp}, channels_last, theirs float32 NCHW)", 3.3),
                ("full", "both in float32", 1.2))
    if not s.peers:
        for _, words, target in compared:
            table.skip(f"lightly's MoCo step / our step --local --zca, {words}", f"at least {target}", s.without_peers)
        return
    import torchvision
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import batch_shuffle, batch_unshuffle, deactivate_requires_grad, update_momentum

    def encoder() -> nn.Module:
        net = torchvision.models.get_model(s.arch, weights=None)
        width, net.fc = net.fc.in_features, nn.Identity()
        return nn.Sequential(net, MoCoProjectionHead(width, width, 128))

    query, key = encoder(), encoder()
    deactivate_requires_grad(key)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(s.queue, 128))
    optimizer = torch.optim.SGD(query.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    a, b = torch.randn(2, s.batch, 3, s.size, s.size)

    def peer() -> None:
        update_momentum(query, key, m=0.999)
        embedding = query(a)
        with torch.no_grad():
            shuffled, order = batch_shuffle(b)
            keys = batch_unshuffle(key(shuffled), order)
        loss = criterion(embedding, keys)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    slices, ours = s.slices(), {"full": s.trainer("--local", "--zca", amp="off")}
    if s.amp != "off":
        ours["shipped"] = s.trainer("--local", "--zca")
    found = medians(1 if not s.quick else 2, peer=peer,
                    **{name: (lambda t=t: t.step(0, slices)) for name, t in ours.items()})
    for name, words, target in compared:
        if name not in found:  # one and the same step
            found[name], words = found["full"], words + "; no hardware here computes in bf16"
        ratio = found["peer"] / found[name]
        table.add(f"lightly's MoCo step / our step --local --zca, {words}", ratio, f"at least {target}",
                  f"{ratio:.2f} ({found['peer']:.2f} s / {found[name]:.2f} s)", ratio >= target)


def reading(table: Table, folder: Path, s: Setting) -> None:
    """Random slices from a warm store; the decoding of volumes; how both grow."""
    rng = np.random.default_rng(0)
    data, depth, count = folder / "data", 64, 4 if s.quick else 8
    data.mkdir()
    for i in range(count):
        noise = rng.integers(-1000, 1000, (SIDE, SIDE, depth)).astype(np.int16)
        nib.save(nib.Nifti1Image(noise, np.diag([-0.8, -0.8, 2.5, 1])), data / f"{i}.nii.gz")
    files = sorted(data.iterdir())
    made = iter(range(1000))

    def prepare(workers: int, count: int = count) -> None:
        some = folder / f"some{count}"
        if not some.exists():
            some.mkdir()
            for f in files[:count]:
                os.link(f, some / f.name)
        datasets.prepare(some, folder / f"store{next(made)}", "pretrain", size=SIDE, workers=workers)

    def decode() -> None:
        for f in files:
            np.asarray(nib.load(f).dataobj)

    found = medians(2 if s.quick else 3, decode=decode, one=lambda: prepare(1), two=lambda: prepare(2),
                    half=lambda: prepare(1, count // 2))
    for name, words, target in (("one", "prepare, one process", 0.85), ("two", "prepare, two processes", 1.8)):
        ratio = found["decode"] / found[name]
        table.add(f"{words}, against nibabel's bare decoding of the same files", ratio, f"at least {target}", None,
                  ratio >= target)
    table.add(f"growth: prepare of {count} volumes / of {count // 2}", found["one"] / found["half"])
    store = datasets.prepare(data, folder / "warm", "pretrain", size=SIDE, workers=2)
    order = rng.permutation(len(store))
    rate = len(store) / medians(5, read=lambda: store.batch(order))["read"]
    table.add(f"random batch of {SIDE} x {SIDE} slices from a warm store, one thread", rate, "at least 5,000 slices/s",
              f"{rate:,.0f} slices/s", rate >= 5000)
    args = ["--data", str(data), "--store", str(folder / "warm"), "--out", str(folder / "runs"), "--arch", "resnet18",
            "--init", "random", "--image-size", "96", "--batch-size", "64", "--bn-group", "32", "--queue", "1024",
            "--epochs", "2"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train_ssl.main(args)
    log = runs.read_log(folder / "runs" / "moco" / "log.jsonl")
    share = statistics.fmean(r["data_share"] for r in log)
    table.add("share of an epoch spent waiting for data", share, "under 0.02", None, share < 0.02)


START = """
import json, resource, sys, time
import numpy as np, torch, torchvision, nibabel
import datasets, train_ssl
from engine import processes
from pathlib import Path
def memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30
data, store, volumes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
start = time.perf_counter()
args = train_ssl.parse(["--init", "random"]); train_ssl.settle(args, False)
opened = datasets.prepare(data, store, "pretrain", size=512)
batches = datasets.Batches(args, len(opened), processes.Processes(0, 1, torch.device("cpu")))
opened.batch(batches.indices(0))
seconds, first = time.perf_counter() - start, memory()
steps = int(sys.argv[4]) or batches.steps_per_epoch
for t, _ in datasets.prefetch(lambda t: opened.batch(batches.indices(t)), range(steps), 2):
    if t == 10: settled = memory()
print(json.dumps([seconds, first, settled, memory()]))
"""


def startup(table: Table, folder: Path, s: Setting) -> None:
    """From imports done to the first batch on a store of the paper's size, made of sparse files."""
    seconds = {}
    for volumes, slices in ((106, 21_533), (1062, 215_325)):
        data, store = folder / f"d{volumes}", folder / f"s{volumes}"
        _sparse_store(data, store / "pretrain-512", volumes, slices)
        steps = 0 if volumes == 1062 and not s.quick else 40  # 0: an epoch
        out = subprocess.run([sys.executable, "-c", START, str(data), str(store), str(volumes), str(steps)], text=True,
                             capture_output=True, cwd=ROOT)
        if out.returncode:
            table.skip("start-up on a store of the paper's size", "under 3 s", out.stderr.strip().splitlines()[-1])
            return
        seconds[volumes], first, settled, later = json.loads(out.stdout.splitlines()[-1])
    table.add("imports done to first batch: 1,062 volumes, 215,325 slices", seconds[1062], "under 3 s",
              f"{seconds[1062]:.2f} s", seconds[1062] < 3)
    table.add("resident memory of the main process then", first, "under 1 GiB", f"{first:.2f} GiB", first < 1)
    table.add(f"resident memory after {steps or 'an epoch of 840'} batches / after 10", later / settled, "flat: 1.02",
              f"{later / settled:.3f} ({later:.2f} GiB)", later / settled < 1.02)
    table.add("growth: start-up with 10 times the slices", seconds[1062] / seconds[106])


def _sparse_store(data: Path, store: Path, volumes: int, slices: int) -> None:
    """Files of the right names and sizes without content, with the records that `prepare` would have written."""
    data.mkdir()
    store.mkdir(parents=True)
    ends = np.linspace(0, slices, volumes + 1).astype(int)
    header = np.lib.format.header_data_from_array_1_0(np.empty((1, SIDE, SIDE), np.uint8))
    for i, depth in enumerate(np.diff(ends).tolist(), 1):
        image = data / f"Case_{i:05d}_0000.nii.gz"
        image.touch()
        with open(store / f"Case_{i:05d}.npy", "wb") as f:
            np.lib.format.write_array_header_1_0(f, header | {"shape": (depth, SIDE, SIDE)})
            f.truncate(f.tell() + depth * SIDE * SIDE)
        record = {"id": f"Case_{i:05d}", "phantom": False, "spacing": [1.0, 1.0, 1.0], "shape": [depth, SIDE, SIDE],
                  "hu": [-1000.0, 1000.0], "content": "", "slices": depth, "height": SIDE, "width": SIDE,
                  "source": {"image": prepare._stamp(image) | {"checksum": ""}, "label": None}, "odd": [],
                  "format": prepare.FORMAT, "window": list(prepare.WINDOW), "size": SIDE, "file": str(image),
                  "checksums": {f"Case_{i:05d}.npy": ""}}
        (store / f"Case_{i:05d}.json").write_text(json.dumps(record))


def segmentation(table: Table, s: Setting) -> None:
    """One iteration of the frozen linear protocol against the bare forward of its dilated backbone."""
    side = 96 if s.quick else 224
    torch.manual_seed(0)
    model = Segmenter(backbones.architecture(s.arch), "linear-frozen").to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, momentum=0.9)
    rng = np.random.default_rng(0)
    slices = [torch.from_numpy(rng.integers(0, 256, (SIDE, SIDE), np.uint8)) for _ in range(16)]
    labels = [torch.from_numpy(rng.integers(0, 14, (SIDE, SIDE), np.uint8)) for _ in range(16)]

    def iteration() -> None:
        drawn = augment.draw_crops(processes.rng(0, processes.CROPS), 16)
        images, masks = augment.apply_crops(slices, labels, drawn, side)
        with processes.autocast(s.amp, torch.device("cpu")):
            loss = model(images, masks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ready = torch.randn(16, 3, side, side).contiguous(memory_format=torch.channels_last)

    def bare() -> None:
        with torch.no_grad(), processes.autocast(s.amp, torch.device("cpu")):
            model.features(ready)

    found = medians(s.repeats, iteration=iteration, bare=bare)
    ratio = found["iteration"] / found["bare"]
    table.add(f"linear-frozen iteration, 16 crops of {side} px / bare forward, {s.arch} at stride 8", ratio,
              "at most 1.25", f"{ratio:.3f} ({found['iteration']:.2f} s / {found['bare']:.2f} s)", ratio <= 1.25)


MEMORY = """
import re, sys
from pathlib import Path
import torch
from tools import bench
s = bench.Setting(False)
s.batch = int(sys.argv[1])
s.trainer("--local", "--zca").step(0, s.slices())
# not getrusage: a started process inherits the peak of the one that starts it
print(int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**20)
"""


def memory(table: Table, s: Setting) -> None:
    """Peak memory of the paper's step, batch 256 as 8 x 32, against batch 64 as 2 x 32."""
    what = "peak memory, batch 256 as 8 x 32 / batch 64 as 2 x 32, --local --zca"
    if s.quick or s.device.type == "cuda" or sys.platform != "linux":
        table.skip(what, "at most 1.3", "--quick" if s.quick else "measured on a CPU under Linux")
        return
    peaks = [float(subprocess.run([sys.executable, "-c", MEMORY, batch], text=True, capture_output=True, check=True,
                                  cwd=ROOT).stdout) for batch in ("64", "256")]
    ratio = peaks[1] / peaks[0]
    table.add(what, ratio, "at most 1.3",
              f"{ratio:.2f} ({peaks[1]:.2f} GiB / {peaks[0]:.2f} GiB)", ratio <= 1.3)


@processes.command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m tools.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="small networks, at most 2 minutes")
    parser.add_argument("--peers", action="store_true", help="lightly, kornia and torchvision's transforms beside ours")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args(argv)
    for peer in ("lightly", "kornia") if args.peers else ():
        if not importlib.util.find_spec(peer):
            raise BadInput(f"{peer} is not installed: pip install -r requirements-bench.txt")
    s, table = Setting(args.quick, args.peers), Table(args.json)
    machine = {"hardware": processes.hardware(), "commit": processes.commit(), "date": time.strftime("%Y-%m-%d"),
               "precision": s.amp, "flags": _cpu_flags()}
    if not args.json:
        print("; ".join(f"{k}: {v}" for k, v in machine.items()))
        print("\n| what | target | figure | met |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        views(table, s)
        reading(table, Path(folder), s)
        startup(table, Path(folder), s)
        segmentation(table, s)
        steps(table, s)
        lightly_step(table, s)
        memory(table, s)
        end_to_end(table, s, Path(folder))
    if args.json:
        print(json.dumps({**machine, "rows": table.rows}))


def _cpu_flags() -> str:
    try:
        found = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    except (OSError, IndexError):
        return "unknown"
    return " ".join(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in found)


if __name__ == "__main__":
    main()
