"""Processes, precision, seeds, checkpoints, the run folder, backbones from files: what every script needs around
its loop.

Exit codes of the scripts: 0 done; 1 data, files or disk are at fault, as one line on stderr says; 2 wrong flags;
143 and 130 (128 + signal) stopped by SIGTERM or SIGINT after saving. torchrun reports any of these but 0 as 1.
After 1, once its cause is gone, and after a signal, SIGKILL too, the same command continues where it was.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from segment import checksum
from volumes import BadInput
from whitening import fold, to_batch_norm, whiten_last_norm

# Purposes of random numbers: SeedSequence([seed, purpose, step or epoch]) is a stream of its own.
INIT, SLICES, VIEW_Q, VIEW_K, SHUFFLE, PATCHES, CROPS, DROPOUT, SIGNS = range(9)
MAKE_ROOM = "make room there and run the same command again"
IMAGENET = "IMAGENET1K_V1"  # torchvision's first weights, the ones mmselfsup and mmsegmentation start from


# ---------------------------------------------------------------------------------------------- commands


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the flags the scripts share."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")

    def common(self) -> None:
        add = self.add_argument
        add("--data", type=Path, help="folder of CT volumes (default: %s, else the built-in phantom)")
        add("--store", type=Path, help="folder of the prepared slices (default stores/NAME_OF_DATA)")
        add("--out", type=Path, default=Path("runs"), help="folder of all runs and results (default runs)")
        add("--seed", type=int, default=0)
        add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
            help="mixed precision; auto: bf16 where the hardware computes in it")
        add("--workers", type=int, default=2, help="threads that read slices (and processes that prepare them)")
        add("--window", type=float, nargs=2, default=(-175.0, 250.0), metavar=("LOW", "HIGH"), help="HU window")


def command(main):
    """Wrap a script's main(argv): BadInput becomes one line on stderr and exit code 1, Ctrl-C one line and 130."""

    @wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except BadInput as e:
            if int(os.environ.get("RANK", 0)) == 0:  # every process found the same; one line is enough
                print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr)
            raise SystemExit(1) from None
        except KeyboardInterrupt:  # outside the training loop, where StopRequest is not at work
            print(f"{Path(sys.argv[0]).name}: interrupted; the same command continues", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None
        finally:
            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()

    return wrapped


# ---------------------------------------------------------------------------------------- processes, numbers


@dataclass(frozen=True)
class Processes:
    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """True on every process if it is true on one."""
        if self.world == 1:
            return flag
        votes = torch.tensor(float(flag))  # on the CPU: a GPU's steps in flight need not be waited for
        dist.all_reduce(votes)
        return votes.item() > 0


def start() -> Processes:
    """Join the processes that torchrun started, or be the only one: NCCL between GPUs, gloo between CPUs."""
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= torch.cuda.device_count():
        raise BadInput(f"process {local} of this machine has no GPU of its own ({torch.cuda.device_count()} found); "
                       "lower --nproc-per-node")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        store, rank, world = next(rendezvous("env://"))
        # torchrun keeps its store through a restart, and in it the addresses of the processes that died
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=30), store=store,
                                rank=rank, world_size=world)
        return Processes(dist.get_rank(), dist.get_world_size(), device)
    return Processes(0, 1, device)


def on_main(main: bool, work):
    """work() by the main process alone: its result, or the BadInput it raised, on every process."""
    result = error = None
    if main:
        try:
            result = work()
        except BadInput as e:
            error = str(e)
    if dist.is_available() and dist.is_initialized():
        told = [(result, error)]
        dist.broadcast_object_list(told)
        result, error = told[0]
    if error is not None:
        raise BadInput(error)
    return result


def precision(amp: str, device: torch.device) -> str:
    """Resolve --amp to bf16, fp16 or off. Raises BadInput where the device cannot."""
    if device.type == "cuda":
        capable = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capable = any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("amx_tile", "avx512_bf16"))
    if amp == "auto":
        return "bf16" if capable else "off"
    if amp == "fp16" and device.type == "cpu":
        raise BadInput("--amp fp16 needs a GPU; use bf16 or off on a CPU")
    return amp


