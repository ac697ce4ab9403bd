"""Two operations on the grey values of each view, drawn from five of PIL's: the first author's, with --recipe author.

Of the published code (docs/decisions.md) this is RandAugment with its list "local_features", as its own copy of
mmselfsup's file defines it (augmentation_ssl.py: RandAugment, BaseAugTransform): two are chosen, with replacement; each
is carried out with a probability of 0.5; where it has a strength, that is level / 10 x 0.9 of a level drawn from
N(5, 0.5) and cut to 0..10, so about 0.45 -+ 0.05, added to 1 or taken from it. What the factor does is PIL's: 0 is the
degenerate image, 1 the image as it is.

Here on 8 bits, as PIL has it, and on the batch's own device; there on 16 bits.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from views.resize import to_device

TWICE = 2  # operations a view
APPLIED_P = 0.5
LEVEL, LEVEL_SD, LEVELS = 5.0, 0.5, 10.0
STRONGEST = 0.9  # strength at level 10
LIGHTER_P = 0.5  # that the strength is taken from 1


def draw(rng: np.random.Generator, batch_size: int) -> dict[str, NDArray]:
    """Every random number of one view of `batch_size` slices:

    operation (N, 2) int64: the first and the second, numbers of OPERATIONS; 0 where nothing is done
    factor (N, 2) float64: of those that have one
    """
    chosen, applied, lighter = np.moveaxis(rng.random((batch_size, TWICE, 3)), 2, 0)  # (N, 2) each
    level = np.clip(rng.normal(LEVEL, LEVEL_SD, (batch_size, TWICE)), 0, LEVELS)
    strength = level / LEVELS * STRONGEST
    number = 1 + (chosen * len(OPERATIONS)).astype(np.int64)
    return {"operation": np.where(applied < APPLIED_P, number, 0),
            "factor": 1 + np.where(lighter < LIGHTER_P, -strength, strength)}


def apply(images: Tensor, operation: NDArray, factor: NDArray) -> Tensor:
    """Images (N, S, S) in [0, 1], in place, with the operations (N, 2) that `draw` chose and their factors (N, 2)."""
    for turn in range(operation.shape[1]):
        for number, change in OPERATIONS.items():
            some = (operation[:, turn] == number).nonzero()[0]  # on the host, where it costs no wait
            if len(some):
                index = to_device(some, images.device)
                factors = to_device(factor[some, turn], images.device)[:, None, None]
                images.index_copy_(0, index, change(images.index_select(0, index), factors))
    return images


def autocontrast(images: Tensor, _: Tensor | None = None) -> Tensor:
    """The darkest pixel to 0 and the brightest to 1, linearly; images of one grey level stay as they are."""
    low, high = images.amin((1, 2), keepdim=True), images.amax((1, 2), keepdim=True)
    level = 1 / 255
    return torch.where(high - low < level / 2, images, (images - low) / (high - low).clamp(min=level / 2))


def equalize(images: Tensor, _: Tensor | None = None) -> Tensor:
    """The histogram of the 256 grey levels made even, as PIL's table does it (in whole numbers: exactly)."""
    levels = (images * 255).round().long().flatten(1)  # (N, S x S)
    counts = levels.new_zeros(len(levels), 256).scatter_add_(1, levels, torch.ones_like(levels))
    brightest = counts.gather(1, levels.amax(1, keepdim=True))  # how many pixels have the highest level: (N, 1)
    step = (levels.shape[1] - brightest) // 255
    table = (counts.cumsum(1) - counts + step // 2) // step.clamp(min=1)
    table = torch.where(step > 0, table.clamp(max=255), torch.arange(256, device=images.device))
    return table.gather(1, levels).view_as(images) / 255


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """About the image's mean."""
    # dimension by dimension: over both at once, threads would share the sum of an image that is alone, and round it
    return _blend(images.mean(2, keepdim=True).mean(1, keepdim=True), images, factors)


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """About black."""
    return _blend(torch.zeros_like(images), images, factors)


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """About the image smoothed by 3 x 3 pixels, the middle one five times; those at the border stay as they are."""
    smooth, inner = images.clone(), images[:, 1:-1, 1:-1]
    smooth[:, 1:-1, 1:-1] = (9 * F.avg_pool2d(images[:, None], 3, 1)[:, 0] + 4 * inner) / 13
    return _blend(smooth, images, factors)


def _blend(degenerate: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """PIL's Image.blend, clamped: (N, S, S) with factors (N, 1, 1)."""
    return torch.lerp(degenerate.expand_as(images), images, factors).clamp_(0, 1)


OPERATIONS = dict(enumerate((autocontrast, equalize, contrast, brightness, sharpness), 1))
