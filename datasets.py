"""From a store to the batch of step t: slices, views and crops of them, and reading ahead.

`python datasets.py prepare` and `python datasets.py audit` are ct/prepare.py's, as is how a store is made.
"""

import functools
import os
import resource
import sys
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))  # which PYTHONSAFEPATH leaves out
    import ct
    ct.importing()

import numpy as np
import torch

import augment
from ct import audit, coverage, stores, tasks
from ct import prepare as preparation
from ct.stores import HEADER, array, name_of, sizes_agree, task_of
from ct.volumes import BadInput
from engine import figures, launch, processes, seeds
from local_loss import CELLS
from views import resize

HELD_OUT = 128  # slices (an eighth of a small data set) on which collapse is looked for: never trained on


def prepare(*args, **kw) -> "Store":
    """`ct.prepare.prepare`, and the store that it makes or completes, opened."""
    return Store(*preparation.prepare(*args, **kw))


def open_labelled(args, data: Path) -> tuple["Store", processes.Processes, list[str]]:
    """A store of labelled volumes with its splits drawn, this process among the others, and what is to be said of it.

    args: the flags of `launch.Parser.common` and `task_flags`. Raises BadInput.
    """
    store = prepare(data, args.store or stores.default_store(data), "segment", tuple(args.window),
                    workers=args.workers, names=args.labels, organs=args.organs)
    ranks = processes.start(args.deterministic)
    drawn = processes.on_main(ranks.is_main, lambda: tasks.draw_splits(
        store.task, [v["id"] for v in store.volumes], args.val, args.val_cases, args.patient_regex))
    drawn += coverage.remarks(store.volumes, store.task, getattr(args, "split", None), getattr(args, "draws", ()))
    see = audit.command_line(data, "segment", args.labels, args.organs)
    return store, ranks, audit.remarks(store.volumes, store.skipped, store.task, see) + drawn


