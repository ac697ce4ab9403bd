"""Crops of slices, resized with antialiasing as Pillow does it, each sample its own box; the network's input.

torchvision's resized_crop takes one box for a whole batch. Here boxes differ from sample to sample, in one way that is
fast on a CPU and one that is fast on a GPU; tests hold both equal to torchvision's.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def pixel_boxes(box: NDArray, side: int) -> NDArray:
    """Boxes in fractions -> whole pixels of a slice of this side: (N, 4) int64, inside it, not empty."""
    lengths = np.clip(np.rint(box[:, 2:] * side), 1, side)
    starts = np.clip(np.rint(box[:, :2] * side), 0, side - lengths)
    return np.concatenate([starts, lengths], axis=1).astype(np.int64)


def crops_one_by_one(batch: Tensor, boxes: NDArray, size: int) -> Tensor:
    """Crop and resize, bilinear with antialiasing as Pillow's: (N, H, H) uint8 -> (N, size, size) in [0, 1].

    The fast way on a CPU: only the box is read and converted. Each row of a crop is a weighted sum of a few whole
    rows, which is what `embedding_bag` does, several times faster than `interpolate`; that one is left the columns.
    """
    rows, weights = taps(torch.from_numpy(boxes[:, 2]).float(), size, batch.shape[1])
    crops = torch.empty(len(batch), size, size)
    for out, image, (top, left, height, width), row, weight in zip(
            crops, batch, boxes.tolist(), rows, weights, strict=True):
        box = image[top : top + height, left : left + width].float()  # (height, width)
        crop = F.embedding_bag(row, box, mode="sum", per_sample_weights=weight)  # (size, width)
        out.copy_(F.interpolate(crop[None, None], (size, size), mode="bilinear", antialias=True)[0, 0])
    return crops.div_(255)


def crops_by_products(batch: Tensor, boxes: NDArray, size: int) -> Tensor:
    """What `crops_one_by_one` does, as W_y @ image @ W_x^T for all samples at once, to an eighth of a grey level.

    The fast way on a GPU: hundreds of small kernel launches would cost more than products with mostly zeros, and half
    precision halves the bytes of both. Grey levels count from the middle, where it is finest.
    """
    top, left, height, width = to_device(boxes, batch.device).float().unbind(1)
    products = []
    for start, length in ((top, height), (left, width)):
        pixels, weights = taps(length, size, batch.shape[1])
        whole = torch.zeros(*pixels.shape[:2], batch.shape[1], dtype=torch.float16, device=batch.device)
        pixels += start.long()[:, None, None]  # of the slice
        products.append(whole.scatter_add_(2, pixels, weights.half()))  # W_y, W_x: (N, size, H)
    rows, columns = products
    middle = 128  # grey levels; the rows of W sum to 1 only nearly
    crops = rows @ (batch.half() - middle) @ columns.mT  # (N, size, H) (N, H, H) (N, H, size) -> (N, size, size)
    return crops.float().add_(middle).div_(255)


def taps(length: Tensor, size: int, side: int) -> tuple[Tensor, Tensor]:
    """Of which pixels each of the `size` parts of `length` (N,) pixels is made: (N, size, T) int64, and their weights.

    T is enough for any length up to `side`, so that the order of a sum does not depend on the batch. Pixels count from
    the box's start; those that would lie outside are one at its border and weigh nothing.
    """
    centre, reach = triangles(length, size)  # (N, size, 1), (N, 1, 1)
    most = math.ceil(2 * max(1, side / size)) + 1  # T
    pixels = (centre - reach).floor() + torch.arange(most, device=length.device)  # (N, size, T)
    weights = triangle_weights(pixels, length, size)
    return pixels.clamp(min=0).minimum(length[:, None, None] - 1).long(), weights


def triangles(length: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The `size` equal parts of `length` (N,) pixels: centres (N, size, 1), half bases of their triangles (N, 1, 1).

    A triangle reaches over one pixel of the coarser of the two grids.
    """
    scale = length[:, None, None] / size
    return (torch.arange(size, device=length.device)[:, None] + 0.5) * scale, scale.clamp(min=1)


def triangle_weights(pixels: Tensor, length: Tensor, size: int) -> Tensor:
    """(N, size, K): weights of `pixels` (N, size or 1, K), counted from the box's start, in the parts of `triangles`.

    Rows sum to 1; nothing outside the box [0, length) counts.
    """
    centre, reach = triangles(length, size)
    weights = (1 - (pixels + 0.5 - centre).abs() / reach).clamp(min=0)  # the triangle at each pixel's centre
    weights = weights * ((pixels >= 0) & (pixels < length[:, None, None]))
    return weights / weights.sum(2, keepdim=True)


