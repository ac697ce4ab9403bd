"""Random views of a batch of slices: each sample its own numbers, all samples at once, on the batch's device.

The recipe is MoCo v2's as mmselfsup configures it (configs/selfsup/_base_/datasets/imagenet_mocov2.py), in
its order: random resized crop, brightness and contrast, Gaussian blur, flip, ImageNet's mean and standard
deviation. Its hue, saturation and grayscale are left out: they do nothing to three equal channels. Without
geometry, as the paper has it for the local loss, the crop is the whole slice and there is no flip.

`draw` makes every random number, `pair` and `apply` none. Two views of a batch are two draws.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

AREA = (0.2, 1.0)  # RandomResizedCrop: share of the slice's area
RATIO = (3 / 4, 4 / 3)  # RandomResizedCrop: width over height, log-uniform
CANDIDATES = 10  # boxes that torchvision tries before it falls back to the whole of a square image
LEAST = 0.1  # of the slice's side that two crops must share for the local loss with geometry
FLIP_P = 0.5
JITTER = 0.4  # ColorJitter: brightness and contrast are factors of 1 -+ this
JITTER_P = 0.8
SIGMA = (0.1, 2.0)  # RandomGaussianBlur, in pixels of the view
BLUR_P = 0.5
RADIUS = math.ceil(3 * SIGMA[1])  # pixels of the blur's kernel on each side
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Params = dict[str, NDArray]


def draw(rng: np.random.Generator, batch_size: int, geometric: bool = True) -> Params:
    """Every random number of one view of `batch_size` slices. The first dimension of an array is the sample:

    box (N, 4) float64: top, left, height, width of the crop as fractions of the slice's side
    flip (N,) bool: left to right
    brightness, contrast (N,) float64: factors, both 1 where the sample is not jittered
    contrast_first (N,) bool: the order of the two
    sigma (N,) float64: of the blur, in pixels of the view; 0 where the sample is not blurred

    With geometric=False the box is the whole slice and nothing is flipped; the rest is what the same
    generator gives with True. A call takes 29 uniform numbers a sample, sample after sample.
    """
    uniform = rng.random((batch_size, 2 * CANDIDATES + 9))
    area, ratio, rest = np.split(uniform, [CANDIDATES, 2 * CANDIDATES], axis=1)
    top, left, flip, jittered, brightness, contrast, contrast_first, blurred, sigma = rest.T

    area = AREA[0] + (AREA[1] - AREA[0]) * area
    ratio = np.exp(np.log(RATIO[0]) + (np.log(RATIO[1]) - np.log(RATIO[0])) * ratio)
    sides = np.sqrt([area / ratio, area * ratio])  # (2, N, candidates): heights, widths
    valid = (sides <= 1).all(axis=0)
    height, width = sides[:, np.arange(batch_size), valid.argmax(axis=1)]  # argmax: the first valid one
    height, width = np.where(valid.any(axis=1) & geometric, (height, width), 1.0)

    jittered = jittered < JITTER_P
    return {
        "box": np.stack([top * (1 - height), left * (1 - width), height, width], axis=1),
        "flip": (flip < FLIP_P) & geometric,
        "brightness": np.where(jittered, 1 - JITTER + 2 * JITTER * brightness, 1.0),
        "contrast": np.where(jittered, 1 - JITTER + 2 * JITTER * contrast, 1.0),
        "contrast_first": contrast_first < 0.5,
        "sigma": np.where(blurred < BLUR_P, SIGMA[0] + (SIGMA[1] - SIGMA[0]) * sigma, 0.0),
    }


def pair(batch: Tensor, params_q: Params, params_k: Params, size: int = 224) -> tuple[Tensor, Tensor]:
    """Two views of a batch of square slices (N, H, H), uint8: each (N, 1, size, size) float32 in [0, 1], contiguous.

    0..255 (the HU window) becomes [0, 1]; the one grey channel is what `normalise` takes. The params are what `draw`
    gave for these N samples. On a GPU this is a few batched launches, as many for any N, and the host never waits for
    them. Float32 under autocast too.
    Raises ValueError for a batch of another type or shape, for params of another number of samples, and for
    a size that is not above RADIUS.
    """
    images_q = resample(batch, params_q, size)
    shared = np.array_equal(params_q["box"], params_k["box"])  # as without geometry; half of the work is saved
    images_k = images_q.clone() if shared else resample(batch, params_k, size)
    return retouch(images_q, params_q)[:, None], retouch(images_k, params_k)[:, None]


def apply(batch: Tensor, params: Params, size: int = 224) -> Tensor:
    """One view of a batch as the network takes it: (N, 3, size, size), normalised. The rest is as for `pair`."""
    return normalise(retouch(resample(batch, params, size), params))


def resample(batch: Tensor, params: Params, size: int) -> Tensor:
    """The drawn crops (N, size, size) in [0, 1] of slices (N, H, H); raises what `pair` says."""
    if batch.dtype != torch.uint8 or batch.ndim != 3 or batch.shape[1] != batch.shape[2]:
        raise ValueError(f"a batch is uint8 (N, H, H), not {batch.dtype} {tuple(batch.shape)}")
    if len(params["box"]) != len(batch):
        raise ValueError(f"{len(params['box'])} samples were drawn for a batch of {len(batch)}")
    if size <= RADIUS:
        raise ValueError(f"a view of {size} pixels is too small for a blur that reaches {RADIUS}")
    crops = crops_by_products if batch.is_cuda else crops_one_by_one
    with torch.autocast(batch.device.type, enabled=False):
        return crops(batch, pixel_boxes(params["box"], batch.shape[1]), size)


def retouch(images: Tensor, params: Params) -> Tensor:
    """Images (N, S, S) in [0, 1] jittered, blurred and flipped as drawn, in place."""
    images = jitter(images, params["brightness"], params["contrast"], params["contrast_first"])
    blurred, flipped = (params[k].nonzero()[0] for k in ("sigma", "flip"))  # on the host, where it costs no wait
    together = len(images) if images.is_cuda else 16  # so many channels a CPU convolves at once, within its caches
    with torch.autocast(images.device.type, enabled=False):
        for i in range(0, len(blurred), together):
            some = blurred[i : i + together]
            index = to_device(some, images.device)
            images.index_copy_(0, index, blur(images.index_select(0, index), params["sigma"][some]))
    index = to_device(flipped, images.device)
    return images.index_copy_(0, index, images.index_select(0, index).flip(-1))


def common_parts(query: Params, key: Params, side: int) -> tuple[NDArray, NDArray, NDArray]:
    """What two views of slices of `side` pixels both show: (boxes in the first, in the second, which pairs to use).

    Boxes (N, 4) float64 as `local_loss.pool_boxes` takes them: top, left, height, width as fractions of the view
    before its flip. Pairs (M,) int64: those whose common part has both sides of at least LEAST of the slice's; the
    boxes of the others are whole views.
    """
    boxes = [pixel_boxes(p["box"], side) / side for p in (query, key)]
    start = np.maximum(*(b[:, :2] for b in boxes))
    length = np.minimum(*(b[:, :2] + b[:, 2:] for b in boxes)) - start
    usable = (length >= LEAST).all(1)
    query, key = (np.where(usable[:, None], np.concatenate([(start - b[:, :2]) / b[:, 2:], length / b[:, 2:]], 1),
                           [0.0, 0.0, 1.0, 1.0]) for b in boxes)
    return query, key, usable.nonzero()[0]


def draw_crops(rng: np.random.Generator, batch_size: int) -> Params:
    """Every random number of a training crop of `batch_size` labelled slices, for `apply_crops`.

    mmsegmentation's recipe (_base_/datasets/pascal_voc12.py) without hue, saturation and cat_max_ratio:
    scale (N,) of the shorter side relative to the crop, place (N, 2) of the crop in what it can move, flip (N,),
    brightness (N,) added and contrast (N,) multiplied, each with p = 0.5.
    """
    scale, top, left, flip, brightened, brightness, contrasted, contrast = rng.random((8, batch_size))
    return {
        "scale": 0.5 + 1.5 * scale,
        "place": np.stack([top, left], axis=1),
        "flip": flip < FLIP_P,
        "brightness": np.where(brightened < 0.5, (2 * brightness - 1) * 32 / 255, 0.0),
        "contrast": np.where(contrasted < 0.5, 0.5 + contrast, 1.0),
    }


def undrawn_crops(batch_size: int) -> Params:
    """What `draw_crops` gives, for crops that are the whole slice, nothing changed (of a longer side, the middle)."""
    ones, zeros = np.ones(batch_size), np.zeros(batch_size)
    return {"scale": ones, "place": np.full((batch_size, 2), 0.5), "flip": zeros > 0, "brightness": zeros,
            "contrast": ones}


def apply_crops(slices: list[Tensor], labels: list[Tensor], params: Params, size: int) -> tuple[Tensor, Tensor]:
    """Slices and label maps (H, W) uint8, of any sizes -> images (N, 3, size, size), labels (N, size, size) int64.

    The part of a slice that the crop will show is resized, images bilinear with antialiasing, labels to the
    nearest pixel; where the resized slice is smaller than the crop, the rest is 0 (air) and 255 (ignored).
    """
    images = torch.zeros(len(slices), size, size, device=slices[0].device)
    masks = torch.full_like(images, 255, dtype=torch.int64)
    rows = zip(slices, labels, *(params[k].tolist() for k in ("scale", "place", "flip")), strict=True)
    for i, (image, label, scale, place, flip) in enumerate(rows):
        window = max(1, round(min(image.shape) / scale))  # side of the crop in pixels of the slice
        (top, height), (left, width) = ((round(p * max(0, side - window)), min(side, window))
                                        for p, side in zip(place, image.shape, strict=True))
        shown = tuple(min(size, max(1, round(side * size / window))) for side in (height, width))
        box = (slice(top, top + height), slice(left, left + width))
        part = F.interpolate(image[box][None, None].float(), shown, mode="bilinear", antialias=True)[0, 0]
        mask = F.interpolate(label[box][None, None].float(), shown, mode="nearest-exact")[0, 0].long()
        images[i, : shown[0], : shown[1]] = part.flip(1) if flip else part
        masks[i, : shown[0], : shown[1]] = mask.flip(1) if flip else mask
    brightness, contrast = (to_device(params[k], images.device)[:, None, None] for k in ("brightness", "contrast"))
    images = images.div_(255).add_(brightness).clamp_(0, 1).mul_(contrast).clamp_(0, 1)
    return normalise(images), masks


def whole(slices: Tensor, side: int) -> Tensor:
    """What evaluation sees of slices (N, H, W) uint8: all of them, the shorter side resized to `side`, antialiased.

    Returns (N, 3, h, w) float32, normalised; nothing is drawn.
    """
    shape = [round(n * side / min(slices.shape[1:])) for n in slices.shape[1:]]
    return normalise(F.interpolate(slices[:, None].float(), shape, mode="bilinear", antialias=True).div_(255))


def normalise(images: Tensor) -> Tensor:
    """Grey images (N, H, W) or (N, 1, H, W) in [0, 1] -> (N, 3, H, W) with ImageNet's mean and deviation."""
    images = images.reshape(len(images), *images.shape[-2:])
    channels = images.new_empty(len(images), 3, *images.shape[-2:])
    # Channel by channel: plain numbers need no copy to the device, and one pass over few strides is faster.
    for c, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):
        torch.mul(images, 1 / std, out=channels[:, c]).sub_(mean / std)
    return channels


