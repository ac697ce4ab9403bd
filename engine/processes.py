"""Processes, precision, seeds: what every script needs around its loop (signals: signals.py).

Exit codes of the scripts: 0 done; 1 data, files or disk are at fault, as one line on stderr says; 2 wrong flags;
128 + signal (130, 143, 129, 138) stopped by SIGINT, SIGTERM, SIGHUP or SIGUSR1 after saving. torchrun reports any of
these but 0 as 1.
After 1, once its cause is gone, and after a signal, SIGKILL too, the same command continues where it was.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from ct import cgroup
from ct import command as ct_command
from ct.command import cause, cores, folder, number, whole
from ct.prepare import WINDOW
from ct.volumes import BadInput
from engine.signals import StopRequest as StopRequest  # of every loop

# Purposes of random numbers: SeedSequence([seed, purpose, step or epoch]) is a stream of its own.
INIT, SLICES, VIEW_Q, VIEW_K, SHUFFLE, PATCHES, CROPS, DROPOUT, LOOKS, PROBE = range(10)

PATIENCE = timedelta(minutes=30)  # with another process, before it counts as lost
ROOT = Path(__file__).parent.parent
READERS = 16  # threads of a process at most: each holds a batch


def readers() -> int:
    """How many threads of a process read slices where --workers says nothing: its share of the machine's cores."""
    return min(READERS, max(1, cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))))


class Parser(ct_command.Parser):
    """A command's parser with the flags that the scripts share."""

    def common(self, data: str, trains: bool = True) -> None:
        """data: the folder below data/ that is taken where --data is not given; trains: or only looks at features."""
        add = self.add_argument
        add("--data", type=Path, help=f"folder of CT volumes (default data/{data} if it exists, else the built-in "
            "phantom)")
        add("--store", type=folder, help="folder of the prepared slices (default stores/NAME-HASH of --data)")
        add("--out", type=folder, default=Path("runs"), help="folder of all runs and results (default runs)")
        add("--seed", type=whole(0), default=0, help="seed of all random numbers (%(default)s)")
        add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto" if trains else "off",
            help="mixed precision; auto: bf16 if the hardware computes in it (default %(default)s)")
        add("--deterministic", action="store_true", help="on a GPU: the same numbers from every run, also a continued "
            "one, at a lower speed (deterministic algorithms, no TF32); on a CPU that is always so")
        if trains:
            add("--checkpoint-minutes", type=number(0), default=10.0, help="minutes between two checkpoints, rounded "
                "up to a tenth step (default %(default)g); one is always written at the end and when you stop a run")
        add("--workers", type=whole(0), help="threads that read slices, and processes that prepare them (default: all "
            f"cores; for reading, divided by the processes on this machine and at most {READERS})")
        add("--window", type=number(), nargs=2, default=WINDOW, metavar=("LOW", "HIGH"),
            help=f"range of HU that becomes 0 to 255 ({WINDOW[0]:g} {WINDOW[1]:g})")

    def with_defaults(self, paper: dict, phantom: dict) -> Callable:
        """`add_argument`, whose help ends in the flag's default: `(the paper's) [the phantom's]`, or its own."""

        def add(flag: str, help: str = "", **kw) -> None:
            """One flag, as `add_argument` takes it."""
            key = flag.removeprefix("--").replace("-", "_")
            if paper.get(key):
                help += f" ({paper[key]})"
            elif kw.get("default"):
                help += " (%(default)s)"
            if phantom.get(key):
                help += f" [{phantom[key]}]"
            self.add_argument(flag, help=help, **kw)

        return add


def fill(args: argparse.Namespace, defaults: dict) -> None:
    """Set what the command line left open, in place."""
    for key, value in defaults.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)