def autocast(amp: str, device: torch.device):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def rng(seed: int, purpose: int, step: int = 0) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, purpose, step]))


def seed_torch(seed: int, purpose: int, step: int = 0) -> None:
    """Seed torch's own generators (initial weights, dropout) from the same tree of seeds."""
    torch.manual_seed(int(np.random.SeedSequence([seed, purpose, step]).generate_state(1, np.uint64)[0]))


def hardware() -> str:
    """The device in words, with versions: kept beside every result."""
    if torch.cuda.is_available():
        name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        model = ""
        with contextlib.suppress(OSError):
            info = Path("/proc/cpuinfo").read_text()
            model = next((x.split(":")[1].strip() for x in info.splitlines() if x.startswith("model name")), "")
        name = f"{model or 'CPU'}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, torchvision {torchvision.__version__}"


def memory(device: torch.device) -> int:
    """Bytes of the device's memory, of the machine's for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def seed_suffix(seed: int) -> str:
    """What the names of runs with another seed than 0 end in."""
    return f"-seed{seed}" if seed else ""


def commit() -> str:
    """The commit of the code that runs, with + where the tree has changes; 'unknown' outside a clone."""
    run = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*run, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*run, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.strip() else "")


# ------------------------------------------------------------------------------------------------ the run folder


@contextlib.contextmanager
def _whole(path: Path):
    """A file that appears at `path` whole or not at all: written beside it, flushed to disk, renamed."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__  # torch's zip writer hides it in a RuntimeError
        if not isinstance(cause, OSError):
            raise
        raise BadInput(f"{path}: cannot be written ({cause.strerror}); {MAKE_ROOM}") from None
    finally:
        part.unlink(missing_ok=True)


