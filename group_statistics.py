"""Running statistics (BN, whitening) of a step that is run in groups, the same for any number of groups and processes.

A group of `--bn-group` images is what others call a ghost batch: it has batch statistics of its own, as a GPU's share
of the batch has. One process that runs 8 groups must end with the buffers that 8 processes with one group each would.
"""

import contextlib
import itertools

import torch
import torch.distributed as dist
from torch import Tensor, nn

ALIGN = 64  # numbers; kernels that read several at once need a buffer to begin at a multiple


class GroupStatistics:
    """Each group of a step starts from the same running statistics; `finish` leaves their mean over all groups and
    processes.

    num_batches_tracked counts steps. A group's backward must end before the next group starts, since the buffers are
    restored in place. The buffers of `module` become views of two flat tensors, one of numbers and one of counters, so
    that each of these is one operation and not one for each of hundreds of buffers.
    """

    def __init__(self, module: nn.Module):
        self.module, self.running = module, torch.empty(0)
        self.begin()

    def begin(self) -> None:
        """Before the first group of a step."""
        if not _same_storage(next(self.module.buffers()), self.running):  # at first, or if the module has moved
            buffers = list(self.module.buffers())
            self.running = _flat([b for b in buffers if b.is_floating_point()])  # (M,)
            self.counters = _flat([b for b in buffers if not b.is_floating_point()])
        self.groups, self.steps = 0, self.counters + 1  # one step, however many groups
        self.start, self.total = self.running.clone(), torch.zeros_like(self.running)  # (M,) each

    @contextlib.contextmanager
    def group(self):
        """Around one group's forward and, where there is one, backward."""
        if self.groups:  # the first group finds them as they were
            with torch.no_grad():
                self.running.copy_(self.start)
        yield
        with torch.no_grad():
            self.total.add_(self.running)
        self.groups += 1

    @torch.no_grad()
    def finish(self) -> None:
        """After the last group of a step."""
        processes = world_size()
        self.total.div_(self.groups * processes)
        if processes > 1:
            dist.all_reduce(self.total)  # the sum of every process's part of the mean
        self.running.copy_(self.total)
        self.counters.copy_(self.steps)


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


@torch.no_grad()
def _flat(tensors: list[Tensor]) -> Tensor:
    """One tensor, (M,), whose parts the given ones become; what lies between them is zero."""
    *starts, length = itertools.accumulate((-(-t.numel() // ALIGN) * ALIGN for t in tensors), initial=0)
    flat = tensors[0].new_zeros(length)
    for t, start in zip(tensors, starts, strict=True):
        # the buffer keeps its name and values, and from now on lies in `flat`
        t.data = flat[start : start + t.numel()].view_as(t).copy_(t)
    return flat


def world_size() -> int:
    """How many processes train together; 1 where torch.distributed was not started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
