"""Norms that tell a batch's groups of images apart: BN here, and whitening (Eq. 5) by what stands here.

A group of `--bn-group` images is what others call a ghost batch: it has batch statistics of its own, as a GPU's share
of the batch has. A pass runs as many groups at once as the memory has room for; of all layers only norms know of them.

Running statistics end a step as the mean, over its G groups on all processes, of what each group alone would have made
of those before the step: r <- (1 - m) r + m / G (s_1 + ... + s_G). They get there in place, group after group: the n-th
moves them by m / (G - (G - n) m) of the way to its own statistics. What stood there before keeps the product of
1 - m / (G - (G - n) m), which telescopes to 1 - m, and each group ends with m / G. So buffers do not depend on how the
groups are spread over passes and processes.

Shapes: P groups of a pass, g images of a group, C channels.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Groups:
    """Which of a step's groups the pass at hand holds: one object, shared by all norms of an encoder.

    A call outside of a step (`begin` was not called) counts as a whole one.
    """

    def __init__(self, images: int):
        self.images = images  # of a group
        self.begin(0, 1, 1, torch.device("cpu"))

    def begin(self, first: int, last: int, total: int, device: torch.device) -> None:
        """A pass over the images `first` to `last` - 1 of the `total` that this process has in the step."""
        self.part, self.left = (last - first) / total, (total - last) / total
        # the same as tensors: a compiler takes these for inputs, and other numbers for another program
        self.as_tensors = [torch.full((), x, dtype=torch.float64, device=device) for x in (self.part, self.left)]

    def of(self, batch: int) -> int:
        """Groups of a pass over so many images. Raises ValueError where they do not divide into groups."""
        if batch % self.images:
            raise ValueError(f"{batch} images do not divide into groups of {self.images}")
        return batch // self.images

    def share(self, momentum: float) -> float | Tensor:
        """How far a pass moves running statistics towards the mean over its groups, all in one move."""
        part, left = self.as_tensors if torch.compiler.is_compiling() else (self.part, self.left)
        return momentum * part / (1 - momentum * left)

    def shares(self, count: int, momentum: float) -> list[float]:
        """The same as `count` moves, one for each group: how far it moves them towards its own."""
        each = momentum * self.part / count  # m / G
        return [each / (1 - momentum * self.left - each * (count - n)) for n in range(1, count + 1)]


class GroupBatchNorm(nn.BatchNorm2d):
    """BN over (P x g, C, H, W) in which each group of images has batch statistics of its own (Eq. 4 for each of them).

    Names of parameters and buffers are nn.BatchNorm2d's; num_batches_tracked is left to `end_step`.
    """

    groups: Groups

    def forward(self, x: Tensor) -> Tensor:
        """(P x g, C, H, W) -> the same shape and type; in evaluation mode as nn.BatchNorm2d.

        Raises ValueError where a group has one value of a channel: it has no variance.
        """
        if not self.training:
            return super().forward(x)
        count, running = self.groups.of(len(x)), (self.running_mean, self.running_var)
        if x.numel() == count * x.shape[1]:
            raise ValueError(f"one value of a channel in each group of {tuple(x.shape)}: use larger groups or images")
        if torch.compiler.is_compiling():
            return by_formula(x, self.weight, self.bias, *running, count, self.groups.share(self.momentum), self.eps)
        shares = self.groups.shares(count, self.momentum)
        if count == 1:
            return F.batch_norm(x, *running, self.weight, self.bias, True, shares[0], self.eps)
        return ByKernels.apply(x, self.weight, self.bias, *running, shares, self.eps)


class ByKernels(torch.autograd.Function):
    """torch's own BN kernels, one call a group: its images are a slice of the batch in either memory format."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, shares: list[float], eps: float):
        """x (P x g, C, H, W), `Groups.shares` -> the same shape and type; the running statistics move in place."""
        ctx.group, ctx.eps = len(x) // len(shares), eps
        out, saved = torch.empty_like(x), weight.new_empty(2, len(shares), len(weight))  # means, 1 / deviations
        parts = zip(x.split(ctx.group), out.split(ctx.group), *map(torch.unbind, saved), shares, strict=True)
        for images, into, mean, invstd, share in parts:
            torch.ops.aten.native_batch_norm.out(images, weight, bias, running_mean, running_var, True, share, eps,
                                                 out=into, save_mean=mean, save_invstd=invstd)
        ctx.save_for_backward(x, weight, saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Of the images, group by group; of weight and bias, their sum over groups."""
        x, weight, saved = ctx.saved_tensors
        parts = zip(grad.split(ctx.group), x.split(ctx.group), *map(torch.unbind, saved), strict=True)
        images, weights, biases = zip(*(torch.ops.aten.native_batch_norm_backward(
            g, part, weight, None, None, mean, invstd, True, ctx.eps, [True] * 3) for g, part, mean, invstd in parts),
            strict=True)
        affine = torch.stack(weights + biases).unflatten(0, (2, -1)).sum(1)  # (2, C)
        return torch.cat(images), *affine, None, None, None, None


def by_formula(x, weight, bias, running_mean, running_var, count: int, share: float | Tensor, eps: float) -> Tensor:
    """What `ByKernels` does as the formula of Eq. 4, which a compiler fuses with the layers around it."""
    parts = x.unflatten(0, (count, -1)).to(weight.dtype)  # (P, g, C, H, W)
    var, mean = torch.var_mean(parts, (1, 3, 4), correction=0, keepdim=True)  # (P, 1, C, 1, 1)
    out = (parts - mean) * ((var + eps).rsqrt() * weight[:, None, None]) + bias[:, None, None]  # Eq. 4
    positions = parts.numel() // mean.numel()  # of a group; the running variance is the unbiased one
    move(running_mean, mean.mean(0).flatten(), share)
    move(running_var, var.mean(0).flatten() * (positions / (positions - 1)), share)
    return out.to(x.dtype).flatten(0, 1)


@torch.no_grad()
def move(running: Tensor, mean: Tensor, share: float | Tensor) -> None:
    """Running statistics, in place, a share of the way to those of a pass."""
    running.add_(share * (mean.to(running.dtype) - running))


def group_norms(encoder: nn.Module, images: int) -> nn.Module:
    """Let, in place, every BN and whitening of a module tell groups of so many images apart; returns the module.

    `encoder.groups` is the object that they share.
    """
    encoder.groups = Groups(images)
    for norm in encoder.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.__class__ = GroupBatchNorm  # with its parameters and buffers, under their names
        if isinstance(norm, GroupBatchNorm) or hasattr(norm, "running_whitening"):
            norm.groups = encoder.groups
    return encoder


@torch.no_grad()
def end_step(encoder: nn.Module) -> None:
    """After a step's last pass: counters count one step, running statistics become their mean over processes."""
    buffers = list(encoder.buffers())
    torch._foreach_add_([b for b in buffers if not b.is_floating_point()], 1)
    if world_size() > 1:
        running = [b for b in buffers if b.is_floating_point()]
        flat = torch.cat([b.flatten() for b in running]).div_(world_size())
        dist.all_reduce(flat)
        parts = flat.split([b.numel() for b in running])
        torch._foreach_copy_(running, [part.view_as(b) for part, b in zip(parts, running, strict=True)])


def world_size() -> int:
    """How many processes train together; 1 where torch.distributed was not started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