def save(value: object, path: Path) -> None:
    """torch.save, whole or not at all. Raises BadInput when the disk is full or not writable."""
    with _whole(path) as f:
        torch.save(value, f)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all. Raises BadInput when the disk is full or not writable."""
    with _whole(path) as f:
        f.write(text.encode())


def append(path: Path, records: list[dict]) -> None:
    """Add JSON lines to a file, on disk when this returns. Raises BadInput when the disk is full or not writable."""
    try:
        with open(path, "ab+") as f:
            if f.tell():
                f.seek(-1, os.SEEK_END)
                if f.read(1) != b"\n":
                    f.write(b"\n")  # a line that a crash cut short stays alone
            f.write("".join(json.dumps(r) + "\n" for r in records).encode())
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise BadInput(f"{path}: cannot be written ({e.strerror}); {MAKE_ROOM}") from None


def read_log(path: Path) -> list[dict]:
    """The lines of a .jsonl file; what a crash cut short is left out."""
    records = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict)]


def load(path: Path, device: str | torch.device = "cpu"):
    """torch.load of tensors and plain values only.

    Raises BadInput for a file that is missing, unreadable, damaged (its checksums are verified, which torch.load
    alone does not do) or holds code.
    """
    try:
        if zipfile.is_zipfile(path):  # what torch.save writes since 1.6
            with zipfile.ZipFile(path) as z:
                if z.testzip():
                    raise BadInput(f"{path}: cannot be loaded (damaged: a checksum differs)")
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror or e})") from None
    except (BadInput, MemoryError):
        raise
    except Exception as e:  # zip, pickle and unpickling errors have no common base
        why = "it holds more than tensors" if "weights_only" in str(e).lower() else "damaged or no PyTorch file"
        raise BadInput(f"{path}: cannot be loaded ({why})") from None


class Run:
    """One run folder: config.json, log.jsonl, checkpoint.pt and the one before it. Only the main process writes.

    The same command continues it; a differing config is refused with the difference. While it is open, a
    second run on the folder is refused (the lock goes with the process, however it ends). Constructor and
    methods are called by all processes together: what one raises, all raise.
    """

    def __init__(self, folder: Path, config: dict, overwrite: bool, main: bool):
        self.folder, self.main = folder, main
        self.path, self.previous = folder / "checkpoint.pt", folder / "checkpoint.previous.pt"
        self.next, self.damaged = folder / "checkpoint.next.pt", folder / "checkpoint.damaged.pt"
        on_main(main, lambda: self._open(config, overwrite))

    def _open(self, config: dict, overwrite: bool) -> None:
        folder = self.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(folder / ".lock", "w")  # noqa: SIM115 (held as long as the run)
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            if e.filename:
                raise BadInput(f"{e.filename}: cannot be written ({e.strerror}); give another --out") from None
            raise BadInput(f"{folder}: another run is at work there; wait for it or give --name") from None
        except OSError as e:
            raise BadInput(f"{folder}: cannot be written or locked ({e.strerror}); give another --out") from None
        for part in folder.glob(".*.part"):  # of a run that was killed while it wrote
            part.unlink()
        if overwrite:
            for name in ("config.json", "log.jsonl", "validation.jsonl", "backbone.pth", "result.json", "dice.csv",
                         self.next.name, self.path.name, self.previous.name, self.damaged.name, "curves.png",
                         "validation.png", "overlays.png"):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / "predictions", ignore_errors=True)
        if (folder / "config.json").exists():
            self._compare(config)
        else:
            write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")

    def _compare(self, new: dict) -> None:
        try:
            old = json.loads((self.folder / "config.json").read_text())
        except ValueError:
            raise BadInput(f"{self.folder / 'config.json'}: damaged; start over with --overwrite") from None
        old, new = (dict(_flat(config)) for config in (old, json.loads(json.dumps(new))))
        differing = [f"{k}: {old.get(k)} there, {new.get(k)} here" for k in sorted({*old, *new})
                     if old.get(k) != new.get(k)]
        if differing:
            raise BadInput(f"{self.folder}: was started with other settings ({'; '.join(differing)}); "
                           "give the same ones, another --name, or --overwrite")

    def resume(self) -> dict | None:
        """The newest whole checkpoint, or None, on every process; the log is cut back to its step."""
        return on_main(self.main, self._resume)

    def _resume(self) -> dict | None:
        self._rotate()
        state = None
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            try:
                state = load(path)
                break
            except BadInput as e:
                print(f"{e}; going back to the checkpoint before it", file=sys.stderr)
        if state is None and (self.path.exists() or self.previous.exists()):
            raise BadInput(f"{self.folder}: no checkpoint there can be loaded; start over with --overwrite")
        if state and path == self.previous and self.path.exists():
            os.replace(self.path, self.damaged)  # out of the way: it must not take the good one's place
        log = self.folder / "log.jsonl"
        if log.exists():
            kept = [r for r in read_log(log) if state and r["step"] <= state["step"]]
            write_text(log, "".join(json.dumps(r) + "\n" for r in kept))
        return state

    def checkpoint(self, state: dict) -> None:
        """Save; the one before stays as checkpoint.previous.pt. Raises BadInput: full disk, weights not finite."""
        on_main(self.main, lambda: self._checkpoint(state))

    def _checkpoint(self, state: dict) -> None:
        if not all(t.isfinite().all() for t in _tensors(state)):
            raise BadInput(f"step {state['step']}: weights that are not finite; {self.last_good()}")
        save(state, self.next)
        self._rotate()

    def _rotate(self) -> None:
        """checkpoint.next.pt, which is whole, becomes checkpoint.pt; after a kill in between, at the next start."""
        if self.next.exists():
            if self.path.exists():
                os.replace(self.path, self.previous)
            os.replace(self.next, self.path)

    def last_good(self) -> str:
        return f"the last good checkpoint is {self.path}" if self.path.exists() else "no checkpoint was saved yet"

    def log(self, records: list[dict]) -> None:
        if records:
            on_main(self.main, lambda: append(self.folder / "log.jsonl", records))


def _flat(config: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """A config's settings with those of its parts under their full names, part.setting."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for v in value.values() if isinstance(value, dict) else value:
            yield from _tensors(v)


def mean_over_processes(values: Tensor, processes: Processes) -> Tensor:
    if processes.world > 1:
        dist.all_reduce(values)
        values = values / processes.world
    return values


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients: one pass over them on their device, nothing to wait for. Not finite if one is not."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.stack(torch._foreach_norm(grads)).norm()


