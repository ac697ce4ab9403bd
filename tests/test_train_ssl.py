"""train_ssl.py through its own command: files, exact continuing, independence of the number of processes."""

import argparse
import functools
import json
import math
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision

import augment
import datasets
import train_ssl
from ct import intake
from engine import backbones, monitor, origin, pace, processes, recipes, runs, seeds
from views import resize
from whitening import ZCAWhitening

ROOT = Path(__file__).parent.parent


@pytest.fixture
def flags(small_phantom, arch):
    """Flags for a pre-training of seconds; all tests share one store."""
    store = small_phantom.parent / "store"

    def make(out, *more):
        return [str(a) for a in ("--data", small_phantom / "AbdomenCT-1K", "--store", store, "--out", out, "--amp",
                                 "off", "--init", "random", "--image-size", 64, "--batch-size", 8, "--bn-group", 4,
                                 "--queue", 32, "--zca-group", 16, *arch, *more)]

    return make


def outcome(folder):
    records = runs.read_log(folder / "log.jsonl")
    for r in records:
        for key in pace.TIMES:
            assert r.pop(key) >= 0
    return records, torch.load(folder / "checkpoint.pt", weights_only=True), torch.load(folder / "backbone.pth",
                                                                                         weights_only=True)


def flat(value, name=""):
    if isinstance(value, dict):
        for k, v in value.items():
            yield from flat(v, f"{name}.{k}")
    elif isinstance(value, list | tuple):
        for i, v in enumerate(value):
            yield from flat(v, f"{name}.{i}")
    else:
        yield name, value


def test_a_line_has_the_rate_its_share_of_the_peak_and_the_time_left(flags, tmp_path, by_clock, capsys):
    """By a clock that goes 100 s a step, on a device of 12 M operations a second."""
    by_clock(train_ssl.Trainer, 100, 12e6, 30e6)  # operations of each of the two encoders
    train_ssl.main(flags(tmp_path, "--steps", 3))  # two are an epoch
    told = runs.read_log(tmp_path / "phantom-moco/log.jsonl")
    assert [(r["images_per_s"], r["mfu"], r["seconds_left"]) for r in told] == [
        (0.08, 0.4, 100), (0.08, 0.4, 100), (0.08, 0.4, 0)]
    out = capsys.readouterr().out
    assert "\nabout 2 min to go\n" in out
    lines = re.findall(r"^step \d/3: loss .*, 0\.1 images/s \(40 % of the device's peak\), .*$", out, re.M)
    assert len(lines) == 2 and lines[0].endswith(", about 2 min to go") and "to go" not in lines[1]


