"""MoCo v2: query and key encoders, shuffled groups, queue, Eq. 1 and Eq. 3.

Two views of a slice are made. The query encoder is trained to tell, by its embedding of one view, the slice's
other view among the queue's 65,536 earlier slices. The other view's embedding, the key, comes from a slow copy
of the encoder (an exponential moving average, EMA), so that the queue's entries stay comparable.

Batch statistics would give the answer away: a query could recognise the key that was normalised together with
it. MoCo therefore shuffles keys between devices before encoding. Here a device is a micro-batch: both encoders
run one group of `group` images (32, the paper's batch per device) at a time, keys in shuffled order, so that
one process with 8 groups computes what 8 processes with one group compute. BN and whitening see one group.
"""

import contextlib
import copy
import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from augment import normalise
from local_loss import local_info_nce, pool_boxes, pool_cells, take_patches

ALIGN = 64  # numbers


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
        images = normalise(images) if images.shape[1] == 1 else images
        first = b.layer1(b.maxpool(b.relu(b.bn1(b.conv1(images)))))
        return first, b.avgpool(b.layer4(b.layer3(b.layer2(first)))).flatten(1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images as for `features` -> first-stage features (B, C, S/4, S/4), embeddings (B, dim), not normalised."""
        first, pooled = self.features(images)
        return first, self.projector(pooled)


class GroupStatistics:
    """Running statistics (BN, whitening) that do not depend on the order or number of groups.

    Every group of a step starts from the step's running statistics; `finish` leaves their mean over all
    groups and processes. (num_batches_tracked counts steps.) A group's backward must end before the next
    group starts, since the buffers are restored in place. The buffers become views of two flat tensors, of numbers
    and of counters, so that each of these is one operation and not one for each of hundreds of buffers.
    """

    def __init__(self, module: nn.Module):
        self.module, self.averaged = module, torch.empty(0)
        self.begin()

    def begin(self) -> None:
        """Before the first group of a step."""
        if not _share(next(self.module.buffers()), self.averaged):  # the first time, or the module has moved since
            buffers = list(self.module.buffers())
            self.averaged = _flat([b for b in buffers if b.is_floating_point()])
            self.counters = _flat([b for b in buffers if not b.is_floating_point()])
        self.groups, self.start, self.total = 0, self.averaged.clone(), torch.zeros_like(self.averaged)
        self.steps = self.counters + 1

    @contextlib.contextmanager
    def group(self):
        """Around one group's forward and, where there is one, backward."""
        if self.groups:
            with torch.no_grad():
                self.averaged.copy_(self.start)
        yield
        with torch.no_grad():
            self.total.add_(self.averaged)
        self.groups += 1

    @torch.no_grad()
    def finish(self) -> None:
        self.total.div_(self.groups * _world())
        if _world() > 1:
            dist.all_reduce(self.total)
        self.averaged.copy_(self.total)
        self.counters.copy_(self.steps)


def _share(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


@torch.no_grad()
def _flat(tensors: list[Tensor]) -> Tensor:
    """One tensor, (M,), whose parts the given ones become. Each begins at a multiple of ALIGN, as kernels that read
    several numbers at once need it; what lies between is zero.
    """
    *starts, length = itertools.accumulate((-(-t.numel() // ALIGN) * ALIGN for t in tensors), initial=0)
    flat = tensors[0].new_zeros(length)
    for t, start in zip(tensors, starts, strict=True):
        t.data = flat[start : start + t.numel()].view_as(t).copy_(t)
    return flat


class MoCo(nn.Module):
    """Query and key encoders over one backbone design, with the queue.

    backbone: a torchvision ResNet (its fc is dropped), whitened beforehand or not; it becomes the query
    encoder's, a copy the key encoder's. dim: embedding size. queue: number of keys kept. group: images that
    share batch statistics. local: keep first-stage cells for Eq. 2.
    """

    def __init__(self, backbone: nn.Module, dim: int = 128, queue: int = 65536, group: int = 32, ema: float = 0.999,
                 temperature: float = 0.2, local: bool = False, temperature_local: float = 0.2,
                 lambda_local: float = 1.0):
        super().__init__()
        self.group, self.ema, self.local = group, ema, local
        self.temperature, self.temperature_local, self.lambda_local = temperature, temperature_local, lambda_local
        self.encoder_q = Encoder(backbone, dim)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.statistics_k = GroupStatistics(self.encoder_k)
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        # of the last forward: share of queries nearest to their own key, mean cosine to it, mean cosine to the queue
        self.signs = torch.zeros(3)

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """key <- ema * key + (1 - ema) * query, for parameters; the key encoder has its own buffers."""
        torch._foreach_lerp_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1 - self.ema)

    @torch.no_grad()
    def keys(self, view_k: Tensor, permutation: Tensor, parts: tuple[Tensor, Tensor] | None = None
             ) -> tuple[Tensor, Tensor | None]:
        """This process's views (B, 1 or 3, S, S) -> their keys (B, dim), unit length, and cells (B, 49, C) or None.

        permutation: (B x processes,) int64, the same on every process. The global batch is permuted, each
        process encodes its share group by group, and the results return to their places. parts: boxes
        (B x processes, 4) and flips (B x processes,) of the global batch for `pool_boxes`; None: whole views.
        """
        batch, rank, world = len(view_k), dist.get_rank() if _world() > 1 else 0, _world()
        mine = permutation.view(world, batch)[rank]
        shuffled = _gather(view_k)[mine] if world > 1 else view_k[mine]
        statistics, keys, cells = self.statistics_k, [], []
        statistics.begin()
        for group, places in zip(shuffled.split(self.group), mine.split(self.group), strict=True):
            with statistics.group():
                first, embedding = self.encoder_k(group)
            keys.append(F.normalize(embedding.float(), dim=1))
            if self.local:
                cells.append(pool_boxes(first, *(x[places] for x in parts)) if parts else pool_cells(first))
        statistics.finish()
        back = permutation.argsort().view(world, batch)[rank]
        return _gather(torch.cat(keys))[back], _gather(torch.cat(cells))[back] if self.local else None

    def forward(self, view_q: Tensor, keys: Tensor, cells: Tensor | None, patches: Tensor | None,
                parts: tuple[Tensor, Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One group's views (B, 1 or 3, S, S), keys and cells, and patch indices (B, K) -> (L_global, L_local).

        parts: boxes (B, 4) and flips (B,) for `pool_boxes`, and which of the B pairs Eq. 2 is taken over, (M,) int64.
        """
        first, embedding = self.encoder_q(view_q)
        with torch.autocast(view_q.device.type, enabled=False):
            query = F.normalize(embedding.float(), dim=1)
            positive = (query * keys).sum(1, keepdim=True)
            negatives = query @ self.queue.mT
            nearest = (positive > negatives.amax(1, keepdim=True)).float()
            self.signs = torch.stack([nearest.mean(), positive.mean(), negatives.mean()]).detach()
            logits = torch.cat([positive, negatives], 1) / self.temperature  # (B, 1 + queue)
            first_is_right = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
            loss_global = F.cross_entropy(logits, first_is_right)  # Eq. 1
        if not self.local:
            return loss_global, torch.zeros_like(loss_global)
        own = pool_boxes(first, *parts[:2]) if parts else pool_cells(first)
        query, key = take_patches(own, patches), take_patches(cells, patches)
        if parts:
            query, key = query[parts[2]], key[parts[2]]
        # a group none of whose pairs shows a common part has no local loss
        loss_local = local_info_nce(query, key, self.temperature_local) if len(query) else query.sum()
        return loss_global, loss_local

    def total(self, loss_global: Tensor, loss_local: Tensor) -> Tensor:
        return loss_global + self.lambda_local * loss_local  # Eq. 3

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the queue's oldest entries by the global batch's keys; the queue's length is a multiple of it."""
        keys = _gather(keys)
        places = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, places, keys)
        self.pointer.add_(len(keys)).remainder_(len(self.queue))


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(x: Tensor) -> Tensor:
    """The processes' tensors of equal shape, one behind the other along the first dimension."""
    if _world() == 1:
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(_world())]
    dist.all_gather(parts, x)
    return torch.cat(parts)