def room_for(files: int) -> int:
    """How many of `files` may stay open; this process's limit is raised where they would need over half of it."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and 2 * files > limit:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit + files, most))
        except (ValueError, OSError):
            return limit // 2
    return files


class File:
    """The voxels at the end of a .npy, open until this object goes; any number of threads may read at once.

    If the file is replaced meanwhile (its volume is prepared again), the old one is read to the end. Raises OSError,
    and EOFError where it is not `voxels` bytes and a header long.
    """

    def __init__(self, path: Path, voxels: int):
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self.start = os.fstat(self.descriptor).st_size - voxels
        if not 0 < self.start <= HEADER:
            raise EOFError

    def read(self, offset: int, out: np.ndarray) -> None:
        """Fill `out` with the voxels from `offset` on."""
        left, at = memoryview(out).cast("B"), self.start + offset
        while left:
            if not (got := os.preadv(self.descriptor, [left], at)):
                raise EOFError
            left, at = left[got:], at + got


class Store:
    """The slices of a prepared folder, numbered 0..N-1 through its volumes in order of id."""

    def __init__(self, folder: Path, index: dict):
        self.folder, self.kind, self.skipped = folder, index["kind"], index["skipped"]
        self.volumes, self.size, self.window = index["volumes"], index["size"], index["window"]
        self.data, self.task = index["data"], task_of(folder, index)
        self.is_phantom = any(v["phantom"] for v in self.volumes)
        self.name = "phantom" if self.is_phantom else name_of(Path(self.data))  # in configs, results and tables
        self.ends = np.cumsum([v["slices"] for v in self.volumes])
        # files that stay open. Others are opened for each read: slices are drawn at random, so to keep the last ones
        # instead of the first would save no more
        self.files, self.room = {}, room_for(sum(len(v["checksums"]) for v in self.volumes))
        for v in self.volumes:
            if not all(sizes_agree(folder, v)):
                raise BadInput(f"{folder}: the slices of {v['id']} are damaged; delete that folder and prepare again")

    def __getstate__(self) -> dict:
        return vars(self) | {"files": {}}  # a copy opens its own

    def __len__(self) -> int:
        return int(self.ends[-1])

    def of(self, ids: Collection[str] | None = None, every: int = 1) -> np.ndarray:
        """Numbers of each `every`-th slice of these volumes (of all), in order. Raises BadInput for a missing one."""
        there = {v["id"] for v in self.volumes}
        ids = there if ids is None else set(ids)
        if absent := sorted(ids - there):
            raise BadInput(f"{self.data}: case {', '.join(absent)} is missing there; the split needs it")
        return np.concatenate([np.arange(end - v["slices"], end, every)
                               for v, end in zip(self.volumes, self.ends, strict=True) if v["id"] in ids])

    def contents(self, ids: Collection[str] | None = None) -> dict[str, str]:
        """{id: what a volume holds} of these volumes (of all): the store's fingerprint, kept in a run's config.

        The checksum of its slices; for segmentation also that of its labels and the spacing, which HD95 is measured in,
        and what the labels mean, where that is not BTCV's.
        """
        meaning = [f"{zlib.crc32(str(self.task.labels).encode()):08x}"] if self.task and self.task.recorded else []

        def fingerprint(volume: dict) -> str:
            spacing = [f"{s:g}" for s in volume["spacing"]] if self.kind == "segment" else []
            return " ".join([*volume["checksums"].values(), *spacing, *meaning])

        return {v["id"]: fingerprint(v) for v in self.volumes if ids is None or v["id"] in ids}

    def place(self, index: int) -> tuple[int, int]:
        """Slice number -> (volume's position in `volumes`, slice in that volume)."""
        volume = int(np.searchsorted(self.ends, index, side="right"))
        return volume, int(index - (self.ends[volume - 1] if volume else 0))

    def where(self, volume: int, z: int) -> str:
        """A slice in words, for messages."""
        return f"{self.volumes[volume]['id']} slice {z}"

    def slice(self, index: int, label: bool = False, out: np.ndarray | None = None) -> np.ndarray:
        """One slice, or its label map, (H, W) uint8. Read, not mapped: mapped pages would count as memory in use."""
        volume, z = self.place(index)
        v = self.volumes[volume]
        out = np.empty((v["height"], v["width"]), np.uint8) if out is None else out
        path = array(self.folder, v["id"], label)
        try:
            file = self.files.get(path) or File(path, v["slices"] * out.size)
            if len(self.files) < self.room:
                self.files[path] = file
            file.read(z * out.size, out)
        except EOFError:
            raise BadInput(f"{path}: ends too early; delete its folder and prepare it again") from None
        except OSError as e:
            raise BadInput(f"{path}: cannot be read ({e.strerror})") from None
        return out

    def batch(self, indices: np.ndarray) -> np.ndarray:
        """Slices of a pretrain store: (B,) slice numbers -> (B, size, size) uint8."""
        out = np.empty((len(indices), self.size, self.size), np.uint8)
        for i, o in zip(indices, out, strict=True):
            self.slice(int(i), out=o)
        return out


def prefetch(fetch: Callable, steps: range, workers: int | None = None) -> Iterator[tuple]:
    """(step, fetch(step)) for every step, in order, computed ahead in `workers` threads (`launch.readers`)."""
    workers = max(1, launch.readers() if workers is None else workers)
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque = deque()
        try:
            for step in steps:
                ahead.append((step, pool.submit(fetch, step)))
                if len(ahead) > workers + 2:  # each is a batch in memory
                    yield ahead[0][0], ahead.popleft()[1].result()
            while ahead:
                yield ahead[0][0], ahead.popleft()[1].result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def on_device(batches: Iterator[tuple[int, torch.Tensor]], device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """`prefetch`'s batches on the device, to a GPU copied while the step before is at work (67 MB at the paper's size).

    They are to be pinned, as `resize.pinned` leaves them. On a CPU they come as they are.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream, previous = torch.cuda.Stream(device), None
    for step, batch in batches:
        with torch.cuda.stream(stream):
            copy = batch.to(device, non_blocking=True)
            ready = stream.record_event()
        if previous:
            yield _received(*previous)
        previous = step, copy, ready
    if previous:
        yield _received(*previous)


def _received(step: int, copy: torch.Tensor, ready: torch.cuda.Event) -> tuple[int, torch.Tensor]:
    """A copy that the current stream may use: it waits, and the host does not."""
    current = torch.cuda.current_stream(copy.device)
    current.wait_event(ready)
    copy.record_stream(current)
    return step, copy


def shuffled(slices: np.ndarray, seed: int) -> Callable[[int], np.ndarray]:
    """Epoch -> these slice numbers in the epoch's order; those of the last two are kept."""
    return functools.lru_cache(2)(lambda epoch: seeds.rng(seed, seeds.SLICES, epoch).permutation(slices))


class Batches:
    """Which slices, views, shuffle and patches step t has: a function of (seed, t) alone.

    Of `slices`, their number in the store or, with --every, the numbers of those that are taken, `held_out` are kept
    apart; the others are trained on.
    """

    def __init__(self, args, slices: int | np.ndarray, ranks: processes.Processes):
        self.seed, self.batch_size, self.slice_px, self.view_px = args.seed, args.batch_size, args.size, args.image_size
        self.geometric, self.recipe = args.geometric, args.recipe
        self.patches, self.aligned = args.patches, args.local and args.geometric
        drawn = seeds.rng(self.seed, seeds.LOOKS).permutation(slices)
        self.held_out, self.trained = np.split(drawn, [min(HELD_OUT, max(2, len(drawn) // 8))])
        self.device, self.steps_per_epoch = ranks.device, len(self.trained) // self.batch_size
        self.rank_slice, self.order = ranks.share(self.batch_size), shuffled(self.trained, self.seed)

    def indices(self, t: int) -> np.ndarray:
        """Slice numbers of step t's global batch: an epoch is a shuffled pass without its last partial batch."""
        epoch, position = divmod(t, self.steps_per_epoch)
        return self.order(epoch)[position * self.batch_size :][: self.batch_size]

    def views(self, t: int, purpose: int) -> augment.Params:
        """What was drawn for this process's views: `purpose` says of which encoder."""
        return {k: v[self.rank_slice] for k, v in self._drawn(t, purpose).items()}

    def _drawn(self, t: int, purpose: int) -> augment.Params:
        return augment.draw(seeds.rng(self.seed, purpose, t), self.batch_size, self.geometric, self.recipe)

    def common_parts(self, t: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """What both views of each pair show, for Eq. 2 with crops and flips, on the device.

        Of the global batch's keys boxes (N, 4) and flips (N,), for `MoCo.keys`; of this process's queries boxes (B, 4),
        flips (B,) and which pairs share enough (B,), for `MoCo.forward`.
        """
        query, key = (self._drawn(t, purpose) for purpose in (seeds.VIEW_Q, seeds.VIEW_K))
        boxes_q, boxes_k, usable = augment.common_parts(query, key, self.slice_px)
        own = (x[self.rank_slice] for x in (boxes_q, query["flip"], usable))
        return tuple(tuple(resize.to_device(x, self.device) for x in part) for part in ((boxes_k, key["flip"]), own))

    def permutation(self, t: int) -> torch.Tensor:
        """The order (N,) in which the global batch's keys are encoded: Shuffling BN."""
        return torch.from_numpy(seeds.rng(self.seed, seeds.SHUFFLE, t).permutation(self.batch_size))

    def patch_idx(self, t: int) -> torch.Tensor:
        """(B, K) int64: K of the 49 cells per image, without replacement."""
        draw = seeds.rng(self.seed, seeds.PATCHES, t).random((self.batch_size, CELLS**2))
        return torch.from_numpy(draw.argsort(1)[self.rank_slice, : self.patches].copy())


def draw_crops(rng: np.random.Generator, batch_size: int, flip: bool = True) -> augment.Params:
    """Every random number of a training crop of `batch_size` labelled slices, for `apply_crops`.

    mmsegmentation's recipe (_base_/datasets/pascal_voc12.py) without hue, saturation and cat_max_ratio:
    scale (N,) of the shorter side relative to the crop, place (N, 2) of the crop in what it can move, flip (N,), none
    without `flip`, brightness (N,) added and contrast (N,) multiplied, each with p = 0.5.
    """
    scale, top, left, flipped, brightened, brightness, contrasted, contrast = rng.random((8, batch_size))
    return {
        "scale": 0.5 + 1.5 * scale,
        "place": np.stack([top, left], axis=1),
        "flip": flip & (flipped < augment.FLIP_P),
        "brightness": np.where(brightened < 0.5, (2 * brightness - 1) * 32 / 255, 0.0),
        "contrast": np.where(contrasted < 0.5, 0.5 + contrast, 1.0),
    }


def undrawn_crops(batch_size: int) -> augment.Params:
    """What `draw_crops` gives, for crops that are the whole slice, nothing changed (of a longer side, the middle)."""
    ones, zeros = np.ones(batch_size), np.zeros(batch_size)
    return {"scale": ones, "place": np.full((batch_size, 2), 0.5), "flip": zeros > 0, "brightness": zeros,
            "contrast": ones}


def crop_boxes(shapes: np.ndarray, params: augment.Params, size: int) -> tuple[np.ndarray, np.ndarray]:
    """What the crops show of slices of these heights and widths (N, 2), as drawn: (boxes, their sides in the crop).

    Boxes (N, 4) int64: top, left, height, width in pixels of the slice; sides (N, 2) int64 in pixels of the crop, below
    `size` where the resized slice is smaller than the crop.
    """
    # to resize the slice by a scale and crop it is to crop a window of side / scale and resize that
    window = np.maximum(1, np.rint(shapes.min(1) / params["scale"]))[:, None]  # side of the crop in pixels of the slice
    lengths = np.minimum(shapes, window)
    starts = np.rint(params["place"] * np.maximum(0, shapes - window))
    shown = np.clip(np.rint(lengths * size / window), 1, size)
    return np.concatenate([starts, lengths], axis=1).astype(np.int64), shown.astype(np.int64)


def apply_crops(slices: torch.Tensor, labels: torch.Tensor, shapes: np.ndarray, params: augment.Params, size: int
                ) -> tuple[torch.Tensor, torch.Tensor]:
    """Slices and label maps (N, H, W) uint8 -> images (N, 3, size, size), labels (N, size, size) int64.

    shapes (N, 2): how much of each is a slice, from the top left; the rest is padding. The part of a slice that the
    crop will show is resized, images bilinear with antialiasing, labels to the nearest pixel; where the resized slice
    is smaller than the crop, the rest is 0 (air) and 255 (ignored). On a GPU the host waits for nothing.
    """
    crop = resize.labelled_by_products if slices.is_cuda else resize.labelled_one_by_one
    images, masks = crop(slices, labels, *crop_boxes(shapes, params, size), params["flip"], size)
    # light: added, then multiplied, and clamped after each, in [0, 1]
    light = np.stack([params["brightness"], params["contrast"]])
    brightness, contrast = resize.to_device(light, images.device)[:, :, None, None]  # (N, 1, 1) each
    images = images.div_(255).add_(brightness).clamp_(0, 1).mul_(contrast).clamp_(0, 1)
    return resize.normalise(images), masks


class Crops:
    """Which slices and crops iteration t has: a function of (seed, t) alone.

    With --whole-slices a crop is the whole slice (of one that is not square, the middle), as it is.
    """

    def __init__(self, args, store: Store, slices: np.ndarray, ranks: processes.Processes):
        self.store, self.slices, self.device = store, slices, ranks.device
        self.seed, self.batch_size, self.crop_size, self.flip = args.seed, args.batch_size, args.crop_size, args.flip
        self.whole_slices = args.whole_slices
        self.rank_slice, self.order = ranks.share(self.batch_size), shuffled(slices, self.seed)

    def indices(self, t: int) -> list[int]:
        """Slice numbers of the global batch: one shuffled pass over the split after the other."""
        places = range(t * self.batch_size, (t + 1) * self.batch_size)
        return [int(self.order(p // len(self.slices))[p % len(self.slices)]) for p in places]

    def fetch(self, t: int) -> list[int] | tuple[torch.Tensor, np.ndarray]:
        """What iteration t reads for this process, see `read`; slice numbers where features are kept."""
        indices = self.indices(t)[self.rank_slice]
        return indices if self.whole_slices else self.read(indices)

    def read(self, indices: list[int]) -> tuple[torch.Tensor, np.ndarray]:
        """Slices by their numbers and their labels: (2, B, H, W) uint8 on the CPU, and the shape (B, 2) of each.

        Smaller ones are padded to the right and below: so all are one copy to the device.
        """
        pairs = [[self.store.slice(i, label) for i in indices] for label in (False, True)]
        shapes = np.array([image.shape for image in pairs[0]])
        stacked = np.zeros((2, len(indices), *shapes.max(0)), np.uint8)
        for out, arrays in zip(stacked, pairs, strict=True):
            for padded, one, (height, width) in zip(out, arrays, shapes.tolist(), strict=True):
                padded[:height, :width] = one
        return resize.pinned(torch.from_numpy(stacked), self.device), shapes

    def apply(self, t: int, read: tuple[torch.Tensor, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """The crops of iteration t of what `fetch` read: images (B, 3, S, S) and labels (B, S, S) on the device."""
        drawn = draw_crops(seeds.rng(self.seed, seeds.CROPS, t), self.batch_size, self.flip)
        return self._crop({k: v[self.rank_slice] for k, v in drawn.items()}, *read)

    def whole(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Slices by their numbers, whole, and their labels at the size of a crop."""
        return self._crop(undrawn_crops(len(indices)), *self.read(indices))

    def _crop(self, drawn: augment.Params, stacked: torch.Tensor, shapes: np.ndarray
              ) -> tuple[torch.Tensor, torch.Tensor]:
        return apply_crops(*stacked.to(self.device, non_blocking=True), shapes, drawn, self.crop_size)


def main(argv: list[str] | None = None) -> None:
    """`ct.prepare.main`, whose contact sheets engine/figures.py draws."""
    preparation.main(argv, functools.partial(figures.attempt, figures.contact_sheet))


if __name__ == "__main__":
    main()
