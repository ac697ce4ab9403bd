"""The bench: what is compared, on which device and with what; no figure is judged here."""

import ctypes
import io
import mmap
import os
import sys
import time

import narrow
import numpy as np
import pytest
import torch
import torchvision
from operations import Operations
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import datasets
import train_ssl
from engine import backbones, passes, processes, runs
from tools import against, bench, measure, peers, stores

pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available", "ignore:whitening")


@pytest.fixture
def small(monkeypatch) -> bench.Setting:
    """A setting whose steps take milliseconds, with slices of 64 pixels and a network of one block a stage."""
    narrow.register(monkeypatch)
    for module in (bench, stores):
        monkeypatch.setattr(module, "SIDE", 64)
    s = bench.Setting(True, peers=True)
    s.arch, s.size, s.batch, s.group, s.queue = "resnet_bottleneck", 32, 4, 2, 8
    s.repeats, s.steps, s.stored = 1, 1, 160
    return s


class Devices(TorchDispatchMode):
    """Notes where convolutions are computed: those of the networks and the blur of the views."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.seen += [x.device.type for x in args[:2]]
        return func(*args, **(kwargs or {}))


def to_fake(module: nn.Module, device: torch.device, memory_format=None) -> nn.Module:
    """`Module.to`, which cannot swap fake parameters in place."""
    for m in module.modules():
        for kind, wrap in ((m._parameters, nn.Parameter), (m._buffers, lambda x, _: x)):
            for name, x in kind.items():
                if x is not None:
                    kind[name] = wrap(torch.empty(x.shape, dtype=x.dtype, device=device), x.requires_grad)
    return module


@pytest.fixture
def on_gpu(small, monkeypatch, fakes_of_today):
    """on_gpu(rows, *args) -> the table's rows, and where they convolved, on a GPU of fake tensors.

    A tensor of another device within an operation raises. Backward is left out: autograd asks for a real GPU.
    """
    small.device, build = torch.device("cuda"), train_ssl.build
    small.ranks, small.amp = processes.Processes(0, 1, small.device), "bf16"

    def built(*args):
        with unset_fake_temporarily():
            return build(*args)

    monkeypatch.setattr(train_ssl, "build", built)
    monkeypatch.setattr(passes, "choose", lambda moco, batches, *_: batches.batch_size // moco.group)
    monkeypatch.setattr(backbones, "checksum", lambda module: "")
    monkeypatch.setattr(nn.Module, "to", to_fake)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    monkeypatch.setattr(runs, "gradient_norm", lambda parameters: torch.zeros((), device="cuda"))

    def run(rows, *args) -> tuple[list[dict], list[str]]:
        table = measure.Table(quiet=True)
        with FakeTensorMode(allow_non_fake_inputs=True), Devices() as devices:
            rows(table, small, *args)
        return table.rows, devices.seen

    return run


@pytest.mark.parametrize("rows", [bench.segmentation, bench.steps])
def test_networks_on_the_gpu(rows, on_gpu):
    found, seen = on_gpu(rows)
    assert all(row["figure"] > 0 for row in found) and set(seen) == {"cuda"}


def test_store_to_step_on_the_gpu(on_gpu, small, monkeypatch, tmp_path):
    given = []

    class Loader(list):
        num_workers = 1

    def loader(store, batch, steps, cuda):
        given.append((len(store), batch, steps, cuda))
        return Loader([[torch.zeros(batch, 3, 224, 224)] * 2] * steps)

    monkeypatch.setattr(peers, "pil_loader", loader)
    monkeypatch.setattr(datasets, "on_device", lambda batches, device: batches)  # streams ask for a real GPU
    monkeypatch.setattr(bench, "medians", lambda repeats, **work: measure.medians(1, **work))
    found, seen = on_gpu(bench.end_to_end, tmp_path, bench.END_TO_END[:2])  # compiling asks for a real GPU
    assert len(found) == 5 and all(row["figure"] > 0 for row in found) and set(seen) == {"cuda"}
    assert given == [(160, 4, 1, True)]
    assert "GB of noise" in found[0]["text"] and "both bf16" in found[-1]["text"]


def test_views_say_where_they_are_made(on_gpu, small):
    small.peers = False
    found, seen = on_gpu(bench.views)
    made = [row["what"] for row in found if row["figure"]]
    assert made == ["two views 512 -> 224, one thread of the CPU", "two views 512 -> 224, batched on the GPU"]
    assert set(seen) == {"cpu", "cuda"}


def test_lightly_gets_its_best(small, monkeypatch):
    given = []
    small.amp = "bf16"
    seconds = {"off, NCHW": 8.0, "off, channels_last": 6.0, "bf16, NCHW": 5.0, "bf16, channels_last": 3.0,
               "both off": 4.0, "both bf16": 2.0, "plain bf16": 1.5}
    monkeypatch.setattr(peers, "lightly_step", lambda *args: given.append(args))
    monkeypatch.setattr(bench, "medians", lambda repeats, **work: {name: seconds[name] for name in work})
    table = measure.Table(quiet=True)
    bench.lightly_step(table, small)
    assert {args[-3:] for args in given} == {(small.device, amp, layout) for amp in ("off", "bf16")
                                             for layout in ("NCHW", "channels_last")}
    assert [row["figure"] for row in table.rows] == [8 / 2, 6 / 4, 3 / 2, 3 / 1.5]
    assert [row["target"] for row in table.rows] == ["at least 3.3", "at least 1.2", "at least 1.0", "at least 1.1"]
    assert "theirs bf16, channels_last" in table.rows[2]["text"] and "theirs off, NCHW" in table.rows[0]["text"]
    seconds |= {"bf16, NCHW": 7.0, "bf16, channels_last": 9.0}  # bf16 may be slower
    bench.lightly_step(table, small)
    assert [row["figure"] for row in table.rows[4:]] == [8 / 2, 6 / 4, 6 / 2, 6 / 1.5]


def test_the_floor_is_a_whole_step(monkeypatch):
    """Of ResNet-18: 20 convolutions forward an encoder, 20 backward, all in channels_last; EMA, loss, SGD."""
    nets, get_model = [], torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, "get_model", lambda *a, **kw: nets.append(get_model(*a, **kw)) or nets[0])
    step = peers.plain_step("resnet18", 32, 4, 16, torch.device("cpu"), "bf16", False)
    with Operations() as operations:
        step()
    seen = operations.seen
    assert seen["convolution"] == 40 and seen["convolution_backward"] == 20 and seen["nll_loss_forward"] == 1
    assert seen["_foreach_lerp_"] == 1 and seen["add_"] >= len(list(nets[0].parameters()))
    assert nets[0].layer4[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_share_of_each_of_eight_processes(small, monkeypatch, tmp_path):
    prepared = []
    monkeypatch.setattr(datasets, "prepare", lambda data, *args, workers, **kw: prepared.append(
        (len(list(data.iterdir())), workers)))

    def medians(repeats, **work):
        for call in work.values():
            call()
        seconds = {"decode": 8.0, "one": 10.0, "two": 4.0, "half": 5.0, "eight": 10.0}
        return {name: seconds[name] for name in work}

    monkeypatch.setattr(bench, "medians", medians)
    for cores in (8, 7):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        (folder := tmp_path / f"{cores}").mkdir()
        bench.preparing(table := measure.Table(quiet=True), folder, small)
        assert [row["figure"] for row in table.rows] == [0.8, 2.0, 0.8 if cores == 8 else None, 2.0]
        # two seconds of decoding a volume: 32 of them take 64 s, or 8 s of each of eight processes that lose nothing
    assert prepared == [(4, 1), (4, 2), (2, 1), (32, 8), (4, 1), (4, 2), (2, 1)]


@pytest.fixture
def store(small, tmp_path) -> datasets.Store:
    stores.write_store(tmp_path / "data", tmp_path / "store" / "pretrain-64", 3, 100, noise=True)
    return datasets.prepare(tmp_path / "data", tmp_path / "store", "pretrain", size=64)


def test_noise_is_on_disk(store, tmp_path):
    slices = store.batch(np.arange(100))
    assert len(np.unique(slices.reshape(100, -1), axis=0)) == 100 and 120 < slices.mean() < 135
    assert all(f.stat().st_blocks * 512 >= f.stat().st_size for f in store.folder.glob("*.npy"))
    stores.write_store(tmp_path / "d", tmp_path / "s", 1, 100)
    assert (tmp_path / "s/Case_00001.npy").stat().st_blocks * 512 < 100 * 64 * 64


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only under Linux")
def test_forgotten_files_are_not_in_memory(store):
    def resident(path) -> int:
        """Pages of a file in the page cache, by mincore(2)."""
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
            start = ctypes.addressof(held := ctypes.c_char.from_buffer(mapped))
            assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), pages) == 0
            del held
            return sum(p & 1 for p in pages)

    files = sorted(store.folder.glob("*.npy"))
    os.sync()
    with open(files[0], "rb") as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(files[0]):
        assert not stores.forget(files)
        pytest.skip("this file system keeps its pages")
    store.batch(np.arange(100))
    assert all(resident(f) for f in files)
    assert stores.forget(files) and all(resident(f) < 0.5 * f.stat().st_size / mmap.PAGESIZE for f in files)


def test_reading_at_once(tmp_path):
    class Store:
        folder = tmp_path

        def __len__(self):
            return 10

        def batch(self, indices):
            assert indices.max() < 10
            (tmp_path / str(os.getpid())).touch()
            time.sleep(0.01)
            return indices

    rate = stores.read_at_once(Store(), 3, duration=0.2)
    assert len(list(tmp_path.iterdir())) == 3 and not (tmp_path / str(os.getpid())).exists()
    assert rate < 3 * 64 / 0.01  # no process can read faster
    Store.batch = lambda self, indices: 1 / 0
    with pytest.raises(RuntimeError, match="some failed"):
        stores.read_at_once(Store(), 2, duration=0.01)


def test_pil_loader(store, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    batches = list(peers.pil_loader(store, 3, 2, cuda=False))
    assert [[view.shape for view in pair] for pair in batches] == [[(3, 3, 224, 224)] * 2] * 2
    assert not torch.equal(*batches[0])


def test_against_itself(monkeypatch, tmp_path, capsys):
    """Two processes that step in turns and say what it took: here 3 s from the second step on, there 2 s."""
    monkeypatch.setattr(against, "SETTINGS", {"a step": "--arch resnet18"})
    monkeypatch.setattr(against, "SIDE", "import sys\nassert sys.argv[2:] == ['--arch', 'resnet18']\nfor n, _ in "
                        "enumerate(sys.stdin): print(3 - sys.argv[1].endswith('other') if n else 99, flush=True)")
    (tmp_path / "other").mkdir()
    against.main([str(tmp_path / "other"), "--pairs", "2"])
    assert capsys.readouterr().out.splitlines()[-1] == "| a step | 1.500 | 3.00 s | 2.00 s |"


def test_a_side_steps_when_it_is_told_to(monkeypatch, capsys):
    """The script of `against`, in this process."""
    tiny = "--arch resnet18 --image-size 32 --size 48 --batch-size 4 --bn-group 2 --queue 8"
    monkeypatch.setattr(sys, "argv", ["-c", str(against.HERE), *tiny.split()])
    monkeypatch.setattr(sys, "stdin", io.StringIO("step\nstep\n"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    exec(against.SIDE, {})
    assert all(float(line) > 0 for line in capsys.readouterr().out.split()) and torch.get_num_threads() == 1


def test_alternated():
    order, values = [], iter([90, 80, 1, 10, 3, 30, 2, 20])  # the first round warms up
    work = {name: lambda name=name: (order.append(name), next(values))[1] for name in "ab"}
    assert measure.alternated(3, **work) == {"a": 2, "b": 20} and "".join(order) == "abababab"


@pytest.mark.parametrize("figure, bound, target, text, met", [
    (1234.5, {"least": 1000, "unit": "pairs/s"}, "at least 1,000 pairs/s", "1,234 pairs/s", True),
    (0.9, {"least": 1.0}, "at least 1.0", "0.9", False), (1.08, {"most": 1.08}, "at most 1.08", "1.08", True),
    (1.081, {"most": 1.08}, "at most 1.08", "1.08", False), (2.0, {}, "", "2", None)])
def test_table(figure, bound, target, text, met, capsys):
    table = measure.Table(quiet=False)
    table.add("row", figure, **bound)
    table.skip("row", "why", **bound)
    assert table.rows == [
        {"what": "row", "target": target, "figure": figure, "text": text, "met": met},
        {"what": "row", "target": target, "figure": None, "text": "not measured: why", "met": None}]
    assert capsys.readouterr().out.splitlines()[1] == f"| row | {target} | not measured: why |  |"