def refuse_non_finite(records: list[dict], slices_of, run: Run) -> None:
    """Raise BadInput at the first step whose loss or grad_norm is NaN or infinite, with its slices.

    A grad_norm of None is passed over: a step that fp16's scaler has skipped.
    """
    for r in records:
        for key, name in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
            value = r.get(key)
            if value is not None and not np.isfinite(value):
                raise BadInput(f"step {r['step']}: the {name} is {value}; its slices: "
                               f"{', '.join(slices_of(r['step']))}; {run.last_good()}; lower --lr or try --amp off")


def announce_changes(saved: dict | None, amp: str, processes: Processes) -> None:
    """Say where the precision or the number of threads is not the checkpoint's: both move the last digits."""
    if saved and saved["amp"] != amp and processes.is_main:
        print(f"note: precision was {saved['amp']} and is {amp} from here on", file=sys.stderr)
    if saved and saved["threads"] != torch.get_num_threads() and processes.is_main and processes.device.type == "cpu":
        print(f"note: {torch.get_num_threads()} threads here, {saved['threads']} before; the last digits will move",
              file=sys.stderr)


def announce_phantom() -> None:
    print("=" * 100 + "\nTHE PHANTOM: no real CT was given (--data), so this runs on generated volumes with small "
          "settings.\nIts numbers say nothing about patients and are no AbdomenCT-1K or BTCV results.\n" + "=" * 100)


def duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if seconds >= 100 else f"{seconds:.0f} s"


class StopRequest:
    """SIGTERM and SIGINT ask the loop to save and stop at the end of its step; a second one ends at once.

    torchrun passes on to its workers what a cluster may have sent them already; under it, what comes within
    REPEAT seconds of the first is taken for a repetition.
    """

    REPEAT = 5.0

    def __enter__(self):
        self.signal, self.since = 0, 0.0
        self.before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        under_torchrun = dist.is_available() and dist.is_torchelastic_launched()
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
            if not under_torchrun:
                for n in self.before:
                    signal.signal(n, signal.SIG_DFL)
        elif time.monotonic() - self.since > self.REPEAT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @property
    def exit_code(self) -> int:
        """128 + signal; where only another process got it, 128 + SIGTERM."""
        return 128 + (self.signal or signal.SIGTERM)


# ---------------------------------------------------------------------------------------------------- backbones


def architecture(arch: str) -> nn.Module:
    """A torchvision ResNet by name, randomly initialised. Raises BadInput for an unknown name."""
    if not arch.startswith(("resnet", "wide_resnet", "resnext")) or arch not in torchvision.models.list_models():
        raise BadInput(f"--arch {arch}: no such ResNet in torchvision; try resnet50 or resnet18")
    return torchvision.models.get_model(arch, weights=None)


def resolve(name: str, out: Path, phantom: bool) -> str:
    """What a name of a backbone stands for: a run of `out` (`moco` also for `phantom-moco`, on the phantom) or the
    folder of one, imagenet, random or a file. Raises BadInput for none of them.
    """
    for run in (name, "phantom-" * phantom + name):
        if (out / run / "checkpoint.pt").exists():
            return run
    if (Path(name) / "checkpoint.pt").exists():
        return str(Path(name).resolve())
    if name in ("imagenet", "random") or Path(name).is_file():
        return name
    raise BadInput(f"{name}: no such run in {out} and no such file; pre-train it first (torchrun train_ssl.py --local "
                   "--zca) or name another")


def build_backbone(init: str, arch: str) -> nn.Module:
    """A ResNet with `init` imagenet | random | FILE. Raises BadInput when a file fits not or a download fails."""
    backbone = architecture(arch)
    if init == "random":
        return backbone
    if init == "imagenet":
        try:
            weights = torchvision.models.get_model_weights(arch)[IMAGENET].get_state_dict(progress=False)
        except Exception as e:  # URLError, HTTPError, timeouts, a hash that differs, a read-only cache
            raise BadInput(f"ImageNet weights of {arch} could not be downloaded ({type(e).__name__}); "
                           "use --init random, or --init FILE with weights downloaded elsewhere") from None
        backbone.load_state_dict(weights)
        return backbone
    return load_backbone(backbone, Path(init), arch)