@pytest.mark.pictures
def test_a_run_leaves_its_files_and_a_torchvision_backbone(flags, tmp_path, small_phantom, capsys):
    train_ssl.main(flags(tmp_path, "--local", "--zca", "--steps", 2))
    printed = capsys.readouterr().out
    assert f"THE PHANTOM: the volumes in {small_phantom / 'AbdomenCT-1K'} are generated" in printed
    assert f"slices are kept in {small_phantom.parent / 'store'}" in printed and "no real CT" not in printed
    assert "1 process, precision off" in printed and "MB on disk" in printed and "(s)" not in printed
    folder = tmp_path / "phantom-moco-local-zca"
    left = {p.name for p in folder.iterdir()}
    assert {"config.json", "log.jsonl", "checkpoint.pt", "backbone.pth", "curves.png"} <= left
    assert json.loads((folder / "config.json").read_text())["data"] == "phantom"
    records, checkpoint, backbone = outcome(folder)
    assert [r["step"] for r in records] == [1, 2]
    for r in records:
        assert math.isclose(r["loss"], r["loss_global"] + r["loss_local"], rel_tol=1e-5)
        assert 0 < r["loss_local"] < 2 * math.log(20) and 0 <= r["queue_accuracy"] <= 1
    missing, unexpected = torchvision.models.resnet18().load_state_dict(backbone, strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
    assert checkpoint["model"]["queue_ptr"] == 16 and checkpoint["step"] == 2


def without_looks(records):
    """A run that stops within an epoch is looked at there: another look, of nothing else that differs."""
    return [{k: v for k, v in r.items() if k in ("step", "loss", "loss_global", "loss_local", "queue_accuracy",
                                                 "grad_norm", "lr")} for r in records]


@pytest.mark.narrow
def test_stopped_and_continued_is_never_stopped(flags, tmp_path, capsys):
    name, common = "phantom-moco-local-zca-aligned", ["--local", "--zca", "--geometric"]
    for more in (["--steps", 2], ["--steps", 3], ["--steps", 4]):
        train_ssl.main(flags(tmp_path / "a", *common, *more))
    train_ssl.main(flags(tmp_path / "b", *common, "--steps", 4))
    a, b = (outcome(tmp_path / x / name) for x in "ab")
    assert without_looks(a[0]) == without_looks(b[0]) and len(a[0]) == 4 and a[0][-1] == b[0][-1]
    for x, y in ((a[1], b[1]), (a[2], b[2])):
        for (name, v), (_, w) in zip(flat(x), flat(y), strict=True):
            assert torch.equal(v, w) if isinstance(v, torch.Tensor) else v == w, name
    capsys.readouterr()
    train_ssl.main(flags(tmp_path / "b", *common, "--steps", 4))
    assert "finished before: --steps 4 was reached; 4 of 20 total steps are done" in capsys.readouterr().out


def test_step_t_is_a_function_of_seed_and_t(flags, tmp_path):
    args = train_ssl.parse(flags(tmp_path, "--local"))
    train_ssl.resolve_defaults(args, True)
    whole = datasets.Batches(args, 37, processes.Processes(0, 1, torch.device("cpu")))
    halves = [datasets.Batches(args, 37, processes.Processes(r, 2, torch.device("cpu"))) for r in (0, 1)]
    assert whole.steps_per_epoch == 4
    epoch = np.concatenate([whole.indices(t) for t in range(4)])
    assert len(whole.held_out) == 4 and not set(epoch) & set(whole.held_out)
    assert len(set(epoch)) == 32 and not np.array_equal(np.sort(epoch), epoch)  # without replacement, shuffled
    for t in (9, 2):  # any order of asking
        np.testing.assert_array_equal(np.concatenate([h.indices(t)[h.rank_slice] for h in halves]), whole.indices(t))
        patches = whole.patch_idx(t)
        assert torch.equal(torch.cat([h.patch_idx(t) for h in halves]), patches)
        assert patches.shape == (8, 20) and all(len(set(p)) == 20 and max(p) < 49 for p in patches.tolist())
        views = whole.views(t, seeds.VIEW_Q)
        for key in views:
            parts = [h.views(t, seeds.VIEW_Q)[key] for h in halves]
            np.testing.assert_array_equal(np.concatenate(parts), views[key])
        assert not np.array_equal(views["contrast"], whole.views(t, seeds.VIEW_K)["contrast"])
        assert sorted(whole.permutation(t).tolist()) == list(range(8))


def test_each_nth_slice_of_every_volume_is_trained_on_or_held_out(flags, tmp_path):
    """Of volumes of 9, 3 and 4 slices; a volume shorter than N keeps its first."""
    store = SimpleNamespace(volumes=[{"id": "c", "slices": 9}, {"id": "a", "slices": 3}, {"id": "b", "slices": 4}],
                            ends=np.cumsum([9, 3, 4]), data="x")
    of = functools.partial(datasets.Store.of, store)
    assert of(every=4).tolist() == [0, 4, 8] + [9] + [12]
    assert of(every=2).tolist() == [0, 2, 4, 6, 8] + [9, 11] + [12, 14]
    assert of(every=100).tolist() == [0, 9, 12] and of().tolist() == list(range(16))
    assert of(["c", "b"], 3).tolist() == [0, 3, 6] + [12, 15]
    args, ranks = train_ssl.parse(flags(tmp_path)), processes.Processes(0, 1, torch.device("cpu"))
    train_ssl.resolve_defaults(args, True)
    numbers = np.arange(0, 400, 4)
    batches, again = (datasets.Batches(args, x, ranks) for x in (numbers, numbers.copy()))
    assert sorted([*batches.held_out, *batches.trained]) == numbers.tolist() and len(batches.held_out) == 12
    assert batches.steps_per_epoch == 11 and set(np.concatenate([batches.indices(t) for t in range(11)])) <= set(
        batches.trained.tolist())
    assert all(np.array_equal(batches.indices(t), again.indices(t)) for t in (25, 3))
    # all of them are what their number is
    one, other = (datasets.Batches(args, x, ranks) for x in (37, np.arange(37)))
    assert np.array_equal(one.held_out, other.held_out) and np.array_equal(one.trained, other.trained)


@pytest.mark.narrow
def test_a_thinned_run_says_so_and_is_another_than_the_whole(flags, tmp_path, refusal, capsys):
    train_ssl.main(flags(tmp_path, "--every", 2, "--steps", 1))
    assert "on 12 (one in 2) of 24 slices of 6 volumes" in capsys.readouterr().out
    folder = tmp_path / "phantom-moco-every2"
    config = json.loads((folder / "config.json").read_text())
    assert config["every"] == 2 and config["slices"] == 24
    named = ("--name", folder.name, "--steps", 1)
    assert "every: 2 there, 1 here" in refusal(train_ssl.main, flags(tmp_path, *named))
    assert "every: 2 there, 4 here" in refusal(train_ssl.main, flags(tmp_path, *named, "--every", 4, "--batch-size", 4,
                                                                    "--bn-group", 2))
    assert "lower --batch-size or --every" in refusal(train_ssl.main, flags(tmp_path, "--every", 4))
    # runs of before the flag had every slice
    del config["every"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "every: 1 there, 2 here" in refusal(train_ssl.main, flags(tmp_path, *named, "--every", 2))


def test_schedule_is_torchs_cosine(flags, tmp_path):
    args = train_ssl.parse(flags(tmp_path, "--epochs", 2))
    train_ssl.resolve_defaults(args, True)
    ranks = processes.Processes(0, 1, torch.device("cpu"))
    batches = datasets.Batches(args, 46, ranks)  # 41 to train on
    trainer = train_ssl.Trainer(args, train_ssl.build(args), batches, ranks, "off")
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], args.lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(reference, 10)
    for t in range(10):
        assert trainer.lr(t) == pytest.approx(cosine.get_last_lr()[0])
        reference.step()
        cosine.step()


def test_names_and_defaults_are_the_papers(tmp_path):
    expected = {(): "moco", ("--local",): "moco-local", ("--zca",): "moco-zca", ("--local", "--zca"): "moco-local-zca",
                ("--no-geometric",): "moco-nogeo", ("--zca", "--no-geometric"): "moco-zca-nogeo",
                ("--local", "--geometric"): "moco-local-aligned", ("--seed", "3"): "moco-seed3",
                ("--local", "--zca", "--geometric"): "moco-local-zca-aligned", ("--every", "4"): "moco-every4",
                ("--zca", "--every", "2", "--seed", "3"): "moco-zca-every2-seed3"}
    geometric = {(), ("--zca",), ("--seed", "3"), ("--every", "4"), ("--zca", "--every", "2", "--seed", "3"),
                 ("--local", "--geometric"), ("--local", "--zca", "--geometric")}
    for more, name in expected.items():
        for phantom in (False, True):
            args = train_ssl.parse(list(more))
            train_ssl.resolve_defaults(args, phantom)
            assert args.name == "phantom-" * phantom + name and args.geometric == (more in geometric)
            seed = "-seed3" * ("--seed" in more)
            assert args.init == (f"phantom-start{seed}" if phantom else "imagenet")
    args = train_ssl.parse(["--local", "--zca"])
    train_ssl.resolve_defaults(args, False)
    assert (args.arch, args.init, args.batch_size, args.bn_group, args.queue, args.epochs, args.lr, args.ema,
            args.temperature, args.patches) == ("resnet50", "imagenet", 256, 32, 65536, 200, 0.03, 0.999, 0.2, 20)


def resolved(*flags, phantom=False):
    args = train_ssl.parse(list(flags))
    train_ssl.resolve_defaults(args, phantom)
    return args


def test_the_first_authors_settings_fill_what_no_flag_gives():
    """Those of configs/selfsup of its code; on the phantom the sizes of its preset."""
    own = dict(recipe="author", window=(-1024, 3071), weight_decay=1e-6, geometric=True, local=False)
    sizes = dict(image_size=336, lr=0.03, epochs=300, queue=65536, ema=0.999, temperature=0.2, arch="resnet50")
    preset = dict(image_size=64, lr=0.01, epochs=10, queue=256, ema=0.99, arch="resnet18", size=192)
    for phantom, more in ((False, sizes), (True, preset)):
        for flags, name, batch, groups in (((), "author-moco", 64 if phantom else 128, 2),
                                           (("--zca",), "author-zca", 64, 1)):
            args = resolved("--recipe", "author", *flags, phantom=phantom)
            assert args.name == "phantom-" * phantom + name and own | more == {k: vars(args)[k] for k in own | more}
            assert (args.batch_size, args.batch_size // args.bn_group) == (batch, groups)
    given = resolved("--recipe", "author", "--window", "0", "255", "--weight-decay", "0", "--lr", "0.1", "--batch-size",
                     "32", "--zca-group", "64", "--seed", "2")
    assert (list(given.window), given.weight_decay, given.lr, given.zca_group) == ([0, 255], 0, 0.1, 64)
    assert (given.batch_size, given.bn_group, given.name) == (32, 16, "author-moco-seed2")
    assert resolved("--recipe", "author", "--bn-group", "32").bn_group == 32
    for flags, name in ((("--local", "--zca"), "author-local-zca-aligned"), (("--no-geometric",), "author-nogeo")):
        assert resolved("--recipe", "author", *flags).name == name
    plain = resolved()
    assert (plain.recipe, plain.weight_decay, plain.window) == ("paper", 1e-4, (-175, 250))


def test_the_first_authors_schedule_is_linear_lr_from_a_third(flags, tmp_path):
    """torch's LinearLR, of which mmengine's is a copy, begun at epoch 5 and to end at 500, of 300."""
    args = train_ssl.parse(flags(tmp_path, "--recipe", "author", "--epochs", 300, "--lr", 0.03))
    train_ssl.resolve_defaults(args, True)
    ranks = processes.Processes(0, 1, torch.device("cpu"))
    trainer = train_ssl.Trainer(args, train_ssl.build(args), datasets.Batches(args, 46, ranks), ranks, "off")
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 1e-6
    epoch = trainer.horizon // 300
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.03)
    assert {trainer.lr(t) for t in range(5 * epoch)} == {0.03}
    linear = torch.optim.lr_scheduler.LinearLR(reference, 1 / 3, 1, 495 * epoch - 1)
    for t in range(5 * epoch, 300 * epoch):
        assert trainer.lr(t) == pytest.approx(linear.get_last_lr()[0], rel=1e-9)
        reference.step()
        linear.step()
    assert trainer.lr(5 * epoch) == pytest.approx(0.01) and 0.021 < trainer.lr(300 * epoch - 1) < 0.022


def test_a_run_with_the_first_authors_settings(flags, tmp_path, capsys):
    """One group, all channels whitened as one with a fresh affine; its window's own slices; a line that says so."""
    argv = [a for a in flags(tmp_path, "--recipe", "author", "--zca", "--steps", 2) if a not in ("--bn-group", "4")]
    at = argv.index("--zca-group")
    argv[at + 1] = "0"
    with pytest.warns(UserWarning, match="one group only"):
        train_ssl.main(argv)
    out = capsys.readouterr().out
    assert "HU are 16.1 HU a level" in out and "--geometric keeps both" not in out
    config = json.loads((tmp_path / "phantom-author-zca/config.json").read_text())
    assert (config["recipe"], config["zca_group"], config["window"]) == ("author", 512, [-1024, 3071])
    assert config["weight_decay"] == 1e-6 and config["bn_group"] == 8
    # of a backbone whose last BN has an affine
    args = train_ssl.parse(argv)
    train_ssl.resolve_defaults(args, True)
    args.init = str(tmp_path / "phantom-author-zca/backbone.pth")
    weights = torch.load(args.init, weights_only=True)
    weights["layer4.1.bn2.weight"] += 0.5
    torch.save(weights, args.init)
    for recipe, expected in (("author", torch.ones(512)), ("paper", weights["layer4.1.bn2.weight"])):
        args.recipe = recipe
        zca = train_ssl.build(args, True).encoder_q.backbone.layer4[1].bn2
        assert isinstance(zca, ZCAWhitening) and zca.running_whitening.shape == (1, 512, 512)
        assert torch.equal(zca.weight, expected)


@pytest.mark.narrow
def test_a_run_of_before_the_recipes_goes_on(flags, tmp_path, refusal):
    """Its config names neither recipe, weight decay nor normalisation."""
    train_ssl.main(flags(tmp_path, "--steps", 1))
    path = tmp_path / "phantom-moco/config.json"
    config = json.loads(path.read_text())
    assert config.pop("recipe") == "paper" and config.pop("weight_decay") == 1e-4
    assert config.pop("normalisation") == origin.NORMALISATION
    path.write_text(json.dumps(config))
    assert "weight_decay: 0.0001 there, 0.001 here" in refusal(
        train_ssl.main, flags(tmp_path, "--steps", 2, "--weight-decay", 1e-3))
    train_ssl.main(flags(tmp_path, "--steps", 2))
    assert len(runs.read_log(tmp_path / "phantom-moco/log.jsonl")) == 2


def test_a_local_run_without_geometry_is_told_what_was_measured():
    for flags, told in ((("--local",), True), (("--local", "--zca"), True), (("--local", "--geometric"), False),
                        ((), False), (("--no-geometric",), False)):
        lines = recipes.remarks(resolved(*flags))
        assert len(lines) == told and all("--geometric" in x and "docs/measurements.md" in x for x in lines), flags


def test_bad_flags_end_in_one_line(flags, tmp_path, refusal):
    def line(*more):
        return refusal(train_ssl.main, flags(tmp_path, *more))

    assert "multiple of 1 process x --bn-group 3" in line("--bn-group", 3)
    assert "--queue 36" in line("--queue", 36)
    assert "--patches 50" in line("--local", "--patches", 50)
    assert "fewer than one batch" in line("--batch-size", 4096, "--queue", 4096)
    assert "--arch resnet19" in line("--arch", "resnet19")
    assert "nothing.pth: no such run in" in line("--init", tmp_path / "nothing.pth")
    assert "divide the 512 channels" in line("--zca", "--zca-group", 48)
    assert "no such folder" in line("--data", tmp_path / "nowhere")
    assert "unrecognized arguments: --lokal" in line("--lokal")
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "r34.pth")
    assert "r34.pth: not a backbone of architecture resnet18" in line("--init", tmp_path / "r34.pth")