def command(main):
    """`ct.command.command` for a script of torchrun: its variables are looked at before anything is done."""

    @ct_command.command
    @wraps(main)
    def wrapped(argv=None):
        """`main`, ending in one line also where memory is short; leaves the group of processes."""
        warnings.formatwarning = one_line
        try:
            launched()
            return main(argv)
        except (torch.OutOfMemoryError, RuntimeError) as e:
            if not isinstance(e, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(e):
                raise
            raise BadInput("not enough memory; lower --groups-per-pass, --batch-size, --queue or the sizes in pixels, "
                           "and run it again") from None
        finally:
            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()

    return wrapped


def one_line(message, category, filename, lineno, line=None, formatted=warnings.formatwarning) -> str:
    """A warning of this repository without the place in its code; others, whose place says whose they are, as Python
    has them.
    """
    own = Path(filename).is_relative_to(ROOT) and "site-packages" not in filename
    return f"warning: {message}\n" if own else formatted(message, category, filename, lineno, line)


def launched() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) that torchrun's variables give: (0, 1, 0) without them.

    Raises BadInput where they contradict each other or are incomplete.
    """
    numbers = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    for name in numbers:
        value = os.environ.get(name, str(numbers[name]))
        if not value.isdecimal():
            raise BadInput(f"{name}={value!r} in the environment: no number; start with torchrun, or unset {name}")
        numbers[name] = int(value)
    rank, world_size, local_rank, _ = numbers.values()
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT") if world_size > 1 else ()
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise BadInput(f"WORLD_SIZE={world_size} in the environment without {', '.join(missing)}; start with torchrun, "
                       "or unset WORLD_SIZE")
    if rank >= world_size:
        raise BadInput(f"RANK={rank} in the environment, but WORLD_SIZE={world_size}; start with torchrun, or unset "
                       "both")
    return rank, world_size, local_rank


@dataclass(frozen=True)
class Processes:
    """This process among those that train together (torch.distributed's words), and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """This process's part of a global batch."""
        own = batch // self.world_size
        return slice(self.rank * own, (self.rank + 1) * own)

    def any(self, flag: bool) -> bool:
        """True on every process if it is true on one."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor(float(flag))  # on the CPU: a GPU's steps in flight need not be waited for
        dist.all_reduce(votes)
        return votes.item() > 0


def start(deterministic: bool = False) -> Processes:
    """Join the processes that torchrun started, or be the only one: NCCL between GPUs, gloo between CPUs.

    deterministic: the same numbers from every run on the same GPU, whose atomics, TF32 and choice of convolutions
    else move the last digits.
    """
    cuda = torch.cuda.is_available()
    if "OMP_NUM_THREADS" not in os.environ and cores() < torch.get_num_threads():  # torch knows no quota
        torch.set_num_threads(cores())
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product on the GPU
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    _, world_size, local_rank = launched()
    # all of them find it, the one that says it, too
    here = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if cuda and here > torch.cuda.device_count():
        raise BadInput(f"{here} processes on this machine for {torch.cuda.device_count()} GPUs; lower "
                       "--nproc-per-node")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world_size > 1:
        try:
            store, rank, world_size = next(rendezvous("env://"))
            store = dist.PrefixStore(agree(store, rank, world_size), store)
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE,
                                    store=store, rank=rank, world_size=world_size)
        except (ValueError, dist.DistError) as e:  # an address that is no address, a port in use, no one there
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise BadInput(f"the other processes cannot be joined at {where} ({str(e).splitlines()[0]})") from None
        return Processes(dist.get_rank(), dist.get_world_size(), device)
    return Processes(0, 1, device)


