"""Random views of a batch of slices: each sample its own numbers, all samples at once, on the batch's device.

The recipe is MoCo v2's as mmselfsup configures it (configs/selfsup/_base_/datasets/imagenet_mocov2.py), in
its order: random resized crop, brightness and contrast, Gaussian blur, flip, ImageNet's mean and standard
deviation. Its hue, saturation and grayscale are left out: they do nothing to three equal channels. Without
crop and flip augmentation, as the paper has it for the local loss, the crop is the whole slice and there is
no flip. The first author's recipe has the same crops, no flip, and views/photometric.py in place of jitter and blur.

`draw` makes every random number, `pair` and `apply` none. Two views of a batch are two draws.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from views import photometric
from views.resize import crops_by_products, crops_one_by_one, normalise, pixel_boxes, to_device

AREA = (0.2, 1.0)  # RandomResizedCrop: share of the slice's area
RATIO = (3 / 4, 4 / 3)  # RandomResizedCrop: width over height, log-uniform
CANDIDATES = 10  # boxes that torchvision tries before it falls back to the whole of a square image
LEAST = 0.1  # of the slice's side that two crops must share for the local loss with crops and flips
FLIP_P = 0.5
JITTER = 0.4  # ColorJitter: brightness and contrast are factors of 1 -+ this
JITTER_P = 0.8
SIGMA = (0.1, 2.0)  # RandomGaussianBlur, in pixels of the view
BLUR_P = 0.5
RADIUS = math.ceil(3 * SIGMA[1])  # pixels of the blur's kernel on each side

Params = dict[str, NDArray]


def draw(rng: np.random.Generator, batch_size: int, geometric: bool = True, recipe: str = "paper") -> Params:
    """Every random number of one view of `batch_size` slices. The first dimension of an array is the sample:

    box (N, 4) float64: top, left, height, width of the crop as fractions of the slice's side
    flip (N,) bool: left to right
    brightness, contrast (N,) float64: factors, both 1 where the sample is not jittered
    contrast_first (N,) bool: the order of the two
    sigma (N,) float64: of the blur, in pixels of the view; 0 where the sample is not blurred

    With geometric=False the box is the whole slice and nothing is flipped; the rest is what the same
    generator gives with True. A call takes 29 uniform numbers a sample, sample after sample.

    The recipe "author" has the same boxes, nothing flipped, and `photometric.draw`'s numbers in place of the others.
    """
    uniform = rng.random((batch_size, 2 * CANDIDATES + 9))  # (N, 29)
    area, ratio, rest = np.split(uniform, [CANDIDATES, 2 * CANDIDATES], axis=1)  # (N, 10), (N, 10), (N, 9)
    top, left, flip, jittered, brightness, contrast, contrast_first, blurred, sigma = rest.T

    # RandomResizedCrop: of the candidates of a sample the first that fits into the slice, else the whole slice
    area = AREA[0] + (AREA[1] - AREA[0]) * area
    ratio = np.exp(np.log(RATIO[0]) + (np.log(RATIO[1]) - np.log(RATIO[0])) * ratio)
    sides = np.sqrt([area / ratio, area * ratio])  # (2, N, candidates): heights, widths
    valid = (sides <= 1).all(axis=0)  # (N, candidates)
    height, width = sides[:, np.arange(batch_size), valid.argmax(axis=1)]  # (N,) each; argmax: the first valid one
    height, width = np.where(valid.any(axis=1) & geometric, (height, width), 1.0)

    box = np.stack([top * (1 - height), left * (1 - width), height, width], axis=1)
    if recipe == "author":
        return {"box": box, "flip": np.zeros(batch_size, bool), **photometric.draw(rng, batch_size)}
    jittered = jittered < JITTER_P
    return {
        "box": box,
        "flip": (flip < FLIP_P) & geometric,
        "brightness": np.where(jittered, 1 - JITTER + 2 * JITTER * brightness, 1.0),
        "contrast": np.where(jittered, 1 - JITTER + 2 * JITTER * contrast, 1.0),
        "contrast_first": contrast_first < 0.5,
        "sigma": np.where(blurred < BLUR_P, SIGMA[0] + (SIGMA[1] - SIGMA[0]) * sigma, 0.0),
    }


def pair(batch: Tensor, params_q: Params, params_k: Params, size: int = 224) -> tuple[Tensor, Tensor]:
    """Two views of a batch of square slices (N, H, H), uint8: each (N, 1, size, size) float32 in [0, 1], contiguous.

    0..255 (the HU window) becomes [0, 1]; the one grey channel is what `normalise` takes. The params are what `draw`
    gave for these N samples. On a GPU this is a few batched kernel launches, as many for any N, and the host never
    waits for them. Float32 under autocast too.
    Raises ValueError for a batch of another type or shape, for params of another number of samples, and for
    a size that is not above RADIUS.
    """
    images_q = resample(batch, params_q, size)
    shared = np.array_equal(params_q["box"], params_k["box"])  # as without crops; half of the work is saved
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
    """Images (N, S, S) in [0, 1] jittered, blurred and flipped as drawn, in place; or as `photometric.draw` has it."""
    if "operation" in params:
        return photometric.apply(images, params["operation"], params["factor"])
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
    """What two views of slices of `side` pixels both show: (boxes in the first, in the second, usable pairs).

    Boxes (N, 4) float64 as `local_loss.pool_boxes` takes them: top, left, height, width as fractions of the view
    before its flip. Usable (N,) bool: pairs whose common part has both sides of at least LEAST of the slice's; the
    boxes of the others are whole views.
    """
    boxes = [pixel_boxes(p["box"], side) / side for p in (query, key)]  # (N, 4) each, fractions of the slice
    start = np.maximum(*(b[:, :2] for b in boxes))  # (N, 2): top left of the intersection
    length = np.minimum(*(b[:, :2] + b[:, 2:] for b in boxes)) - start  # (N, 2), negative where there is none
    usable = (length >= LEAST).all(1)  # (N,)
    query, key = (np.where(usable[:, None], np.concatenate([(start - b[:, :2]) / b[:, 2:], length / b[:, 2:]], 1),
                           [0.0, 0.0, 1.0, 1.0]) for b in boxes)
    return query, key, usable


def jitter(images: Tensor, brightness: NDArray, contrast: NDArray, contrast_first: NDArray) -> Tensor:
    """Brightness (a factor) and contrast (about the image's mean) of images (N, S, S) in [0, 1], in place.

    Each is clamped to [0, 1], as torchvision does. Brightness is a multiplication before the contrast and one
    after it, of which one is by 1: so both orders are the same kernel launches.
    """
    before, after = np.where(contrast_first, 1.0, brightness), np.where(contrast_first, brightness, 1.0)
    factors = to_device(np.stack([before, contrast, after]), images.device)  # (3, N)
    before, contrast, after = factors[..., None, None].unbind()  # (N, 1, 1) each
    images.mul_(before).clamp_(0, 1)
    mean = images.mean((1, 2), keepdim=True)  # (N, 1, 1)
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
    images = F.conv2d(F.pad(images[None], (0, 0, *reach), mode="reflect"), kernel, groups=groups)  # (1, N, S, S)
    return F.conv2d(F.pad(images, (*reach, 0, 0), mode="reflect"), kernel.mT, groups=groups)[0]