@pytest.mark.narrow
def test_another_config_is_refused_with_the_difference(flags, tmp_path, refusal):
    train_ssl.main(flags(tmp_path, "--steps", 1))
    assert "lr: 0.01 there, 0.02 here" in refusal(train_ssl.main, flags(tmp_path, "--steps", 1, "--lr", 0.02))


@pytest.mark.narrow
def test_other_patients_under_the_same_names_are_another_run(flags, small_phantom, tmp_path, refusal, monkeypatch):
    """Dataset001/imagesTr and Dataset002/imagesTr, of as many slices: two stores, and no run goes on with the other's.

    One given as `.` has its name all the same.
    """
    def train(data, steps):
        argv = flags(tmp_path, "--steps", steps)
        at = argv.index("--store")
        return [*argv[:at], *argv[at + 2 :], "--data", str(data)]

    cases = sorted((small_phantom / "AbdomenCT-1K").iterdir())
    for name, order in (("Dataset001", cases), ("Dataset002", cases[::-1])):
        (tmp_path / name / "imagesTr").mkdir(parents=True)
        for case, other in zip(cases, order, strict=True):
            shutil.copy(other, tmp_path / name / "imagesTr" / case.name)
    monkeypatch.chdir(tmp_path / "Dataset001/imagesTr")
    train_ssl.main(train(".", 1))
    assert [p.name[:9] for p in Path("stores").iterdir()] == ["imagesTr-"]
    line = refusal(train_ssl.main, train(tmp_path / "Dataset002/imagesTr", 2))
    assert "store.Case_00001: " in line and "--overwrite" in line and len(list(Path("stores").iterdir())) == 2
    train_ssl.main(train(tmp_path / "Dataset001/imagesTr", 2))
    config = json.loads((tmp_path / "phantom-moco/config.json").read_text())
    assert len(config["store"]) == len(cases) == config["volumes"]
    assert len(runs.read_log(tmp_path / "phantom-moco/log.jsonl")) == 2


