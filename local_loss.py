"""Eq. 2: an InfoNCE loss between patches of the first stage's feature map, location against location.

The map (layer1: stride 4, 256 channels in ResNet-50) is divided into 7 x 7 cells, non-overlapping by
construction. K of them, the same in both views, are the patches of an image; a patch's positive is the
patch at its location i in the other view, its negatives are the other patches j of the same image pair.
This needs both views to show the same place at the same cell. The paper drops geometric augmentation for it
(`pool_cells`); a step beyond the paper keeps it and takes the cells of what both crops show (`pool_boxes`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CELLS = 7  # cells along a side of the feature map


def widen(x: Tensor) -> Tensor:
    """Half types as float32; what is wider stays as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor) -> Tensor:
    """Vectors (..., C) divided by their length, in at least float32: their products are cosines."""
    return F.normalize(widen(x), dim=-1)


def pool_cells(features: Tensor) -> Tensor:
    """Average-pool (B, C, H, W) into its 7 x 7 cells: (B, 49, C), at least float32.

    A cell has H // 7 x W // 7 pixels; the remainder at the right and lower border is cropped.
    Raises ValueError when a side has fewer than 7 pixels.
    """
    height, width = features.shape[2] // CELLS, features.shape[3] // CELLS
    if min(height, width) < 1:
        raise ValueError(f"a feature map of {tuple(features.shape[2:])} has no {CELLS} x {CELLS} cells; "
                         "use larger images")
    cropped = features[..., : height * CELLS, : width * CELLS]  # (B, C, 7 height, 7 width)
    with torch.autocast(features.device.type, enabled=False):
        pooled = F.avg_pool2d(widen(cropped), (height, width))  # (B, C, 7, 7)
        return pooled.flatten(2).mT  # (B, 49, C)


def pool_boxes(features: Tensor, boxes: Tensor, flip: Tensor) -> Tensor:
    """Average-pool a part of each map (B, C, H, W), in 7 x 7 cells: (B, 49, C), at least float32. Beyond the paper.

    boxes (B, 4): top, left, height, width of the part as fractions of the view before its flip; flip (B,) bool:
    the view, and so the map, is mirrored left to right. Cells come in the order of the view before its flip, so
    those of two views of one part of a slice correspond. The part may begin and end within a pixel: a cell is the
    mean of bilinear samples, about one a pixel, as torchvision's `roi_align` takes them; here as two products, which
    is faster and has no atomics. Whole boxes give `pool_cells` where 7 divides the sides.
    """
    height, width = features.shape[2:]
    with torch.autocast(features.device.type, enabled=False):
        maps = widen(features).movedim(1, -1)  # (B, H, W, C): a view, and free of copies in channels_last
        top, left, tall, wide = boxes.to(maps).unbind(1)
        rows, columns = _sampling(top, tall, height), _sampling(left, wide, width)  # (B, 7, H), (B, 7, W)
        mirrored = flip.to(features.device)[:, None, None]
        columns = torch.where(mirrored, columns.flip(2), columns)
        lines = (rows @ maps.flatten(2)).unflatten(2, (width, -1))  # (B, 7, W x C) -> (B, 7, W, C)
        return (columns[:, None] @ lines).flatten(1, 2)  # (B, 7, 7, C) -> (B, 49, C)


def _sampling(start: Tensor, length: Tensor, side: int) -> Tensor:
    """(B, 7, side): weights of a map's pixels along one side in the cells of [start, start + length), fractions (B,).

    A cell's samples, as many as it has pixels, rounded up, are interpolated between the pixels' centres.
    """
    cell = length * side / CELLS  # (B,), pixels of a cell
    sample = torch.arange(-(-side // CELLS), device=start.device)  # (P,): the most that a cell can have
    count = cell.ceil().clamp(1, len(sample))  # (B,): how many of them a cell has
    at = (sample + 0.5) / count[:, None]  # (B, P), in cells
    at = (torch.arange(CELLS, device=start.device)[:, None] + at[:, None]) * cell[:, None, None]  # (B, 7, P)
    at = (start[:, None, None] * side + at - 0.5).clamp(0, side - 1)
    near = (1 - (at[..., None] - torch.arange(side, device=start.device)).abs()).clamp(min=0)  # (B, 7, P, side)
    used = (sample < count[:, None])[:, None, :, None]
    return (near * used).sum(2) / count[:, None, None]


def take_patches(cells: Tensor, patch_idx: Tensor) -> Tensor:
    """The cells (B, 49, C) at the indices patch_idx (B, K) int64: (B, K, C). Raises ValueError for K > 49."""
    if patch_idx.shape[1] > CELLS**2:
        raise ValueError(f"{patch_idx.shape[1]} patches asked of {CELLS**2} non-overlapping cells")
    return cells.gather(1, patch_idx[..., None].expand(-1, -1, cells.shape[2]))  # (B, K, 1) -> (B, K, C)


def local_info_nce(query: Tensor, key: Tensor, temperature: float, weights: Tensor | None = None) -> Tensor:
    """Eq. 2 for patch features (B, K, C) of the two views -> scalar, the mean over the B x K locations.

    weights (B,): of the images, whose weighted sum takes the place of the mean over them.

    sim is the cosine similarity over `temperature`; the denominator runs over all K locations, the positive
    included. In at least float32. Raises ValueError for K > 49 or differing shapes.
    """
    if query.shape != key.shape or query.shape[1] > CELLS**2:
        raise ValueError(f"patches {tuple(query.shape)} and {tuple(key.shape)}: expected equal (B, K <= 49, C)")
    with torch.autocast(query.device.type, enabled=False):
        query, key = unit(query), unit(key)
        logits = query @ key.mT / temperature  # (B, K, K): location i of one view against every location j of the other
        labels = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)  # (B, K): i against i
        if weights is None:
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten())  # Eq. 2: (B x K, K) against (B x K,)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")  # (B x K,)
        return losses.view(labels.shape).mean(1) @ weights.to(losses)  # (B,) . (B,)
