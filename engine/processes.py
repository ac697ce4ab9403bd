"""The processes that train together, and what each computes with: its device and its precision."""

import contextlib
import json
import os
import sys
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from ct import cgroup
from ct.command import cause, cores
from ct.volumes import BadInput

PATIENCE = timedelta(minutes=30)  # with another process, before it counts as lost


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


def memory(device: torch.device) -> int:
    """Bytes of the device's memory; for a CPU of the machine's, or as many as this process's container may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), cgroup.memory())


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
    return f"{name}, torch {torch.__version__}, torchvision {version('torchvision')}"