def test_bad_volumes_stop_the_run_before_it_starts(tmp_path, flags, refusal):
    data = tmp_path / "data"
    data.mkdir()
    (data / "scan.nii.gz").write_text("no volume at all")
    line = refusal(train_ssl.main, [*flags(tmp_path / "out"), "--data", data, "--store", tmp_path / "store"])
    assert "scan.nii.gz: not a NIfTI file" in line and not (tmp_path / "out").exists()


@pytest.mark.narrow
def test_one_group_warns_and_a_long_queue_is_noted(flags, tmp_path, capsys):
    with pytest.warns(UserWarning, match="one group only") as told:
        train_ssl.main(flags(tmp_path, "--bn-group", 8, "--steps", 1, "--queue", 80, "--zca", "--zca-group", 32))
    assert "the queue of 80 keys holds" in capsys.readouterr().err
    # in a terminal a line each, without a place in someone's code
    lines = [warnings.formatwarning(w.message, w.category, w.filename, w.lineno) for w in told
             if w.category is UserWarning]
    assert {tuple(line.split(":")[:2]) for line in lines} == {
        ("warning", " one group only, a single micro-batch"), ("warning", " whitening 32 channels over 32 positions")}
    assert all(line.count("\n") == 1 for line in lines)
    assert "elsewhere.py:7: " in warnings.formatwarning("x", UserWarning, "/usr/lib/elsewhere.py", 7)


