"""What tools/bench.py reads: volumes and stores that it makes, and ways to read them that need a page of code."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import nibabel as nib
import numpy as np

import datasets
from ct import prepare
from ct.stores import FORMAT, stamp

SIDE = 512  # of the slices on disk


def noise_volumes(folder: Path, count: int) -> list[Path]:
    """`count` volumes of 64 slices of noise, which does not compress: the hardest to decode."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        noise = rng.integers(-1000, 1000, (SIDE, SIDE, 64)).astype(np.int16)
        nib.save(nib.Nifti1Image(noise, np.diag([-0.8, -0.8, 2.5, 1])), folder / f"{i}.nii.gz")
    return sorted(folder.iterdir())


def write_store(data: Path, store: Path, volumes: int, slices: int, noise: bool = False) -> None:
    """A store as `prepare` would have left it, of volumes that are empty files: of noise, or sparse without content."""
    data.mkdir()
    store.mkdir(parents=True)
    rng, ends = np.random.default_rng(0), np.linspace(0, slices, volumes + 1).astype(int)
    header = np.lib.format.header_data_from_array_1_0(np.empty((1, SIDE, SIDE), np.uint8))
    for i, depth in enumerate(np.diff(ends).tolist(), 1):
        image = data / f"Case_{i:05d}_0000.nii.gz"
        image.touch()
        with open(store / f"Case_{i:05d}.npy", "wb") as f:
            np.lib.format.write_array_header_1_0(f, header | {"shape": (depth, SIDE, SIDE)})
            if noise:
                f.write(rng.bytes(depth * SIDE * SIDE))
            else:
                f.truncate(f.tell() + depth * SIDE * SIDE)
        record = {"id": f"Case_{i:05d}", "phantom": False, "spacing": [1.0, 1.0, 1.0], "shape": [depth, SIDE, SIDE],
                  "hu": [-1000.0, 1000.0], "content": "", "slices": depth, "height": SIDE, "width": SIDE,
                  "source": {"image": stamp(image) | {"checksum": ""}, "label": []}, "odd": [],
                  "format": FORMAT, "window": list(prepare.WINDOW), "size": SIDE, "file": str(image),
                  "checksums": {f"Case_{i:05d}.npy": ""}}
        (store / f"Case_{i:05d}.json").write_text(json.dumps(record))


def forget(files: list[Path]) -> bool:
    """Whether the page cache now holds none of these files (Linux); tmpfs, for one, does not let go of its pages."""
    os.sync()  # what is not yet written stays
    gone = True
    for path in files:
        with open(path, "rb", buffering=0) as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            try:  # reads only what is in memory
                os.preadv(f.fileno(), [bytearray(1)], path.stat().st_size // 2, os.RWF_NOWAIT)
                gone = False
            except BlockingIOError:
                pass
            except OSError:
                gone = False
    return gone


def read_at_once(store: datasets.Store, count: int, duration: float = 0.5) -> float:
    """Slices a second, in all, that `count` processes read from the store, each its own random ones."""
    context = multiprocessing.get_context("fork")
    ready, rates = context.Barrier(count, timeout=60), context.SimpleQueue()

    def read(seed: int) -> None:
        """One process's share; puts its slices/s into `rates`."""
        rng, slices = np.random.default_rng(seed), 0
        ready.wait()
        start = time.perf_counter()
        while (passed := time.perf_counter() - start) < duration:
            slices += len(store.batch(rng.integers(len(store), size=64)))
        rates.put(slices / passed)

    readers = [context.Process(target=read, args=(seed,)) for seed in range(count)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    if any(reader.exitcode for reader in readers):
        raise RuntimeError(f"of {count} processes that read {store.folder}, some failed")
    return sum(rates.get() for _ in readers)


START = """
import json, resource, sys, time
import numpy as np, torch, torchvision, nibabel
import datasets, train_ssl
from engine import processes
from pathlib import Path
def memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30
data, store, volumes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
start = time.perf_counter()
args = train_ssl.parse(["--init", "random"]); train_ssl.resolve_defaults(args, False)
opened = datasets.prepare(data, store, "pretrain", size=512)
batches = datasets.Batches(args, len(opened), processes.Processes(0, 1, torch.device("cpu")))
opened.batch(batches.indices(0))
seconds, first = time.perf_counter() - start, memory()
steps = int(sys.argv[4]) or batches.steps_per_epoch
for t, _ in datasets.prefetch(lambda t: opened.batch(batches.indices(t)), range(steps), 2):
    if t == 10: settled = memory()
print(json.dumps([seconds, first, settled, memory()]))
"""