def agree(store: dist.Store, rank: int, world_size: int, poll: float = 0.05) -> str:
    """A token of this start, the same on all its processes and new: the prefix of all they write into the store.

    torchrun keeps its store through restarts, and in it what processes wrote that died since; its count of restarts
    is each machine's own. So a process leaves a fresh name, and takes the token only of a roster that has this name;
    rank 0 writes the roster anew until every process of it has taken its token, and then lets all go on.
    """
    own, since, announced = uuid.uuid4().hex, time.monotonic(), False
    store.set(f"name/{rank}", own)
    roster: dict = {"names": []}
    while True:
        missing = [r for r in range(world_size) if not store.check([f"name/{r}"])] if rank == 0 else []
        if rank == 0 and not missing:
            names = [store.get(f"name/{r}").decode() for r in range(world_size)]
            if names != roster["names"]:
                roster = {"token": uuid.uuid4().hex, "names": names}
                store.set(f"taken/{roster['token']}/0", "")
                store.set("roster", json.dumps(roster))
            missing = [r for r in range(world_size) if not store.check([f"taken/{roster['token']}/{r}"])]
            if not missing:
                store.set(f"go/{roster['token']}", "")
                return roster["token"]
        elif rank and store.check(["roster"]):
            roster = json.loads(store.get("roster"))
            if own in roster["names"]:
                store.set(f"taken/{roster['token']}/{rank}", "")
                if store.check([f"go/{roster['token']}"]):
                    return roster["token"]
        if not announced and time.monotonic() - since > 10:
            announced = True
            whom = "process 0 and the others"
            if rank == 0:
                whom = f"processes {', '.join(map(str, missing))} of {world_size}"
            print(f"process {rank}: waiting for {whom} to start", file=sys.stderr, flush=True)
        if time.monotonic() - since > PATIENCE.total_seconds():
            raise BadInput(f"process {rank} waited {PATIENCE} for the others to start; are the torchruns of all nodes "
                           "running, and with the same --rdzv-endpoint?")
        time.sleep(poll)


def done_in_this_launch(what: str, mark: bool = False) -> bool:
    """Whether the launch that these processes belong to, through all its restarts, has done `what`; mark: it has now.

    Kept in the store that torchrun keeps; where it keeps none (--master-addr), a restart has done all of it.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if mark:
        store.set(f"done/{what}", "")
    return store.check([f"done/{what}"])


def on_main(main: bool, work):
    """work() by the main process alone: its result, or the BadInput or OSError it raised, on every process."""
    result = error = None
    if main:
        try:
            result = work()
        except BadInput as e:
            error = str(e)
        except OSError as e:
            error = cause(e)
    if dist.is_available() and dist.is_initialized():
        payload = [(result, error)]
        dist.broadcast_object_list(payload)
        result, error = payload[0]
    if error is not None:
        raised = BadInput(error)
        raised.relayed = True  # by now all know it: one line is enough
        raise raised
    return result


def mean_over_processes(values: Tensor, ranks: Processes) -> Tensor:
    """The mean of equally shaped tensors, one of each process; its own where there is one."""
    if ranks.world_size > 1:
        dist.all_reduce(values)
        values = values / ranks.world_size
    return values


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
    """torch.autocast for what `precision` gave; without effect for off."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def rng(seed: int, purpose: int, step: int = 0) -> np.random.Generator:
    """The generator of one purpose at one step (or epoch): equal on every process, independent of all others."""
    return np.random.default_rng(np.random.SeedSequence([seed, purpose, step]))


def seed_torch(seed: int, purpose: int, step: int = 0, rank: int = 0) -> None:
    """Seed torch's own generators (initial weights, dropout) from the same tree of seeds; dropout by rank, too."""
    torch.manual_seed(int(np.random.SeedSequence([seed, purpose, step, rank]).generate_state(1, np.uint64)[0]))


def seed_suffix(seed: int) -> str:
    """What the names of runs with another seed than 0 end in."""
    return f"-seed{seed}" if seed else ""


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
    """Bytes of the device's memory; for a CPU of the machine's, or as many as this process's container may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), cgroup.memory())


def commit() -> str:
    """The commit of the code that runs, with + where the tree has changes; 'unknown' outside a clone."""
    run = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*run, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*run, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.strip() else "")


def announce_phantom(store) -> None:
    """Loudly, before anything is run on generated volumes; where they, and their slices in a datasets.Store, lie."""
    announce(f"THE PHANTOM: the volumes in {store.data} are generated, and the settings are small.\nNumbers on it say "
             "nothing about patients and are no AbdomenCT-1K or BTCV results; --data takes your own CT.\nThe prepared "
             f"slices are kept in {store.folder}.")


def announce(text: str, file=None) -> None:
    """Print something, by default on stdout, so that it is not overlooked."""
    print("=" * 100, text, "=" * 100, sep="\n", file=file)


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if seconds >= 100 else f"{seconds:.0f} s"
