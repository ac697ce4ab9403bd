"""What a step takes of a device's memory, and so how many groups run in one pass; and whether to compile it."""

import math
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn

from ct.command import counted
from ct.volumes import BadInput
from engine import pace, processes
from local_loss import CELLS
from moco import Encoder, MoCo

PASSING = 1.25  # bytes of a pass in bytes that it keeps for its backward: what is passing comes on top
WORKSPACE = 0.3e9  # bytes of cuDNN's and cuBLAS's own
USABLE = 0.9  # of what is free
COMPILED_FROM = 5000  # steps: at 50 ms saved in each, compiling for 100 s pays after 2,000
CPU_SIDE = 96  # pixels of a view's side: up to here one pass over all groups was the faster one on a CPU


def check_groups(batch: int, group: int, world_size: int) -> None:
    """Raise BadInput where the batch does not divide into groups on `world_size` processes; warn of a single group."""
    if batch % (world_size * group):
        every = counted(world_size, "process")
        raise BadInput(f"--batch-size {batch}: must be a multiple of {every} x --bn-group {group} = "
                       f"{world_size * group}")
    if batch == group:
        warnings.warn("one group only, a single micro-batch: Shuffling BN then does nothing, and the model can cheat "
                      "through its batch statistics; lower --bn-group or raise --batch-size", stacklevel=2)


def kept_bytes(encoder: Encoder, side: int, amp: str) -> int:
    """What a forward keeps of one image (1, 1, side, side) for its backward: 44 MB of ResNet-50 at 224 px in bf16.

    Of each convolution two maps: its output, which the norm needs, and what norm and ReLU make of it, which the next
    convolution needs.
    """
    found = pace.layers(encoder, pace.features_of(side))
    numbers = sum(size for layer, size, _ in found if isinstance(layer, nn.Conv2d))
    return 2 * numbers * (4 if amp == "off" else 2)


def needed(moco: MoCo, batches, amp: str) -> tuple[float, float]:
    """Bytes of a step on datasets.Batches: those that it takes whatever the pass, and those of each group of a pass."""
    weights = sum(p.numel() for p in moco.encoder_q.parameters())
    fixed = (4 * 4 * weights  # query, key, gradient, momentum
             + 4 * moco.queue.numel() + batch_bytes(batches) + WORKSPACE)
    logits = 3 * 4 * (1 + len(moco.queue))  # of an image: themselves, their softmax, their gradient
    image = PASSING * kept_bytes(moco.encoder_q, batches.view_px, amp) + logits
    return fixed, image * moco.group


def groups_that_fit(moco: MoCo, batches, amp: str, free: int) -> int:
    """The largest number of groups for a pass in `free` bytes, by `needed`; 1 where not even that fits."""
    fixed, group = needed(moco, batches, amp)
    return max(1, int((USABLE * free - fixed) / group))


def choose(moco: MoCo, batches, amp: str, ranks: processes.Processes) -> int:
    """The groups that run in one pass where none are asked for: on a GPU the most that fit, tried before training.

    Passes are evened out: of 8 groups not 7 and 1, but 4 and 4, which takes less memory and one compiled program.
    On a CPU all groups of small images, where launches count; one of larger ones, whose maps leave its caches.
    """
    most = batches.batch_size // ranks.world_size // moco.group
    if ranks.device.type != "cuda":
        return most if batches.view_px <= CPU_SIDE else 1
    torch.cuda.empty_cache()  # of a run before this one in the same process
    groups = even(most, groups_that_fit(moco, batches, amp, torch.cuda.mem_get_info(ranks.device)[0]))
    while groups > 1 and not fits(moco, batches, amp, ranks.device, groups):
        torch.cuda.empty_cache()
        fewer = even(most, groups // 2)
        print(f"note: {groups} groups in one pass do not fit into this GPU's memory; trying {fewer}", file=sys.stderr)
        groups = fewer
    if ranks.world_size > 1:
        least = torch.tensor(groups)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        groups = int(least)
    return groups


def even(total: int, most: int) -> int:
    """Groups of a pass where `total` go into as few passes as `most` allows."""
    return math.ceil(total / math.ceil(total / most))


def keep(moco: MoCo, batches, asked: int | None, saved: dict, ranks: processes.Processes) -> None:
    """Go on with the groups per pass of a checkpoint where none are `asked` for and as many fit; say where they differ.

    They move the last digits, as the precision does. Checkpoints without the number are of a step that ran group by
    group: on a CPU they go on so, which is exact; on a GPU, where nothing is, they get the faster step.
    """
    before, most = saved.get("groups_per_pass", 1), batches.batch_size // ranks.world_size // moco.group
    if asked is None and ("groups_per_pass" in saved or ranks.device.type != "cuda"):
        moco.groups_per_pass = min(before, moco.groups_per_pass)
    if min(moco.groups_per_pass, most) != min(before, most) and ranks.is_main:
        print(f"note: {before} groups ran in one pass and {moco.groups_per_pass} do from here on; the last digits will "
              "move", file=sys.stderr)


def worth_compiling(steps: int, device: torch.device, deterministic: bool) -> bool:
    """Whether to compile where --compile is left open: on a GPU that can, for so many steps to come.

    Not with --deterministic, which a compiler does not promise. Triton needs a GPU since Volta, and a C compiler and
    Python's headers at run time, which clusters lack: so something small is compiled first.
    """
    if steps < COMPILED_FROM or deterministic or device.type != "cuda":
        return False
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
        return True
    except Exception as e:  # of any of the compiler's layers
        print(f"note: not compiled, since torch.compile fails here ({str(e).strip().splitlines()[0]})", file=sys.stderr)
        return False


def fits(moco: MoCo, batches, amp: str, device: torch.device, groups: int) -> bool:
    """Whether `attempt` has room: on return nothing of it is held any more."""
    try:
        attempt(moco, batches, amp, device, groups)
        return True
    except torch.OutOfMemoryError:
        return False


def attempt(moco: MoCo, batches, amp: str, device: torch.device, groups: int) -> None:
    """One pass forward and backward on blank views, after which the model is as it was. Raises OutOfMemoryError."""
    before, images = [b.clone() for b in moco.buffers()], groups * moco.group
    views = torch.zeros(images, 1, batches.view_px, batches.view_px, device=device)
    patch_idx = torch.arange(min(batches.patches, CELLS**2), device=device).expand(images, -1)
    parts = None
    if batches.aligned:  # whole boxes, none flipped, all usable
        boxes, still = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(images, 1), torch.zeros(images, dtype=torch.bool)
        parts = tuple(x.to(device) for x in (boxes, still, ~still))
    # what a step holds besides: momentum, the batch and its views
    held = 4 * sum(p.numel() for p in moco.encoder_q.parameters()) + batch_bytes(batches)
    rest = torch.empty(held, dtype=torch.uint8, device=device)
    try:
        with processes.autocast(amp, device):
            with torch.no_grad():
                keys, cells = moco.encode_keys(views, parts and parts[:2])
            loss = moco.total(*moco.forward(views, keys, cells, patch_idx, parts))
        loss.backward()
    finally:
        del rest
        with torch.no_grad():
            for buffer, value in zip(moco.buffers(), before, strict=True):
                buffer.copy_(value)
        moco.zero_grad(set_to_none=True)


def batch_bytes(batches) -> int:
    """A batch of slices and its two grey views in float32."""
    return batches.batch_size * (batches.slice_px**2 + 2 * 4 * batches.view_px**2)