def labelled_one_by_one(images: Tensor, labels: Tensor, boxes: NDArray, shown: NDArray, flip: NDArray, size: int
                        ) -> tuple[Tensor, Tensor]:
    """Boxes of slices and of their label maps, both (N, H, W) uint8, resized and flipped, in crops of `size` pixels.

    boxes (N, 4) int64: top, left, height, width in pixels. shown (N, 2): height and width to which they are resized,
    images bilinear with antialiasing, labels to the nearest pixel's: they are names, not numbers. flip (N,) bool.
    Returns images (N, size, size) float32 in [0, 255] and labels (N, size, size) int64. What is shown lies at the top
    left of a crop; the rest is 0 (air) and 255 (ignored).

    The fast way on a CPU: only the box is read and converted.
    """
    crops = torch.zeros(len(images), size, size)
    masks = torch.full_like(crops, 255, dtype=torch.int64)
    for i, ((top, left, height, width), (h, w)) in enumerate(zip(boxes.tolist(), shown.tolist(), strict=True)):
        box = (i, slice(top, top + height), slice(left, left + width))
        part = F.interpolate(images[box][None, None].float(), (h, w), mode="bilinear", antialias=True)[0, 0]
        mask = F.interpolate(labels[box][None, None].float(), (h, w), mode="nearest-exact")[0, 0].long()
        crops[i, :h, :w] = part.flip(1) if flip[i] else part
        masks[i, :h, :w] = mask.flip(1) if flip[i] else mask
    return crops, masks


def labelled_by_products(images: Tensor, labels: Tensor, boxes: NDArray, shown: NDArray, flip: NDArray, size: int
                         ) -> tuple[Tensor, Tensor]:
    """What `labelled_one_by_one` does for all samples at once: W_y @ image @ W_x^T, and one lookup of labels.

    The fast way on a GPU: as many kernel launches for any N. Weights are those of `triangle_weights`, but each sample
    has its own number of parts, and a flipped one counts its columns from the right.
    """
    start, length = boxes[:, :2], boxes[:, 2:]  # (N, 2): of rows and of columns
    step = np.stack([np.ones(len(flip)), np.where(flip, -1, 1)], axis=1)
    first = np.where(step > 0, 0.5, shown - 0.5)
    numbers = np.stack([start, length, shown, first, step, length / np.float32(shown)]).astype(np.float32)
    start, length, shown, first, step, scale = to_device(numbers, images.device).mT[..., None]  # (2, N, 1) each
    part = torch.arange(size, dtype=torch.float32, device=images.device)
    pixel = torch.arange(max(images.shape[1:]), device=images.device) - start  # (2, N, H or W), from the box's start
    centre = (part * step + first) * scale  # (2, N, size): of the parts, from the box's start
    seen, inside = part < shown, (pixel >= 0) & (pixel < length)
    weights = (1 - (pixel[:, :, None] + 0.5 - centre[..., None]).abs() / scale.clamp(min=1)[..., None]).clamp(min=0)
    weights = weights * (inside[:, :, None] & seen[..., None])  # (2, N, size, H or W)
    w_y, w_x = weights / weights.sum(3, keepdim=True).clamp(min=0.1)  # over 0.5, or 0 where a part is not seen
    crops = w_y[..., : images.shape[1]] @ images.float() @ w_x[..., : images.shape[2]].mT  # (N, size, size)
    y, x = (centre.floor().minimum(length - 1).clamp(min=0) + start).long()  # (N, size) each
    sample = torch.arange(len(labels), device=labels.device)[:, None, None]
    masks = labels[sample, y[:, :, None], x[:, None, :]]  # (N, size, size)
    return crops, torch.where(seen[0, :, :, None] & seen[1, :, None], masks, 255).long()


def whole(slices: Tensor, side: int) -> Tensor:
    """What evaluation sees of slices (N, H, W) uint8: all of them, the shorter side resized to `side`, antialiased.

    Returns (N, 3, h, w) float32, normalised; nothing is drawn.
    """
    shape = [round(n * side / min(slices.shape[1:])) for n in slices.shape[1:]]
    return normalise(F.interpolate(slices[:, None].float(), shape, mode="bilinear", antialias=True).div_(255))


def normalise(images: Tensor) -> Tensor:
    """Grey images (N, H, W) or (N, 1, H, W) in [0, 1] -> (N, 3, H, W) with ImageNet's mean and standard deviation."""
    images = images.reshape(len(images), *images.shape[-2:])
    channels = images.new_empty(len(images), 3, *images.shape[-2:])  # (N, 3, H, W)
    # Channel by channel: plain numbers need no copy to the device, and one pass over few strides is faster.
    for c, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):
        channels[:, c].copy_(images).mul_(1 / std).sub_(mean / std)  # no out=, which torch.compile does not trace
    return channels


def to_device(array: NDArray | Tensor, device: torch.device) -> Tensor:
    """An array or CPU tensor on the device (float64 becomes float32); to a GPU from pinned memory, without a wait."""
    tensor = torch.as_tensor(array)
    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    return pinned(tensor, device).to(device, non_blocking=True)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor from which a copy to `device` need not be waited for."""
    return tensor.pin_memory() if device.type == "cuda" else tensor