def test_signs_of_collapse_are_those_of_the_held_out_slices(flags, tmp_path, small_phantom):
    """Effective ranks against an eigendecomposition of what the encoder gives in evaluation mode; what warns."""
    args = train_ssl.parse(flags(tmp_path))
    train_ssl.resolve_defaults(args, True)
    store = datasets.prepare(small_phantom / "AbdomenCT-1K", args.store, "pretrain", size=args.size)
    ranks = processes.Processes(0, 1, torch.device("cpu"))
    trainer = train_ssl.Trainer(args, train_ssl.build(args), datasets.Batches(args, len(store), ranks), ranks,
                                "off")
    before = {k: v.clone() for k, v in trainer.moco.state_dict().items()}
    collapse = monitor.CollapseMonitor(trainer, store)
    told = collapse.look(2)
    assert trainer.moco.encoder_q.training
    assert all(torch.equal(v, before[k]) for k, v in trainer.moco.state_dict().items())
    images = torch.nn.functional.interpolate(
        torch.stack([torch.from_numpy(store.slice(int(i))) for i in trainer.batches.held_out])[:, None].float(),
        (64, 64), mode="bilinear", antialias=True).expand(-1, 3, -1, -1) / 255
    images = (images - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        features = trainer.moco.encoder_q.backbone.eval()(images)
        embeddings = trainer.moco.encoder_q.projector(features)
        drawn = [augment.draw(seeds.rng(0, seeds.LOOKS, i), len(images)) for i in (1, 2)]
        slices = torch.from_numpy(store.batch(trainer.batches.held_out))
        queries, keys = (encoder.eval()(augment.apply(slices, d, 64))[1] for encoder, d in
                         zip((trainer.moco.encoder_q, trainer.moco.encoder_k), drawn, strict=True))
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], keys[None], dim=2)
    other = [cosines[i, j].item() for i in range(len(images)) for j in range(len(images)) if i != j]
    assert told["held_out_positive"] == pytest.approx(cosines.diagonal().mean().item(), abs=1e-5)
    assert told["held_out_negative"] == pytest.approx(sum(other) / len(other), abs=1e-5)
    embeddings = embeddings / embeddings.norm(dim=1, keepdim=True)
    for key, x in (("effective_rank", features), ("effective_rank_embedding", embeddings)):
        values = torch.linalg.eigvalsh(torch.cov(x.double().T)).clamp(min=0)
        share = values[values > 1e-12 * values.max()] / values.sum()
        assert told[key] == pytest.approx(torch.exp(-(share * share.log()).sum()).item(), rel=1e-3)
    assert told["queue_filled"] == 0.5
    assert told["held_out_gap"] == pytest.approx(told["held_out_positive"] - told["held_out_negative"], abs=1e-6)
    first = sum(cosines[i, i] >= cosines[i].max() for i in range(len(images)))
    assert told["instance_accuracy"] == pytest.approx(first.item() / len(images))
    assert told["instance_chance"] == pytest.approx(1 / len(images)) and trainer.gap == told["held_out_gap"]


def test_warnings_look_at_gap_and_rank_together_once_the_queue_was_full_for_an_epoch(flags, tmp_path, small_phantom):
    args = train_ssl.parse(flags(tmp_path))
    train_ssl.resolve_defaults(args, True)
    store = datasets.prepare(small_phantom / "AbdomenCT-1K", args.store, "pretrain", size=args.size)
    ranks = processes.Processes(0, 1, torch.device("cpu"))
    trainer = train_ssl.Trainer(args, train_ssl.build(args), datasets.Batches(args, len(store), ranks), ranks,
                                "off")
    collapse = monitor.CollapseMonitor(trainer, store)
    healthy = {"held_out_gap": 0.3, "effective_rank": 100.0, "instance_accuracy": 0.5, "instance_chance": 0.1}
    full = trainer.batches.steps_per_epoch + args.queue // args.batch_size
    assert full < 50 and collapse.warning(healthy | {"held_out_gap": 0.0}, 49) == ""  # healthy runs look so, too
    assert collapse.warning(healthy, 50) == ""
    apart = collapse.warning(healthy | {"held_out_gap": 0.01}, 50)
    assert "does not tell slices apart" in apart and "effective rank means nothing" in apart
    assert all(flag in apart for flag in ("--init", "--queue", "--lr")) and "--arch" not in apart
    args.arch = "resnet50"
    assert "--arch resnet18" in collapse.warning(healthy | {"held_out_gap": 0.01}, 50)
    assert "dimensional collapse" in collapse.warning(healthy | {"effective_rank": 0.05}, full)
    assert "dimensional collapse" not in collapse.warning(healthy | {"effective_rank": 0.05, "held_out_gap": 0.0}, full)
    args.init, args.queue, args.zca = "imagenet", args.batch_size, True  # what cannot help is not advised
    apart = collapse.warning(healthy | {"held_out_gap": 0.01}, 50)
    assert "Try a lower --lr" in apart and not any(flag in apart for flag in ("--init", "--queue", "--arch"))
    assert "--zca" not in collapse.warning(healthy | {"effective_rank": 0.05}, full)
    args.queue = 4 * args.batch_size
    for bad in ({"held_out_gap": 0.0}, {"effective_rank": 0.05}):
        assert collapse.warning(healthy | bad, full - 1) == ""
    args.queue = 4000 * args.batch_size  # it fills late; a tenth of the steps is not waited for longer than for it
    for horizon, due in ((2000, 200), (300, 50), (10**6, 4000 + trainer.batches.steps_per_epoch)):
        trainer.horizon = horizon
        assert collapse.warning(healthy | {"held_out_gap": 0.0}, due - 1) == ""
        assert f"after {due:,} of {horizon:,} steps" in collapse.warning(healthy | {"held_out_gap": 0.0}, due)
    assert collapse.warning(healthy | {"effective_rank": 0.05}, due - 1) == ""


@pytest.mark.narrow
def test_a_run_that_does_not_tell_slices_apart_says_so_from_a_tenth_of_its_steps_on(flags, tmp_path, capsys,
                                                                                      monkeypatch):
    """Of 20 steps, five an epoch: after the second, within an epoch, and then as often as a run is looked at."""
    monkeypatch.setattr(monitor, "EARLIEST", 1)
    look = monitor.CollapseMonitor.look
    for gap in (0.019, 0.021):
        monkeypatch.setattr(monitor.CollapseMonitor, "look", lambda *a, gap=gap: look(*a) | {"held_out_gap": gap})
        train_ssl.main(flags(tmp_path / str(gap), "--batch-size", 4, "--bn-group", 2, "--epochs", 4, "--steps", 6))
        told = capsys.readouterr()
        lines = [line for line in told.out.splitlines() if line.startswith("step ")]
        assert [line.split("/")[0] for line in lines] == ["step 2", "step 5", "step 6"]
        assert all((": DOES NOT TELL SLICES APART, loss" in line) == (gap < 0.02) for line in lines)
        assert told.err.count("the model does not tell slices apart") == 3 * (gap < 0.02)


