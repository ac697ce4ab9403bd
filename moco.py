"""MoCo v2: query and key encoders, Shuffling BN, queue, Eq. 1 and Eq. 3.

Two views of a slice are made. The query encoder is trained to tell, by its embedding of one view, the slice's
other view among the queue's 65,536 earlier slices. The other view's embedding, the key, comes from a slow copy
of the encoder (an exponential moving average, EMA), so that the queue's entries stay comparable.

Batch statistics would give the answer away: a query could recognise the key that was normalised together with
it. Shuffling BN therefore encodes the keys in another order than the queries, on other devices. Here a device is
a group of `group` images (32, the paper's batch per device): BN and whitening see one group, and all else runs over
a pass, as many groups as the memory has room for. So one process with 8 groups computes what 8 processes with one
group compute.

Shapes: B images of this process, N of the global batch (B x processes), p of a pass, dim of an embedding, C channels
of the first stage, S pixels of a view's side.
"""

import copy
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from group_norms import end_step, group_norms, world_size
from local_loss import local_info_nce, pool_boxes, pool_cells, take_patches, unit
from views.resize import normalise


class Encoder(nn.Module):
    """A torchvision ResNet and MoCo v2's projector: Linear, ReLU, Linear, no BN."""

    def __init__(self, backbone: nn.Module, dim: int):
        super().__init__()
        width = backbone.fc.in_features
        backbone.fc = nn.Identity()
        self.backbone = backbone
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, dim))

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, S, S) -> first-stage features (B, C, S/4, S/4), the backbone's pooled output (B, width).

        Or grey images (B, 1, S, S) in [0, 1]: the network's three channels are made of them here, so that one is kept
        and sent between processes until then.
        """
        b = self.backbone
        images = normalise(images) if images.shape[1] == 1 else images  # (B, 3, S, S)
        stem = b.maxpool(b.relu(b.bn1(b.conv1(images))))  # (B, 64, S/4, S/4)
        first = b.layer1(stem)  # (B, C, S/4, S/4): Fig. 2's patches are cut from this map
        last = b.layer4(b.layer3(b.layer2(first)))  # (B, width, S/32, S/32); its last BN may be the whitening, Eq. 5
        return first, b.avgpool(last).flatten(1)  # pooled: (B, width)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images as for `features` -> first-stage features (B, C, S/4, S/4), embeddings (B, dim), not normalised."""
        first, pooled = self.features(images)
        return first, self.projector(pooled)


