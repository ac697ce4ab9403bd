"""A step in passes: any number of groups at once is the same step, for one process or two, compiled or not."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import narrow
import numpy as np
import pytest
import torch
import torchvision
from operations import Operations

import augment
import datasets
import train_ssl
from engine import passes, processes
from moco import Encoder, MoCo
from views import resize
from whitening import whiten_last_norm

ROOT = Path(__file__).parent.parent
LOCAL_ZCA = "--local --zca --zca-group 4"
METHODS = {"moco": "", "local + zca": LOCAL_ZCA, "aligned": LOCAL_ZCA + " --geometric"}
SETTING = ("--data . --init random --image-size 64 --size 128 --batch-size 32 --bn-group 4 --queue 64 --epochs 4 "
           "--ema 0.9 --lr 0.01 ")
# Rounding of float64 grows a hundredfold in three steps of a network whose BN sees four images; of float32 it grows to
# what float32 itself is away from float64, which is why equality is not asked of it.
CLOSE = dict(rtol=1e-9, atol=1e-9)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    narrow.register(monkeypatch)


def three_steps(args) -> tuple[torch.Tensor, dict]:
    """(stats (3, 7), all weights, statistics and the queue) in float64."""
    trainer = narrow.trainer(args)
    stats = [trainer.step(t, narrow.slices(args, t)[trainer.batches.rank_slice]) for t in range(3)]
    return torch.stack(stats), trainer.moco.state_dict()


@pytest.mark.parametrize("arch, method", [*(("resnet_basic", m) for m in METHODS), ("resnet_bottleneck", "aligned")])
def test_any_number_of_groups_in_a_pass_is_the_same_step(monkeypatch, arch, method):
    narrow.double_views(monkeypatch)
    found = [three_steps(narrow.settings(SETTING + f"--arch {arch} {METHODS[method]} --groups-per-pass {groups}"))
             for groups in (1, 3, 8)]  # of 8: one by one, in passes of 3, 3 and 2, all at once
    for stats, state in found[1:]:
        torch.testing.assert_close(stats, found[0][0], **CLOSE)
        for name, value in state.items():
            torch.testing.assert_close(value, found[0][1][name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    assert found[0][1]["encoder_q.backbone.bn1.num_batches_tracked"] == 3


def test_two_processes_in_passes_equal_one(monkeypatch, tmp_path):
    """In float64: each process has four groups, in passes of 3 and 1; one process has eight, in passes of 3, 3 and 2.

    In float32, group by group and by the commands, stress.py compares them.
    """
    flags = SETTING + f"--arch resnet_basic {METHODS['aligned']} --groups-per-pass 3"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    two = subprocess.Popen([sys.executable, __file__, str(tmp_path / "state.pt"), flags], stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, env=os.environ | {
                               "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                               "MASTER_PORT": port})
    narrow.double_views(monkeypatch)
    stats, state = three_steps(narrow.settings(flags))
    told, _ = two.communicate(timeout=300)
    assert two.returncode == 0, told
    shared, other = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.testing.assert_close(shared[:, :6], stats[:, :6], **CLOSE)
    for name, value in state.items():
        torch.testing.assert_close(other[name], value, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


class Graphs(list):
    """A backend that compiles nothing and keeps what it was given; a call of `torch.compile` that uses it."""

    def __init__(self, monkeypatch):
        super().__init__()
        torch._dynamo.reset()
        real = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, **kw: real(f, backend=self.keep, fullgraph=True, **kw))

    def keep(self, graph, inputs):
        self.append(graph)
        return graph.forward


def test_a_compiled_pass_is_one_graph_and_the_same_step(monkeypatch):
    """One for keys, one for queries, in all passes and steps; fullgraph: what could not be traced would raise."""
    graphs = Graphs(monkeypatch)
    narrow.double_views(monkeypatch)
    flags = SETTING + f"--arch resnet_basic {METHODS['aligned']} --groups-per-pass 4"
    stats, state = three_steps(narrow.settings(flags + " --compile"))
    expected, others = three_steps(narrow.settings(flags))
    assert len(graphs) == 2 and min(len(g.graph.nodes) for g in graphs) > 50
    torch.testing.assert_close(stats, expected, **CLOSE)
    for name, value in state.items():
        torch.testing.assert_close(value, others[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def test_a_compiled_run_says_how_long_it_took_and_goes_on_uncompiled(monkeypatch, tmp_path, capsys):
    graphs = Graphs(monkeypatch)
    flags = [*narrow.ct_flags(tmp_path), "--out", str(tmp_path)]
    train_ssl.main([*flags, "--steps", "3", "--compile"])
    captured = capsys.readouterr()
    assert "compiled; the first step took" in captured.out + captured.err and len(graphs) == 2
    train_ssl.main([*flags, "--steps", "4"])  # of a CPU's default
    assert "compiled;" not in capsys.readouterr().out and len(graphs) == 2


# ------------------------------------------------------------------------------------------- what a step is made of

@pytest.mark.filterwarnings("ignore:whitening")
@pytest.mark.parametrize("flags, most", [("--local --zca", 2600), ("--local --zca --geometric", 2750)])
def test_a_step_is_few_operations(monkeypatch, flags, most):
    """ResNet-50, 8 groups, bf16, as on a GPU, where each is a launch. Group by group: 10,200 and 11,200."""
    monkeypatch.setattr(augment, "crops_one_by_one", augment.crops_by_products)
    sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, **kw: sgd(*args, **kw | {"fused": True}))
    args = narrow.settings("--data . --init random --arch resnet50 --image-size 32 --size 64 --batch-size 16 "
                           f"--bn-group 2 --queue 64 --groups-per-pass 8 {flags}")
    batches = narrow.batches(args)
    trainer = train_ssl.Trainer(args, train_ssl.build(args), batches, narrow.ALONE, "bf16")
    trainer.step(0, narrow.slices(args, 0))
    with Operations() as counted:
        trainer.step(1, narrow.slices(args, 1))
    assert counted.seen["convolution"] >= 2 * 53  # it was a step
    assert counted.seen.total() <= most, counted.seen.most_common(20)


@pytest.mark.parametrize("arch, side, whitened", [("resnet50", 64, False), ("resnet18", 64, False),
                                                  ("resnet50", 64, True)])
@pytest.mark.filterwarnings("ignore:whitening")
def test_kept_bytes_are_what_autograd_keeps(arch, side, whitened):
    """By arithmetic, against the storages that a forward saves: to 15 %, of which the choice leaves 25 % of room."""
    net = torchvision.models.get_model(arch, weights=None)
    encoder = Encoder(whiten_last_norm(net) if whitened else net, 128)
    images = 32 if whitened else 4  # its matrices are kept once for a group
    weights, kept = {p.untyped_storage().data_ptr() for p in encoder.parameters()}, {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = encoder(torch.rand(images, 1, side, side))
    measured = sum(size for place, size in kept.items() if place not in weights) / images
    assert passes.kept_bytes(encoder, side, "off") == pytest.approx(measured, rel=0.15) and out
    assert passes.kept_bytes(encoder, side, "bf16") == passes.kept_bytes(encoder, side, "off") / 2


def test_the_papers_batch_fits():
    """24 GB take it in one pass, 8 GB in several; measured on one H200: 44 MB kept of an image, 12.7 GiB in all."""
    batches = narrow.batches(narrow.settings("--data . --init random --arch resnet50"))
    moco = MoCo(whiten_last_norm(torchvision.models.resnet50(weights=None)))
    assert passes.kept_bytes(moco.encoder_q, 224, "bf16") == pytest.approx(44e6, rel=0.02)
    assert passes.groups_that_fit(moco, batches, "bf16", int(23.5e9)) >= 8
    assert 2 <= passes.groups_that_fit(moco, batches, "bf16", int(7.6e9)) < 8
    assert passes.groups_that_fit(moco, batches, "off", int(23.5e9)) in range(4, 8)
    assert passes.groups_that_fit(moco, batches, "bf16", 0) == 1


# ------------------------------------------------------------------------------------------- how many are chosen


@pytest.mark.parametrize("room, chosen, tried", [(8, 8, [8]), (4, 4, [8, 4]), (3, 2, [8, 4, 2]), (1, 1, [8, 4, 2])])
def test_a_gpu_that_runs_out_of_memory_gets_half(monkeypatch, capsys, room, chosen, tried):
    args = narrow.settings(SETTING + "--arch resnet_basic")
    asked = []

    def attempt(moco, batches, amp, device, groups):
        asked.append(groups)
        if groups > room:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(passes, "attempt", attempt)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80e9, 80e9))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    ranks = processes.Processes(0, 1, torch.device("cuda"))
    assert passes.choose(train_ssl.build(args), narrow.batches(args), "bf16", ranks) == chosen and asked == tried
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in told] == [str(n) for n in tried if n > room]


def test_passes_are_evened_out():
    assert [passes.even(8, most) for most in range(1, 10)] == [1, 2, 3, 4, 4, 4, 4, 8, 8]


@pytest.mark.parametrize("method", METHODS)
def test_an_attempt_leaves_nothing_behind(method):
    args = narrow.settings(SETTING + "--arch resnet_basic " + METHODS[method])
    moco = train_ssl.build(args)
    before = {name: value.clone() for name, value in moco.state_dict().items()}
    assert passes.fits(moco, narrow.batches(args), "off", torch.device("cpu"), 8)
    assert all(torch.equal(value, before[name]) for name, value in moco.state_dict().items())
    assert all(p.grad is None for p in moco.parameters())


def test_small_images_run_together_on_a_cpu_and_large_ones_do_not():
    for side, groups in ((64, 8), (96, 8), (128, 1), (224, 1)):
        batches = narrow.batches(narrow.settings(f"--data . --init random --image-size {side}"))
        assert passes.choose(SimpleNamespace(group=32), batches, "off", narrow.ALONE) == groups


def test_a_run_goes_on_with_its_groups_and_says_where_they_are_others(tmp_path, capsys):
    flags = [*narrow.ct_flags(tmp_path), "--out", str(tmp_path)]
    told = []
    for more in ("--steps 1 --groups-per-pass 1", "--steps 2", "--steps 3 --groups-per-pass 2", "--steps 4"):
        train_ssl.main([*flags, *more.split()])
        captured = capsys.readouterr()
        saved = torch.load(tmp_path / "moco-local-zca-aligned" / "checkpoint.pt", weights_only=True)
        told.append((saved["groups_per_pass"], "in one pass and" in captured.err))
        assert f"{saved['groups_per_pass']} in one pass" in captured.out
    assert told == [(1, False), (1, False), (2, True), (2, False)]


def test_what_is_worth_compiling(monkeypatch, capsys):
    """And whether this machine can: a cluster's node without a C compiler trains uncompiled, and says so."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    monkeypatch.setattr(torch, "compile", lambda f: f)
    assert passes.worth_compiling(5000, gpu, False) and not passes.worth_compiling(4999, gpu, False)
    assert not passes.worth_compiling(168_000, cpu, False) and not passes.worth_compiling(168_000, gpu, True)
    assert not capsys.readouterr().err

    def fails(f):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(torch, "compile", fails)
    assert not passes.worth_compiling(168_000, gpu, False)
    assert capsys.readouterr().err == ("note: not compiled, since torch.compile fails here (Failed to find C "
                                       "compiler.)\n")


@pytest.mark.gpu
def test_batches_come_to_a_gpu_in_order_and_whole():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device, rng = torch.device("cuda"), np.random.default_rng(0)
    made = [torch.from_numpy(rng.integers(0, 256, (64, 512, 512), np.uint8)) for _ in range(5)]
    steps = [(t, resize.pinned(x, device)) for t, x in enumerate(made)]
    for t, batch in datasets.on_device(iter(steps), device):
        assert batch.device.type == "cuda" and torch.equal(batch.cpu(), made[t])


def shared_steps(path: str, flags: str) -> None:
    """`three_steps` of two processes; the second is a fork of the first, which has computed nothing yet."""
    second = os.fork()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(int(second == 0))
    patch = pytest.MonkeyPatch()
    narrow.register(patch)
    narrow.double_views(patch)
    narrow.ALONE = processes.start()
    stats, state = three_steps(narrow.settings(flags))
    stats = processes.mean_over_processes(stats, narrow.ALONE)
    if narrow.ALONE.is_main:
        torch.save((stats, state), path)
    torch.distributed.destroy_process_group()
    if second:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]))


if __name__ == "__main__":
    shared_steps(*sys.argv[1:])
