"""What others use: lightly's MoCo step and a plain one, views of theirs, PIL images from loader processes.

tools/bench.py and tools/gpu.py time them beside ours. lightly and kornia (requirements-bench.txt) are imported where
they are called.
"""

import copy
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import datasets
from engine import processes

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def pil_transform(channels: int) -> Callable:
    """MoCo v2's view of a PIL image by torchvision: for 3 channels with hue and grayscale, for 1 without."""
    if channels == 3:
        colour = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2)]
    else:
        colour = [v2.RandomApply([v2.ColorJitter(0.4, 0.4)], 0.8)]
    return v2.Compose([
        v2.RandomResizedCrop(224, (0.2, 1.0)), *colour, v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], 0.5),
        v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.45] * channels, [0.225] * channels)])


def pil_views(slices: Tensor) -> dict[str, Callable]:
    """By library, what makes two views of each slice (N, H, H) uint8 with PIL: always on the CPU."""
    from lightly.transforms import MoCoV2Transform

    pictures = [Image.fromarray(x.numpy()) for x in slices]
    coloured = [p.convert("RGB") for p in pictures]
    light, three, one = MoCoV2Transform(input_size=224), pil_transform(3), pil_transform(1)
    return {"lightly's MoCoV2Transform": lambda: [light(p) for p in coloured],
            "torchvision v2 on PIL, 3 channels": lambda: [three(p) for p in coloured for _ in "ab"],
            "torchvision v2 on PIL, 1 channel, no hue": lambda: [one(p) for p in pictures for _ in "ab"]}


def kornia_views(slices: Tensor) -> Callable:
    """What makes two views of all slices (N, H, H) uint8 at once, on their device."""
    import kornia.augmentation as K

    batched = nn.Sequential(
        K.RandomResizedCrop((224, 224), (0.2, 1.0)), K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2), K.RandomGaussianBlur((23, 23), (0.1, 2.0), p=0.5), K.RandomHorizontalFlip(),
        K.Normalize(torch.full((3,), 0.45), torch.full((3,), 0.225))).to(slices.device)
    return lambda: [batched(slices[:, None].expand(-1, 3, -1, -1).float() / 255) for _ in "ab"]


class PilPairs(Dataset):
    """`count` times two views of a slice of the store, as most people write it: (3, 224, 224) float32 each."""

    def __init__(self, store: datasets.Store, count: int):
        self.store, self.count, self.transform = store, count, pil_transform(3)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        picture = Image.fromarray(self.store.batch([i % len(self.store)])[0]).convert("RGB")
        return self.transform(picture), self.transform(picture)


def pil_loader(store: datasets.Store, batch: int, steps: int, cuda: bool) -> DataLoader:
    """`steps` batches of PilPairs, from as many processes as there are cores, pinned for a GPU."""
    return DataLoader(PilPairs(store, batch * steps), batch, num_workers=os.cpu_count(), persistent_workers=True,
                      pin_memory=cuda)


def lightly_step(arch: str, size: int, batch: int, queue: int, device: torch.device, amp: str, layout: str) -> Callable:
    """One optimizer step of MoCo v2 put together from lightly's parts as its examples do.

    Its two views (batch, 3, size, size) lie ready on the device, in the layout of its encoders (one of LAYOUTS).
    """
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import batch_shuffle, batch_unshuffle, deactivate_requires_grad, update_momentum

    def encoder() -> nn.Module:
        net = torchvision.models.get_model(arch, weights=None)
        width, net.fc = net.fc.in_features, nn.Identity()
        return nn.Sequential(net, MoCoProjectionHead(width, width, 128)).to(device, memory_format=LAYOUTS[layout])

    query, key = encoder(), encoder()
    deactivate_requires_grad(key)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(queue, 128)).to(device)
    optimizer = torch.optim.SGD(query.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    a, b = (torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=LAYOUTS[layout]) for _ in "ab")

    def step() -> None:
        """EMA, keys of the shuffled batch, loss, backward, SGD."""
        update_momentum(query, key, m=0.999)
        with processes.autocast(amp, device):
            embedding = query(a)
            with torch.no_grad():
                shuffled, order = batch_shuffle(b)
                keys = batch_unshuffle(key(shuffled), order)
            loss = criterion(embedding, keys)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_step(arch: str, size: int, batch: int, queue: int, device: torch.device, amp: str, compiled: bool
               ) -> Callable:
    """The floor of MoCo v2: torchvision's network with plain BN in one pass, no shuffle, no views to make.

    EMA, keys, InfoNCE against a queue, backward, SGD, enqueue. Its views lie ready on the device; all is channels_last.
    """
    query = torchvision.models.get_model(arch, weights=None, num_classes=128)
    query = query.to(device, memory_format=torch.channels_last)
    key = copy.deepcopy(query).requires_grad_(False)
    if compiled:
        query.compile()
        key.compile()
    optimizer = torch.optim.SGD(query.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    negatives = F.normalize(torch.randn(queue, 128, device=device))
    own = torch.zeros(batch, dtype=torch.int64, device=device)  # the own key's place among the logits
    a, b = (torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
            for _ in "ab")

    def step() -> None:
        """One optimizer step, always on the same two views."""
        with torch.no_grad(), processes.autocast(amp, device):
            torch._foreach_lerp_(list(key.parameters()), list(query.parameters()), 0.001)
            keys = F.normalize(key(b).float())
        with processes.autocast(amp, device):
            embedding = query(a)
        embedding = F.normalize(embedding.float())
        logits = torch.cat([(embedding * keys).sum(1, keepdim=True), embedding @ negatives.mT], 1)
        F.cross_entropy(logits / 0.2, own).backward()
        optimizer.step()
        optimizer.zero_grad()
        negatives[:batch] = keys

    return step