def to_device(array: NDArray | Tensor, device: torch.device) -> Tensor:
    """An array or CPU tensor on the device (float64 becomes float32); to a GPU from pinned memory, without a wait."""
    tensor = torch.as_tensor(array)
    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    return pinned(tensor, device).to(device, non_blocking=True)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor from which a copy to `device` need not be waited for."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


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
    heights = torch.from_numpy(boxes[:, 2]).float()
    centre, reach = triangles(heights, size)
    most = math.ceil(2 * max(1, batch.shape[1] / size)) + 1  # of any box: a sum's order must not depend on the batch
    pixels = (centre - reach).floor() + torch.arange(most)
    weights = triangle_weights(pixels, heights, size)
    rows = pixels.clamp(min=0).minimum(heights[:, None, None] - 1).long()  # those outside the box weigh nothing
    crops = torch.empty(len(batch), size, size)
    for out, image, (top, left, height, width), row, weight in zip(
            crops, batch, boxes.tolist(), rows, weights, strict=True):
        box = image[top : top + height, left : left + width].float()
        crop = F.embedding_bag(row, box, mode="sum", per_sample_weights=weight)
        out.copy_(F.interpolate(crop[None, None], (size, size), mode="bilinear", antialias=True)[0, 0])
    return crops.div_(255)


