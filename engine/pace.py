"""How fast: the operations of a step by arithmetic, the device's peak by measurement, images/s and the time left."""

import copy
import functools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.processes import Processes


def layers(network: nn.Module, call: Callable[[nn.Module], object]) -> list[tuple[nn.Module, int, bool]]:
    """(layer, numbers in its output, whether its input has a gradient) of each convolution and linear layer that `call`
    of a copy without content (device meta) goes through, in order.
    """
    shapes, found = copy.deepcopy(network).to("meta").eval(), []
    for layer in shapes.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda layer, images, out: found.append(
                (layer, out.numel(), images[0].requires_grad)))
        elif hasattr(layer, "running_whitening"):
            layer.forward = lambda images: images  # its shape is all that counts here; autocast knows no meta tensors
    call(shapes)
    return found


def features_of(side: int) -> Callable[[nn.Module], object]:
    """A call of an encoder for one grey image (1, 1, side, side)."""
    return lambda encoder: encoder(torch.empty(1, 1, side, side, device="meta"))


def iteration_of(side: int, kept: Tensor | None = None) -> Callable[[nn.Module], object]:
    """A call of a Segmenter: its loss for a crop (1, 3, side, side), or for a slice whose layer4 (C, h, w) is kept."""
    labels = torch.zeros(1, side, side, dtype=torch.int64, device="meta")
    images = torch.empty(1, 3, side, side, device="meta")
    if kept is not None:
        images = (None, None, None, torch.empty(1, *kept.shape, device="meta"))
    return lambda model: model.loss(images, labels)


def operations(network: nn.Module, call: Callable[[nn.Module], object]) -> int:
    """Floating-point operations of `call`, and of the backward behind it where weights have gradients.

    Of convolutions and linear layers, a multiplication and an addition each: of their outputs, and of the gradients by
    weights and by inputs where there are such. Norms, losses and the whitening are left out: under 1 % of a step.
    """
    return 2 * sum(size * layer.weight[0].numel() * (1 + layer.weight.requires_grad + passed_on)
                   for layer, size, passed_on in layers(network, call))


@functools.cache
def peak(device: torch.device, amp: str) -> float:
    """Floating-point operations a second of this device's best product of two matrices, in a run's precision.

    Measured once in a process, in tenths of a second: sides are doubled until a product takes 2 ms. The best of many
    counts, since other work on the machine slows some of them, and on a CPU each that takes longer than its turn.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]
    most, generator, tf32 = 0.0, torch.Generator(device).manual_seed(0), torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as the convolutions have it
    try:
        for side in (512, 1024, 2048, 4096, 8192):
            matrix, best = torch.rand(side, side, device=device, generator=generator).to(dtype), math.inf
            for _ in range(PRODUCTS):  # the first also loads the library
                wait(device)
                began = time.perf_counter()
                matrix @ matrix
                wait(device)
                best = min(best, time.perf_counter() - began)
            most = max(most, 2 * side**3 / best)
            if best > 2e-3:
                break
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    return most


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


PRODUCTS = 16  # of which the best counts, of each size
TIMES = ("images_per_s", "mfu", "seconds_left", "data_share")  # of a record: what no other run has the same


class Pace:
    """How a loop gets on: images/s, what they come to of the device's peak, and the seconds that are left.

    operations: of an image. batch: images of a step, over all processes. last: the step with which the loop ends.
    """

    def __init__(self, operations: int, batch: int, ranks: Processes, amp: str, first: int, last: int):
        self.operations, self.batch, self.last = operations, batch, last
        self.peak = ranks.world_size * peak(ranks.device, amp) if ranks.is_main else math.inf
        self.since = time.perf_counter()
        self.restart(first)

    def restart(self, done: int) -> float:
        """After `done` steps, what those took says nothing of those to come: they compiled, or tried convolutions.

        Returns the seconds that they took.
        """
        now = time.perf_counter()
        took, self.since, self.began = now - self.since, now, now
        self.done = self.before = done
        return took

    def read(self, done: int) -> dict[str, float]:
        """{images_per_s, mfu, seconds_left} of the steps since the last reading; mfu: model FLOPs utilization.

        The time left is that of all steps so far, and of what was done between them.
        """
        now, steps = time.perf_counter(), max(1, done - self.before)
        self.spent = now - self.since
        rate = (done - self.done) * self.batch / self.spent
        self.peak = max(self.peak, rate * self.operations)  # a peak below it was measured beside other work
        self.since, self.done = now, done
        return {"images_per_s": round(rate, 2), "mfu": round(rate * self.operations / self.peak, 4),
                "seconds_left": round((self.last - done) * (now - self.began) / steps)}

    def go_on(self) -> None:
        """What was done since the last reading was no step."""
        self.since = time.perf_counter()


def words(told: dict[str, float]) -> str:
    """`12.3 images/s (45 % of the device's peak)` of a reading."""
    return f"{told['images_per_s']:.1f} images/s ({100 * told['mfu']:.0f} % of the device's peak)"