@pytest.mark.narrow
def test_a_start_that_never_learned_is_told_of_before_the_run(flags, tmp_path, capsys):
    """By the gap of its last look, which is also made where --steps ends a run within an epoch."""
    train_ssl.main(flags(tmp_path, "--no-geometric", "--name", "start", "--steps", 1))
    path = tmp_path / "start" / "checkpoint.pt"
    start = torch.load(path, weights_only=True)
    assert start["gap"] is not None
    for gap in (0.0, 0.5, None):  # None: of an older version
        torch.save(start | {"gap": gap}, path)
        capsys.readouterr()
        train_ssl.main([*flags(tmp_path, "--steps", 1, "--name", str(gap)), "--init", "start"])
        told = capsys.readouterr()
        assert ("WARNING: this run starts from start, and it does not tell slices apart (similarity margin 0.000 in "
                "its last look)" in told.err) == (gap == 0.0)
        assert "note: start: its pre-training is at step 1" in told.out
        config = json.loads((tmp_path / str(gap) / "config.json").read_text())
        assert not {"init_untrained", "init_unfinished"} & config.keys()


class Brightness(torch.nn.Module):
    """An encoder whose embedding is one direction that turns with `age`, or one for each mean grey value."""

    def __init__(self, apart: bool):
        super().__init__()
        self.apart, self.age = apart, 0.0
        self.projector = torch.nn.Sequential(torch.nn.Linear(2, 2))

    def features(self, images):
        grey = images.mean((1, 2, 3))
        angle = (20 * grey if self.apart else 0 * grey) + self.age
        return images, torch.stack([angle.cos(), angle.sin()], 1)

    def forward(self, images):
        return images, self.features(images)[1]


@pytest.mark.parametrize("apart", [False, True])
def test_a_model_that_only_drifts_brings_the_warning(flags, tmp_path, small_phantom, monkeypatch, apart):
    """Its own key is fresh and the queue's are old, so it wins against the queue; among fresh keys it does not."""
    args = train_ssl.parse(flags(tmp_path, "--no-geometric"))
    train_ssl.resolve_defaults(args, True)
    store = datasets.prepare(small_phantom / "AbdomenCT-1K", args.store, "pretrain", size=args.size)
    ranks = processes.Processes(0, 1, torch.device("cpu"))
    trainer = train_ssl.Trainer(args, train_ssl.build(args), datasets.Batches(args, len(store), ranks), ranks,
                                "off")
    moco = trainer.moco
    moco.encoder_q = moco.encoder_k = Brightness(apart)
    moco.queue = torch.zeros(32, 2)
    monkeypatch.setattr(augment, "JITTER_P", 0.0)  # the views of a slice have its brightness
    full = trainer.batches.steps_per_epoch + args.queue // args.batch_size
    images = torch.zeros(8, 3, 8, 8)
    for step in range(full):
        moco.encoder_q.age = 0.1 * step
        keys = torch.nn.functional.normalize(moco.encoder_k(images)[1], dim=1)
        moco(images, keys, None, None)
        moco.enqueue(keys)
    assert moco.query_stats[0] == 1  # the queue's accuracy
    collapse = monitor.CollapseMonitor(trainer, store)
    told = collapse.look(full)
    assert ("does not tell slices apart" in collapse.warning(told, max(full, 50))) is not apart
    assert (told["held_out_gap"] > 0.1) is apart
    assert (told["instance_accuracy"] > 2 * told["instance_chance"]) is apart


@pytest.mark.narrow
def test_every_look_that_is_shown_stands_in_the_log(flags, tmp_path, monkeypatch, capsys):
    """Also the last of --steps within an epoch, and the one from which a run is judged; 2 steps are an epoch."""
    monkeypatch.setattr(monitor, "EARLIEST", 1)
    for steps, looked in ((1, [1]), (3, [1, 2, 3])):  # 1: where it is judged first
        train_ssl.main(flags(tmp_path / str(steps), "--batch-size", 8, "--epochs", 2, "--steps", steps))
        shown = re.findall(r"^step (\d+)/.*similarity margin (-?[\d.]+), effective rank ([\d.]+)",
                           capsys.readouterr().out, re.M)
        log = {r["step"]: r for r in runs.read_log(tmp_path / str(steps) / "phantom-moco/log.jsonl")}
        assert [step for step, r in log.items() if "held_out_gap" in r] == looked
        assert [int(step) for step, *_ in shown] == looked
        for step, gap, rank in shown:
            told = log[int(step)]
            assert (gap, rank) == (f"{told['held_out_gap']:.2f}", f"{told['effective_rank']:.1f}")


@pytest.mark.narrow
def test_a_start_that_saw_other_grey_values_is_told_of(flags, tmp_path, monkeypatch, capsys):
    train_ssl.main(flags(tmp_path, "--name", "start", "--steps", 1, "--window", -1000, 1000))
    monkeypatch.setattr(train_ssl, "train", lambda trainer, store, run, *_: run.log([{"step": 1}]))
    capsys.readouterr()
    for init, loud in (("start", True), (tmp_path / "start/backbone.pth", True), ("random", False)):
        train_ssl.main([*flags(tmp_path, "--steps", 1, "--overwrite"), "--init", str(init)])
        out = capsys.readouterr().out
        assert (f"WARNING: {init}: pre-trained with --window -1000 1000; these slices have another, -175 250" in out
                ) is loud
    shutil.copy(tmp_path / "start/backbone.pth", tmp_path / "x.pth")  # alone, a file tells nothing
    train_ssl.main([*flags(tmp_path, "--steps", 1, "--overwrite"), "--init", str(tmp_path / "x.pth")])
    out = capsys.readouterr().out
    assert "WARNING" not in out and "x.pth: a file, which does not tell the HU window" in out
    config = json.loads((tmp_path / "start/config.json").read_text())
    assert config["window"] == [-1000, 1000]
    assert config["normalisation"] == [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]