def crops_by_products(batch: Tensor, boxes: NDArray, size: int) -> Tensor:
    """What `crops_one_by_one` does, as W_y @ image @ W_x^T for all samples at once.

    The fast way on a GPU: hundreds of small launches would cost more than the products with mostly zeros.
    """
    top, left, height, width = to_device(boxes, batch.device).float().unbind(1)
    pixels = torch.arange(batch.shape[1], device=batch.device)
    rows, columns = (triangle_weights(pixels - start[:, None, None], length, size)
                     for start, length in ((top, height), (left, width)))
    return (rows @ batch.float() @ columns.mT).div_(255)


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
    weights = (1 - (pixels + 0.5 - centre).abs() / reach).clamp(min=0)
    weights = weights * ((pixels >= 0) & (pixels < length[:, None, None]))
    return weights / weights.sum(2, keepdim=True)


def jitter(images: Tensor, brightness: NDArray, contrast: NDArray, contrast_first: NDArray) -> Tensor:
    """Brightness (a factor) and contrast (about the image's mean) of images (N, S, S) in [0, 1], in place.

    Each is clamped to [0, 1], as torchvision does. Brightness is a multiplication before the contrast and one
    after it, of which one is by 1: so both orders are the same launches.
    """
    before, after = np.where(contrast_first, 1.0, brightness), np.where(contrast_first, brightness, 1.0)
    factors = to_device(np.stack([before, contrast, after]), images.device)
    before, contrast, after = factors[..., None, None].unbind()
    images.mul_(before).clamp_(0, 1)
    mean = images.mean((1, 2), keepdim=True)
    images.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 1)
    return images.mul_(after).clamp_(0, 1)


def blur(images: Tensor, sigma: NDArray) -> Tensor:
    """Images (N, S, S) blurred by Gaussians of `sigma` (N,) > 0 pixels, cut at RADIUS, reflecting borders."""
    if len(images) == 1:  # alone it would be rounded otherwise than in company, and a view depend on its batch
        return blur(images.expand(2, -1, -1), sigma.repeat(2))[:1]
    distance = torch.arange(-RADIUS, RADIUS + 1, device=images.device)
    kernel = torch.softmax(-0.5 * (distance / to_device(sigma, images.device)[:, None]) ** 2, dim=1)
    kernel = kernel[:, None, :, None]  # (N, 1, 2 RADIUS + 1, 1): each image is a channel with its own kernel
    reach, groups = (RADIUS, RADIUS), len(images)
    images = F.conv2d(F.pad(images[None], (0, 0, *reach), mode="reflect"), kernel, groups=groups)
    return F.conv2d(F.pad(images, (*reach, 0, 0), mode="reflect"), kernel.mT, groups=groups)[0]