def load_backbone(backbone: nn.Module, path: Path, arch: str) -> nn.Module:
    """Fill a ResNet from a file of torchvision-named weights (bare, or under state_dict or a known prefix)."""
    weights = load(path)
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else {}
    weights = {k: v for k, v in weights.items() if isinstance(v, Tensor)}
    for prefix in ("module.encoder_q.", "backbone.", "module."):  # MoCo's release, mmselfsup, DDP
        if any(k.startswith(prefix + "conv1") for k in weights):
            weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    own = {k: v for k, v in backbone.state_dict().items() if not k.startswith("fc.")}
    missing = [k for k in own if k not in weights]
    other = [k for k in own if k in weights and weights[k].shape != own[k].shape]
    extra = [k for k in weights if k not in own and not k.startswith("fc.")]
    if missing or other or extra:
        why = (f"{len(missing)} of {len(own)} weights missing, {len(other)} of another shape, {len(extra)} unknown, "
               f"first {(missing + other + extra)[0]}")
        raise BadInput(f"{path}: not a backbone of architecture {arch} ({why}); give the --arch it was trained with")
    backbone.load_state_dict({k: weights[k] for k in own}, strict=False)
    print(f"{path}: all {len(own)} weights of {arch} matched")
    return backbone


@dataclass(frozen=True)
class Backbone:
    """A network with what is known of its pre-training: what stands beside every number measured on it.

    pretraining: arch, checksum of the weights and, of a run, its step and horizon, the gap of its last look (see
    train_ssl.py), view_px and slice_px; those are None for a file, for ImageNet's and for random weights.
    """

    net: nn.Module
    name: str
    pretraining: dict


def open_backbone(name: str, out: Path, arch: str, seed: int, whitening: str, phantom: bool) -> Backbone:
    """A backbone by name, see `resolve`: a run of `out`, imagenet, random or a file (these of architecture `arch`).

    A run is read from its checkpoint; whitening: 'fold' it, or 'bn' for a plain BN in its place. Raises BadInput
    when there is no such thing, or where a run on the phantom would meet real CT, or the reverse.
    """
    seed_torch(seed, INIT)
    name = resolve(name, out, phantom)
    folder, state = out / name, {}
    if not (folder / "checkpoint.pt").exists():
        net = build_backbone(name, arch)
    else:
        if (json.loads((folder / "config.json").read_text())["data"] == "phantom") != phantom:
            raise BadInput(f"{folder}: was pre-trained on {'real CT' if phantom else 'the phantom'}; a backbone of the "
                           "phantom is measured on the phantom only, and no other there")
        state = load(folder / "checkpoint.pt")
        arch, net = state["arch"], architecture(state["arch"])
        if state["zca"]:
            whiten_last_norm(net, group_size=state["zca"][0], iterations=state["zca"][1])
        prefix = "encoder_q.backbone."
        weights = {k.removeprefix(prefix): v for k, v in state["model"].items() if k.startswith(prefix)}
        net.load_state_dict(weights | {k: v for k, v in net.state_dict().items() if k.startswith("fc.")})
        net = fold(net) if whitening == "fold" else to_batch_norm(net)
    known = {key: state.get(key) for key in ("step", "horizon", "gap", "view_px", "slice_px")}
    return Backbone(net, title_of(name), {"arch": arch, "checksum": checksum(net), **known})


def title_of(name: str) -> str:
    """The short name of a resolved backbone, for folders and tables: a run's own, a file's without its suffix."""
    return Path(name).stem if Path(name).is_file() else Path(name).name


def export(backbone: nn.Module) -> dict[str, Tensor]:
    """A backbone's weights under torchvision's names, whitening folded, without fc: what backbone.pth holds."""
    weights = fold(backbone).state_dict()
    return {k: v.detach().cpu().contiguous().clone() for k, v in weights.items() if not k.startswith("fc.")}
