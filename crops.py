"""Segmentation's training crops of labelled slices: mmsegmentation's recipe, each sample its own numbers.

`draw_crops` makes every random number, `apply_crops` none.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from augment import FLIP_P, Params
from resize import normalise, to_device


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
        # to resize the slice by a scale and crop it is to crop a window of side / scale and resize that
        window = max(1, round(min(image.shape) / scale))  # side of the crop in pixels of the slice
        (top, height), (left, width) = ((round(p * max(0, side - window)), min(side, window))
                                        for p, side in zip(place, image.shape, strict=True))
        shown = tuple(min(size, max(1, round(side * size / window))) for side in (height, width))
        box = (slice(top, top + height), slice(left, left + width))
        # of the slice (H, W) only what will be shown is resized: (h, w) -> shown
        part = F.interpolate(image[box][None, None].float(), shown, mode="bilinear", antialias=True)[0, 0]
        # labels are names, not numbers: the nearest pixel's, nothing between two
        mask = F.interpolate(label[box][None, None].float(), shown, mode="nearest-exact")[0, 0].long()
        # a slice that is smaller than the crop leaves air and ignored pixels to the right and below
        images[i, : shown[0], : shown[1]] = part.flip(1) if flip else part
        masks[i, : shown[0], : shown[1]] = mask.flip(1) if flip else mask
    # light: added, then multiplied, and clamped after each, in [0, 1]
    brightness, contrast = (to_device(params[k], images.device)[:, None, None] for k in ("brightness", "contrast"))
    images = images.div_(255).add_(brightness).clamp_(0, 1).mul_(contrast).clamp_(0, 1)
    return normalise(images), masks