class MoCo(nn.Module):
    """Query and key encoders over one backbone design, with the queue.

    backbone: a torchvision ResNet (its fc is dropped), whitened beforehand or not; it becomes the query
    encoder's, a copy the key encoder's. dim: embedding size. queue: number of keys kept. group: images that
    share batch statistics. local: keep first-stage cells for Eq. 2. groups_per_pass: how many groups run at once; it
    changes the memory that a step takes, and results by rounding only.
    """

    def __init__(self, backbone: nn.Module, dim: int = 128, queue: int = 65536, group: int = 32, ema: float = 0.999,
                 temperature: float = 0.2, local: bool = False, temperature_local: float = 0.2,
                 lambda_local: float = 1.0, groups_per_pass: int = 1):
        super().__init__()
        self.group, self.ema, self.local, self.groups_per_pass = group, ema, local, groups_per_pass
        self.temperature, self.temperature_local, self.lambda_local = temperature, temperature_local, lambda_local
        self.encoder_q = group_norms(Encoder(backbone, dim), group)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)  # no gradient: it follows by EMA
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1))  # (queue, dim), unit length
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.int64))  # the oldest key, replaced next
        # of the last forward: share of queries nearest to their own key, mean cosine to it, mean cosine to the queue
        self.query_stats = torch.zeros(3)

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """key <- ema * key + (1 - ema) * query, for parameters; the key encoder has its own buffers."""
        torch._foreach_lerp_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1 - self.ema)

    def passes(self, encoder: Encoder, batch: int) -> Iterator[slice]:
        """Which of this process's images run together, pass after pass: one step of an encoder's running statistics."""
        size = self.groups_per_pass * self.group
        for start in range(0, batch, size):
            part = slice(start, min(start + size, batch))
            encoder.groups.begin(part.start, part.stop, batch, self.queue.device)
            yield part
        end_step(encoder)

    @torch.no_grad()
    def keys(self, view_k: Tensor, permutation: Tensor, parts: tuple[Tensor, Tensor] | None = None
             ) -> tuple[Tensor, Tensor | None]:
        """This process's views (B, 1 or 3, S, S) -> their keys (B, dim), unit length, and cells (B, 49, C) or None.

        permutation: (N,) int64, the same on every process. Shuffling BN: the global batch is permuted, each process
        encodes its share group by group, and the results return to their places. parts: boxes (N, 4) and flips (N,)
        of the global batch for `pool_boxes`; None: whole views.
        """
        batch, processes = len(view_k), world_size()
        rank = dist.get_rank() if processes > 1 else 0

        # shuffle: which of the N views this process encodes
        mine = permutation.view(processes, batch)[rank]  # (B,)
        shuffled = _gather(view_k)[mine]  # (B, 1 or 3, S, S)

        # encode, pass by pass, each group with its own batch statistics
        keys, cells = zip(*(self.encode_keys(shuffled[part], parts and tuple(x[mine[part]] for x in parts))
                            for part in self.passes(self.encoder_k, batch)), strict=True)

        # unshuffle: the keys of all processes, of which this one's images take theirs
        back = permutation.argsort().view(processes, batch)[rank]  # (B,)
        keys = _gather(torch.cat(keys))[back]  # (B, dim)
        return keys, _gather(torch.cat(cells))[back] if self.local else None

    def encode_keys(self, views: Tensor, parts: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor | None]:
        """One pass's views (p, 1 or 3, S, S) -> keys (p, dim), unit length, and cells (p, 49, C) or None."""
        first, embedding = self.encoder_k(views)  # (p, C, S/4, S/4), (p, dim)
        return unit(embedding), self.cells(first, parts) if self.local else None

    def cells(self, first: Tensor, parts: tuple[Tensor, Tensor] | None) -> Tensor:
        """First-stage features (p, C, S/4, S/4) -> the 49 cells (p, 49, C) of the whole maps, or of `pool_boxes`."""
        return pool_boxes(first, *parts) if parts else pool_cells(first)

    def forward(self, view_q: Tensor, keys: Tensor, cells: Tensor | None, patch_idx: Tensor | None,
                parts: tuple[Tensor, Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One pass's views (p, 1 or 3, S, S), keys, cells and patches -> (L_global, L_local), means over its images.

        patch_idx: (p, K) int64, which of an image's 49 cells are its patches. parts: boxes (p, 4) and flips (p,) for
        `pool_boxes`, and (p,) bool, which images Eq. 2 is taken over: a group's loss is the mean over these, 0 without.
        """
        first, embedding = self.encoder_q(view_q)  # (p, C, S/4, S/4), (p, dim)
        loss_global = self.global_loss(embedding, keys)
        if not self.local:
            return loss_global, torch.zeros_like(loss_global)
        own, weights = self.cells(first, parts and parts[:2]), None  # (p, 49, C)
        if parts:
            usable = parts[2].view(-1, self.group).to(own)  # (groups, images of a group)
            weights = (usable / usable.sum(1, keepdim=True).clamp(min=1) / len(usable)).flatten()  # (p,)
        query, key = take_patches(own, patch_idx), take_patches(cells, patch_idx)  # (p, K, C) each
        return loss_global, local_info_nce(query, key, self.temperature_local, weights)

    def global_loss(self, embedding: Tensor, keys: Tensor) -> Tensor:
        """Eq. 1 for embeddings (p, dim) of queries and their keys (p, dim) -> scalar, in at least float32."""
        with torch.autocast(embedding.device.type, enabled=False):
            query = unit(embedding)
            positive = (query * keys).sum(1, keepdim=True)  # (p, 1): cosine to the own key
            negatives = query @ self.queue.mT  # (p, queue): to earlier slices' keys
            nearest = (positive > negatives.amax(1, keepdim=True)).to(positive)
            self.query_stats = torch.stack([nearest.mean(), positive.mean(), negatives.mean()]).detach()
            logits = torch.cat([positive, negatives], 1) / self.temperature  # (p, 1 + queue)
            labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)  # the own key stands first
            return F.cross_entropy(logits, labels)  # Eq. 1

    def total(self, loss_global: Tensor, loss_local: Tensor) -> Tensor:
        """L = L_global + lambda L_local."""
        return loss_global + self.lambda_local * loss_local  # Eq. 3

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the queue's oldest entries by the global batch's keys; the queue's length is a multiple of it."""
        keys = _gather(keys)  # (N, dim)
        places = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % len(self.queue)  # (N,)
        self.queue.index_copy_(0, places, keys)
        self.queue_ptr.add_(len(keys)).remainder_(len(self.queue))


def _gather(x: Tensor) -> Tensor:
    """The processes' tensors (B, ...) of equal shape, one behind the other: (N, ...)."""
    if world_size() == 1:
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)