@pytest.mark.narrow
def test_rows_start_from_a_run_of_out(flags, tmp_path, refusal, capsys):
    train_ssl.main(flags(tmp_path, "--no-geometric", "--name", "start", "--steps", 2))
    train_ssl.main([*flags(tmp_path, "--steps", 1, "--lr", 1e-9), "--init", "start"])
    start, row = (torch.load(tmp_path / name / "backbone.pth", weights_only=True) for name in ("start", "phantom-moco"))
    for name, weight in start.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(row[name], weight, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "phantom-moco/config.json").read_text())
    assert config["init"] == "start" and config["init_checksum"]
    assert "give --arch resnet_basic" in refusal(train_ssl.main, [
        *flags(tmp_path), "--init", "start", "--arch", "resnet34", "--name", "x"])
    # another start under the same name is another run
    train_ssl.main(flags(tmp_path, "--no-geometric", "--name", "start", "--steps", 1, "--overwrite"))
    assert "init_checksum" in refusal(train_ssl.main, [*flags(tmp_path, "--steps", 2, "--lr", 1e-9), "--init", "start"])


@pytest.fixture
def tiny_start(monkeypatch, small_networks):
    """The phantom's preset and its start, of two steps."""
    small = dict(arch="resnet_basic", image_size=32, batch_size=8, bn_group=4, queue=32, epochs=1, size=64)
    monkeypatch.setattr(train_ssl, "PHANTOM", train_ssl.PHANTOM | small)
    monkeypatch.setattr(train_ssl, "START", train_ssl.START | dict(epochs=1))


OTHERS = ["--temperature=0.05", "--temperature-local=0.3", "--lambda-local=2", "--patches=3", "--zca-iterations=3",
          "--size=48", "--lr=0.5", "--ema=0.5", "--queue=16", "--weight-decay=0", "--epochs=3", "--local", "--zca"]


def test_the_phantoms_start_is_trained_first_and_once(flags, tmp_path, tiny_start, refusal, capsys):
    argv = flags(tmp_path, "--seed", 2, "--steps", 1)
    argv = [*argv[: argv.index("--init")], *argv[argv.index("--zca-group") :]]
    train_ssl.main([*argv, *OTHERS, "--recipe", "author", "--out", str(tmp_path / "author")])
    author, plain = (tmp_path / x / "phantom-start-seed2" for x in ("author", ""))
    capsys.readouterr()
    train_ssl.main([*argv, "--every", "2"])
    out = capsys.readouterr().out
    for file in ("config.json", "backbone.pth"):  # whichever row comes first
        assert (author / file).read_bytes() == (plain / file).read_bytes()
    assert author.with_name("phantom-author-local-zca-aligned-seed2").is_dir()
    places = [out.index(f"{run}: resnet_basic from {init}") for run, init in (
        ("phantom-start-seed2", "random"), ("phantom-moco-every2-seed2", "phantom-start-seed2"))]
    assert places == sorted(places)
    config = json.loads((plain / "config.json").read_text())
    assert not config["geometric"] and not config["local"] and not config["zca"] and config["every"] == 1
    assert (config["temperature"], config["patches"], config["size"], config["window"], config["lr"]) == (
        0.2, 20, 64, [-175, 250], 0.01)
    # one that was made otherwise, as by an earlier version: said, and used only where it is named
    (plain / "config.json").write_text(json.dumps(config | {"temperature": 0.05}))
    line = refusal(train_ssl.main, [*argv, "--zca"])
    assert f"{plain}: was made with other settings (temperature: 0.05 there, 0.2 here); delete it" in line
    assert "give --init phantom-start-seed2" in line and not (tmp_path / "phantom-moco-zca-seed2").exists()
    train_ssl.main([*argv, "--zca", "--init", "phantom-start-seed2"])
    assert "phantom-start-seed2: resnet_basic from random" not in capsys.readouterr().out
    (plain / "config.json").write_text(json.dumps(config))
    assert "start.temperature: 0.05 there, 0.2 here" in refusal(train_ssl.main, [*argv, "--zca"])  # it began from that


@pytest.mark.parametrize("more, says", [
    (("--arch", "resnet_bottleneck"), "--init phantom-start: is a resnet_basic; give --arch resnet_basic"),
    (("--zca", "--zca-group", "100"), "--zca-group 100: must divide the 32 channels"),
    (("--batch-size", "6", "--queue", "36"), "--batch-size 6: must be a multiple of"),
    (("--every", "20"), "slices are fewer than one batch of 8")])
def test_what_refuses_a_row_is_told_before_its_start_is_trained(flags, tmp_path, tiny_start, refusal, more, says):
    plain = flags(tmp_path)
    assert says in refusal(train_ssl.main, [*plain[: plain.index("--init")], *more])
    assert not list(tmp_path.iterdir())


@pytest.mark.narrow
def test_a_start_of_another_architecture_is_refused_before_the_slices_are_prepared(flags, tmp_path, refusal):
    train_ssl.main(flags(tmp_path, "--name", "mine", "--steps", 1))
    assert "--init mine: is a resnet_basic; give --arch resnet_basic" in refusal(
        train_ssl.main, [*flags(tmp_path), "--init", "mine", "--arch", "resnet50", "--store", tmp_path / "fresh"])
    assert not (tmp_path / "fresh").exists()


def test_imagenets_weights_are_looked_for_before_the_slices_are_prepared(flags, tmp_path, refusal, monkeypatch):
    def offline(*args, **kw):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert "ImageNet weights of resnet18 could not be downloaded" in refusal(
        train_ssl.main, [*flags(tmp_path), "--init", "imagenet", "--store", tmp_path / "fresh"])
    assert not (tmp_path / "fresh").exists()


@pytest.mark.narrow
def test_a_backbone_is_opened_once(flags, tmp_path, monkeypatch):
    """And what is drawn behind it, projector and queue, is what `build` alone gives for the seed."""
    opened, real = [], backbones.open_backbone
    monkeypatch.setattr(backbones, "open_backbone", lambda name, *rest: opened.append(name) or real(name, *rest))
    argv = flags(tmp_path, "--steps", 1, "--lr", 1e-12, "--ema", 1)
    train_ssl.main(argv)
    assert opened == ["random"]
    args = train_ssl.parse(argv)
    train_ssl.resolve_defaults(args, True)
    fresh = train_ssl.build(args, True).state_dict()
    saved = torch.load(tmp_path / "phantom-moco/checkpoint.pt", weights_only=True)["model"]
    for name in ("encoder_k.backbone.conv1.weight", "encoder_k.projector.0.weight"):
        assert torch.equal(saved[name], fresh[name]), name
    assert torch.equal(saved["queue"][8:], fresh["queue"][8:])  # but for the first batch


def test_few_slices_are_told_what_cannot_work(flags, tmp_path):
    args = train_ssl.parse([])
    train_ssl.resolve_defaults(args, False)
    assert recipes.advice(args, 215_197, 168_000) == []
    told = " ".join(recipes.advice(args, 1_500, 1_000))
    assert "--queue 512" in told  # two batches: half of the slices hold no more
    assert "--arch" not in told
    args.init = "random"
    told = " ".join(recipes.advice(args, 1_500, 300))
    assert "--ema 0.99" in told and "--init start" in told
    args.init = "start"
    assert "a resnet50 that starts from what few slices" in " ".join(recipes.advice(args, 1_500, 3000))
    for unlike in ({"geometric": False}, {"init": __file__}):  # a file may have seen more
        other = argparse.Namespace(**vars(args) | unlike)
        assert "--arch" not in " ".join(recipes.advice(other, 1_500, 3000))
    args.ema = 0.99  # no one is told to give what was given
    told = " ".join(recipes.advice(args, 1_500, 50))
    assert "moves 0.01 of the way a step, too slow for 50 steps (more --epochs)" in told
    args = train_ssl.parse(["--data", "x"])
    train_ssl.resolve_defaults(args, True)
    assert recipes.advice(args, 1_473, 184) == []


@pytest.mark.parametrize("amp, more", [*(("bf16", more) for more in (
    (), ("--local", "--zca"), ("--no-geometric",), ("--recipe", "author"), ("--local", "--zca", "--geometric"))),
    ("off", ("--local", "--zca", "--geometric"))])
def test_a_step_on_a_gpu_waits_for_nothing(flags, tmp_path, request, monkeypatch, more, amp):
    fused = []  # torch has no fake kernel for it
    monkeypatch.setattr(torch, "_fused_sgd_", lambda weights, *rest, **kw: fused.append(len(weights)))
    args = train_ssl.parse(flags(tmp_path, "--size", 128, "--groups-per-pass", 2, *more))
    train_ssl.resolve_defaults(args, True)
    moco = train_ssl.build(args, True)
    device, waits = request.getfixturevalue("fake_gpu")
    ranks = processes.Processes(0, 1, device)
    trainer = train_ssl.Trainer(args, moco, datasets.Batches(args, 100, ranks), ranks, amp)
    for t in range(2):
        for p in trainer.trained:
            p.grad = torch.zeros_like(p)
        slices = resize.pinned(torch.zeros(args.batch_size, 128, 128, dtype=torch.uint8), device)
        with waits() as seen:
            record = trainer.step(t, slices)
        assert record.device == device and seen.copies > 5 and not seen.found
    assert fused == [len(trainer.trained)] * 2


@pytest.mark.narrow
def test_checkpoints_come_by_the_clock_and_at_the_end(flags, tmp_path, monkeypatch):
    """A clock that goes seven minutes a step, of which an epoch has two."""
    clock, saved = [0.0], []
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def slow(self, t, slices):
        clock[0] += 7 * 60
        return torch.zeros(7)

    monkeypatch.setattr(train_ssl.Trainer, "step", slow)
    monkeypatch.setattr(runs.Run, "_checkpoint", lambda self, state: saved.append(state["step"]))
    for more, expected in (((), [2, 4, 6, 8, 10, 11]), (("--checkpoint-minutes", 20), [4, 8, 11]),
                           (("--checkpoint-minutes", 1000), [11]), (("--checkpoint-minutes", 0), [2, 4, 6, 8, 10, 11])):
        saved.clear()
        train_ssl.main(flags(tmp_path / str(len(more) and more[1]), "--steps", 11, *more))
        assert saved == expected, more


@pytest.fixture
def deterministic():
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.narrow
def test_deterministic_algorithms_serve_every_step(flags, tmp_path, deterministic):
    """On a CPU they change nothing; an operation without one would raise."""
    for method in (["--local", "--zca", "--geometric"], ["--local", "--zca"]):
        name = "phantom-moco-local-zca" + "-aligned" * ("--geometric" in method)
        train_ssl.main(flags(tmp_path / "plain", *method, "--steps", 2))
        train_ssl.main(flags(tmp_path / "deterministic", *method, "--steps", 2, "--deterministic"))
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        one, other = (outcome(tmp_path / x / name)[2] for x in ("plain", "deterministic"))
        assert all(torch.equal(one[k], other[k]) for k in one)
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_a_gpu_continues_exactly_with_deterministic_algorithms(flags, tmp_path, deterministic):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for out, steps in (("a", (2, 4)), ("b", (4,))):
        for n in steps:
            train_ssl.main(flags(tmp_path / out, "--local", "--zca", "--deterministic", "--steps", n))
    one, other = (outcome(tmp_path / x / "phantom-moco-local-zca")[2] for x in "ab")
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.gpu
@pytest.mark.parametrize("more", [["--amp", "bf16"], ["--amp", "fp16"], ["--compile"]])
def test_a_gpu_trains(flags, tmp_path, more):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    train_ssl.main(flags(tmp_path, "--local", "--zca", "--steps", 3, *more))
    assert [r["step"] for r in runs.read_log(tmp_path / "phantom-moco-local-zca/log.jsonl")] == [1, 2, 3]


def test_real_ct_trains(real_ct, tmp_path):
    train_ssl.main(["--data", str(real_ct / "AbdomenCT-1K"), "--store", str(tmp_path / "s"), "--out", str(tmp_path),
                    "--arch", "resnet18", "--init", "random", "--image-size", "64", "--batch-size", "8", "--bn-group",
                    "4", "--queue", "64", "--steps", "2", "--local", "--zca"])
    assert (tmp_path / "moco-local-zca" / "backbone.pth").exists()
    assert intake.is_phantom(real_ct / "AbdomenCT-1K") is False
