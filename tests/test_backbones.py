"""Backbones of anyone, in; ours, out: what a file may look like, and the lines of docs/backbone.md."""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import svd_spectrum
import train_seg
import train_ssl
from ct.volumes import BadInput
from engine import backbones, report
from whitening import whiten_last_norm

WEIGHTS = 120  # of a ResNet-18 without its fc
CHILDREN = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]


def resnet(seed=0, arch="resnet18"):
    """A ResNet whose every weight and statistic is drawn, so that one that was not loaded shows in the features."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = torchvision.models.get_model(arch, weights=None)
        for v in (v for k, v in net.state_dict().items() if v.ndim == 1):
            v.add_(0.1 * torch.rand(v.shape))
    return net.eval()


def trunk(net):
    return torch.nn.Sequential(*list(net.eval().children())[:-2])


def features(net):
    with torch.no_grad():
        return trunk(net)(torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)))


def under(prefix, weights):
    return {prefix + k: v for k, v in weights.items()}


def numbered(weights):
    return {f"{CHILDREN.index(k.split('.')[0])}.{k.split('.', 1)[1]}": v for k, v in weights.items()}


def opened(tmp_path, content, name="mine.pth", arch="resnet18"):
    torch.save(content, tmp_path / name)
    return backbones.build_backbone(str(tmp_path / name), arch)


FULL = resnet().state_dict()
OWN = {k: v for k, v in FULL.items() if not k.startswith("fc.")}
OTHER = {k: v for k, v in resnet(1).state_dict().items() if not k.startswith("fc.")}
FEATURES = features(resnet())
PROJECTOR = {"projector.0.weight": torch.ones(3, 3), "predictor.3.bias": torch.ones(3)}
# kind: (content, what is told to have been stripped, what to have been left out)
ACCEPTED = {
    "torchvision": (FULL, "", "'fc'"), "ours": (OWN, "", ""),
    **{prefix: (under(prefix, FULL), prefix, f"'{prefix}fc'")
       for prefix in ("module.", "encoder.", "encoder_q.", "backbone.", "model.", "resnet.", "module.encoder_q.",
                      "model.backbone.", "module.backbone.", "model.module.encoder.resnet.", "model._orig_mod.")},
    **{f"{word} {prefix}": ({word: under(prefix, OWN), "epoch": 3}, f"{word}.{prefix}", "") for word in
       ("state_dict", "model", "teacher", "student", "backbone") for prefix in ("", "module.", "backbone.")},
    "two containers": ({"model": {"state_dict": OWN}}, "model.state_dict.", ""),
    "numbered": (numbered(OWN), "", ""), "numbered, with fc": (numbered(FULL), "", "'9'"),
    "lightly": ({"state_dict": under("backbone.", numbered(OWN)) | under("backbone_momentum.", numbered(OTHER))
                 | under("projection_head.", {"layers.0.weight": torch.ones(2, 2)})}, "state_dict.backbone.",
                "'state_dict.backbone_momentum', 'state_dict.projection_head'"),
    "numbered projector of the same prefix": (under("encoder.", OWN) | {"encoder.projector.0.weight": torch.ones(2)},
                                              "encoder.", "'encoder.projector'"),
    "a projector that is a Sequential": ({"backbone": OWN, "model": {"0.weight": torch.ones(4, 4)}}, "backbone.",
                                         "'model'"),
    "moco": ({"state_dict": under("module.encoder_q.", OWN | {"fc.0.weight": torch.ones(2)})
              | under("module.encoder_k.", OTHER) | {"module.queue": torch.ones(3)}}, "state_dict.module.encoder_q.",
             "'state_dict.module.encoder_k', 'state_dict.module.encoder_q.fc', 'state_dict.module.queue'"),
    "mmselfsup": ({"state_dict": under("backbone.", OWN) | under("encoder_q.0.", OWN) | under("encoder_k.0.", OTHER)},
                  "state_dict.backbone.", "'state_dict.encoder_k', 'state_dict.encoder_q'"),
    "swav": (under("module.", OWN) | {"module.projection_head.0.weight": torch.ones(2)}, "module.",
             "'module.projection_head'"),
    "dino": ({"student": under("module.backbone.", OTHER), "teacher": under("backbone.", OWN), "epoch": 3,
              "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
             "teacher.backbone.", "'optimizer', 'student'"),
    "twice the same": ({"state_dict": under("backbone.", OWN) | under("model.backbone.", OWN)}, "state_dict.backbone.",
                       "'state_dict.model'"),
    "beside a projector": (OWN | PROJECTOR, "", "'predictor', 'projector'"),
    "lightning": ({"epoch": 1, "global_step": 5, "pytorch-lightning_version": "2.5.0", "hyper_parameters": {"lr": 0.1},
                   "state_dict": under("model.", OWN), "optimizer_states": [{"state": {0: torch.ones(2)}}],
                   "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}}}, "state_dict.model.",
                  "'callbacks', 'optimizer_states'"),
    "without counters": ({k: v for k, v in OWN.items() if not k.endswith("num_batches_tracked")}, "", ""),
}


@pytest.mark.parametrize("arch, zero", [("resnet18", False), ("resnet34", False), ("resnet50", True),
                                        ("wide_resnet50_2", True), ("resnext50_32x4d", True)])
def test_random_weights_are_torchvisions_own(arch, zero):
    """A bottleneck's last BN starts at zero, a basic block's at one."""
    torch.manual_seed(5)
    expected = torchvision.models.get_model(arch, weights=None, zero_init_residual=zero).state_dict()
    torch.manual_seed(5)
    found = backbones.build_backbone("random", arch).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(v, expected[k]) for k, v in found.items())
    last = [v for k, v in found.items() if k.endswith("bn3.weight" if zero else "bn2.weight")]
    assert last and all((v == (0 if zero else 1)).all() for v in last)


def test_random_bottlenecks_tell_images_apart():
    """Features of two images are less alike where the residual branches begin at zero."""
    torch.manual_seed(0)
    images = torch.rand(8, 3, 1, 1) * torch.rand(8, 3, 64, 64)

    def alike(net):
        with torch.no_grad():
            x = torch.nn.functional.normalize(trunk(net).train()(images).mean((2, 3)), dim=1)
        return (x @ x.T)[~torch.eye(8, dtype=torch.bool)].mean()

    torch.manual_seed(1)
    theirs = torchvision.models.resnet50(weights=None)
    assert alike(backbones.architecture("resnet50")) < alike(theirs)


@pytest.mark.parametrize("kind", ACCEPTED)
def test_files_of_anyone_give_torchvisions_features(tmp_path, capsys, kind):
    content, stripped, left = ACCEPTED[kind]
    net = opened(tmp_path, content)
    assert torch.equal(features(net), FEATURES)
    told = capsys.readouterr().out.splitlines()
    count = 100 if kind == "without counters" else WEIGHTS
    rule = " (the teacher, not the student)" * (kind == "dino")
    assert told == [f"{tmp_path / 'mine.pth'}: all {count} weights of resnet18 matched"
                    + f" under '{stripped}'{rule}" * bool(stripped) + f"; left out: {left}" * bool(left)]


@pytest.mark.parametrize("arch", backbones.ARCHITECTURES)
def test_an_architecture_is_told_by_its_shapes(tmp_path, arch):
    with torch.device("meta"):
        weights = torchvision.models.get_model(arch, weights=None).state_dict()
    small = {k: torch.zeros(()).expand(v.shape) for k, v in weights.items()}  # one number each, in the file too
    other = "resnet18" if arch != "resnet18" else "resnet50"
    with pytest.raises(BadInput, match=f"no.* architecture {other} .*; it is a {arch}: give --arch {arch}$"):
        opened(tmp_path, {"model": numbered(small)}, arch=other)


REFUSED = {
    "another word": (under("trunk.", OWN), "120 of 120 weights missing.*a ResNet is there under 'trunk.': save one"),
    "another word, numbered": (under("net.", numbered(OWN)), "a ResNet is there under 'net.'"),
    "only the momentum encoder": (under("module.encoder_k.", OWN), "a ResNet is there under 'module.encoder_k.'"),
    "two that differ": ({"state_dict": under("encoder.", OWN), "model": OTHER},
                        "holds several ResNets, under 'state_dict.encoder.', 'model.': save one of them alone"),
    "two students": ({"student": {"backbone": OWN, "encoder": OTHER}},
                     "holds several ResNets, under 'student.backbone.', 'student.encoder.'"),
    "deep stem": ({k.replace("conv1.", "stem.0.") if k == "conv1.weight" else k: v for k, v in OWN.items()},
                  "1 of 120 weights missing.* first conv1.weight.*a different stem"),
    "deep stem in timm": ({k: v for k, v in OWN.items() if k != "conv1.weight"} | {"conv1.0.weight": torch.ones(32)},
                          "1 of 120 weights missing, 0 of another shape, 1 unknown"),
    "small stem": (OWN | {"conv1.weight": torch.ones(64, 3, 3, 3)}, "1 of another shape.*a different stem"),
    "one channel": (OWN | {"conv1.weight": torch.ones(64, 1, 7, 7)}, "1 of another shape"),
    "half of it": ({k: v for k, v in OWN.items() if not k.startswith("layer4")}, "30 of 120 weights missing"),
    "one weight less": ({k: v for k, v in OWN.items() if k != "layer3.1.bn2.running_var"},
                        "1 of 120 weights missing.*first layer3.1.bn2.running_var"),
    "more in a layer": (OWN | {"layer2.0.se.fc1.weight": torch.ones(2)}, "1 unknown, first layer2.0.se.fc1.weight"),
    "vit": ({"teacher": {"blocks.0.attn.qkv.weight": torch.ones(2), "cls_token": torch.ones(2)}},
            "its names begin with 'teacher.', as none"),
    "no tensors": ({"epoch": 3}, "it holds no tensors by name"), "a tensor": (torch.ones(3), "it holds no tensors"),
    "a list": ([OWN], "it holds no tensors by name"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_whole_resnet_is_refused_in_one_line(tmp_path, kind):
    content, why = REFUSED[kind]
    with pytest.raises(BadInput, match=why) as caught:
        opened(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path / 'mine.pth'}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [
    {"state_dict": under("model.", FULL), "hyper_parameters": argparse.Namespace(lr=0.1)},
    resnet()], ids=["lightning", "module"])
def test_a_file_with_more_than_tensors_is_told_how_to_save_them_alone(tmp_path, content):
    """And the command that is told does it, also where the name has a space and a quote."""
    with pytest.raises(BadInput, match="holds more than tensors") as caught:
        opened(tmp_path, content, "it's mine.ckpt")
    command = re.search(r"python -c .*(?=\)$)", str(caught.value))[0]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    net = backbones.build_backbone(str(tmp_path / "it's mine.weights.pth"), "resnet18")
    assert torch.equal(features(net), FEATURES)


def test_a_file_has_one_checksum_whatever_the_seed(tmp_path):
    torch.save(OWN, tmp_path / "a.pth")
    torch.save({"model": numbered(FULL)}, tmp_path / "b.pth")
    known = [backbones.open_backbone(str(tmp_path / f"{name}.pth"), tmp_path, "resnet18", seed, "fold", True)
             for name, seed in (("a", 0), ("a", 1), ("b", 0))]
    assert len({b.pretraining["checksum"] for b in known}) == 1 and [b.name for b in known] == ["a", "a", "b"]


def test_the_name_of_a_row(tmp_path):
    for name in ("mine", "imagenet", "random"):
        torch.save(OWN, tmp_path / f"{name}.pth")
    assert [backbones.title_of(str(tmp_path / f"{n}.pth")) for n in ("mine", "imagenet", "random")] == [
        "mine", "imagenet.pth", "random.pth"]  # their weights are neither
    assert backbones.title_of(str(tmp_path / "mine.pth"), "my method") == "my method"
    for row in ("imagenet", "random", "", ".", "..", "a/b", "a|b", "a\tb"):
        with pytest.raises(BadInput, match="--row .*must be fit to name a folder"):
            backbones.title_of(str(tmp_path / "mine.pth"), row)
    with pytest.raises(BadInput, match="--row x: only a FILE is given a name, moco has its own"):
        backbones.title_of("moco", "x")


def test_files_of_one_row_are_not_mixed():
    def result(backbone, checksum, draw, seed=0, step=None):
        return {"data": "BTCV", "slices": 3779, "split": "25", "draw": draw, "backbone": backbone, "seed": seed,
                "protocol": "linear-finetune", "mDS": 0.1 * (draw + 1), "organs": [0.5] * 13,
                "pretraining": {"step": step, "horizon": step, "checksum": checksum, "gap": 0.3, "view_px": 224,
                                "slice_px": 512}}

    def rows(*results):
        return {c["method"]: [round(v) for v in c["values"]]
                for c in report.cells(results, ("linear-frozen", "linear-finetune", "deeplabv3plus"))
                if c["values"] and c["protocol"] == "linear-finetune"}

    a, b = "a" * 32, "b" * 32
    assert rows(result("x", a, 0), result("x", a, 1), result("x", a, 1, seed=1)) == {"x": [10, 20, 20]}
    assert rows(result("x", a, 0), result("x", b, 1)) == {"x [aaaaaaaa]": [10], "x [bbbbbbbb]": [20]}
    assert rows(result("x", a, 0), result("x", b, 0), result("x", b, 1)) == {"x": [10, 20]}  # measured again
    assert rows(result("x", a, 0), result("x", b, 1, step=9)) == {"x": [20], "x [aaaaaaaa]": [10]}  # a run of that name
    # the tables' own rows are of runs, whatever a file is called
    for row in ("moco", "MoCo v2", "Initial checkpoint"):
        assert rows(result(row, a, 0)) == {f"{row} (a file)": [10]}
    assert rows(result("moco", a, 0, step=9), result("moco-seed1", b, 0, 1, step=9)) == {"MoCo v2": [10, 10]}


def test_a_file_has_its_row_in_both_tables_of_a_phantom(small_phantom, tmp_path, capsys, refusal):
    torch.save({"state_dict": under("encoder_q.", FULL)}, tmp_path / "theirs.pth")
    common = [str(a) for a in ("--data", small_phantom / "BTCV", "--store", small_phantom.parent / "seg", "--out",
                               tmp_path / "runs")]
    seg = [*common, "--amp", "off", "--crop-size", "64", "--batch-size", "2", "--split", "25", "--draw", "0",
           "--protocol", "linear-frozen", "--iterations", "1", "--backbone", str(tmp_path / "theirs.pth")]
    assert "--row a/b: must be fit" in refusal(train_seg.main, [*seg, "--row", "a/b"])
    assert "--row x: only a FILE" in refusal(train_seg.main, [*seg[:-1], "random", "--row", "x"])
    assert not (tmp_path / "runs").exists()
    train_seg.main([*seg, "--row", "my method"])
    out = capsys.readouterr().out
    assert "1 run: my method x" in out and "theirs.pth: all 120 weights of resnet18 matched under" in out
    table = (tmp_path / "runs/report.md").read_text()
    assert re.search(r"^\| 25 % \| my method \(a file, which does not tell the HU window [^|]*\) \|", table, re.M)
    result = json.loads((tmp_path / "runs/seg/my method-linear-frozen-25-0/result.json").read_text())
    assert result["backbone"] == "my method" and result["pretraining"]["step"] is None
    # other weights under that name are another run
    torch.save(OTHER, tmp_path / "theirs.pth")
    with pytest.raises(SystemExit):
        train_seg.main([*seg, "--row", "my method"])
    assert "pretraining.checksum: " in capsys.readouterr().err
    train_seg.main(seg)
    assert "| theirs (a file, which does not tell" in (tmp_path / "runs/report.md").read_text()
    svd_spectrum.main([*common, "--image-size", "64", "--backbone", str(tmp_path / "theirs.pth"), "random"])
    lines = (tmp_path / "runs/spectrum.csv").read_text().splitlines()[1:]
    assert [line.split(",")[0] for line in lines] == ["random", "theirs"]


def test_a_pre_training_starts_from_anyones_file(small_phantom, tmp_path):
    torch.save({"teacher": under("backbone.", numbered(OWN)), "student": OTHER}, tmp_path / "x.pth")
    args = train_ssl.parse([str(a) for a in ("--init", tmp_path / "x.pth", "--arch", "resnet18", "--out", tmp_path)])
    train_ssl.resolve_defaults(args, True)
    assert torch.equal(features(train_ssl.build(args, True).encoder_q.backbone), features(resnet()))


# ------------------------------------------------------------------------------- ours in others, as documented


DOCUMENT = (Path(__file__).parent.parent / "docs/backbone.md").read_text()
BLOCKS = re.findall(r"^(\w+)[^\n]*:\n\n```python\n(.*?)```", DOCUMENT, re.M | re.S)


def last_map(library, net, images):
    """A network's last features (B, C, h, w), or their mean over positions (B, C) where it gives that alone."""
    if library == "torchvision":
        return trunk(net)(images)
    if library == "timm":
        return net.forward_features(images)
    if library == "segmentation_models_pytorch":
        return net.encoder(images)[-1]
    return net(images).flatten(1)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """(folder of a backbone.pth as train_ssl.py writes it, the features in evaluation mode of what it came from)."""
    folder = tmp_path_factory.mktemp("run")
    net = resnet(arch="resnet50")
    whiten_last_norm(net, group_size=64)
    net.train()(torch.randn(4, 3, 64, 64))  # gives the whitening its statistics
    torch.save(backbones.export(net), folder / "backbone.pth")
    return folder, features(net)


def test_the_document_has_all_five_in_three_lines():
    assert [library for library, _ in BLOCKS] == ["torchvision", "timm", "segmentation_models_pytorch", "MONAI",
                                                  "lightly"]
    assert all(len(lines.splitlines()) <= 3 for _, lines in BLOCKS)


@pytest.mark.parametrize("library, lines", BLOCKS, ids=[library for library, _ in BLOCKS])
def test_our_backbone_opens_by_the_documented_lines(ours, monkeypatch, library, lines):
    pip = {"segmentation_models_pytorch": "segmentation-models-pytorch"}.get(library, library.lower())
    if not importlib.util.find_spec(library.lower()):
        pytest.skip(f"{library} is not installed: pip install {pip}")
    folder, expected = ours
    monkeypatch.chdir(folder)
    scope = {}
    if library == "lightly":
        exec(BLOCKS[0][1], scope)
    exec(lines, scope)
    with torch.no_grad():
        images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
        out = last_map(library, scope["net"].eval(), images)
    expected = expected if out.ndim == 4 else expected.mean((2, 3))
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_monais_default_stride_gives_other_features(ours, monkeypatch):
    """Why its line names the stride: without it the weights load all the same."""
    pytest.importorskip("monai", reason="monai is not installed: pip install monai")
    folder, expected = ours
    monkeypatch.chdir(folder)
    scope = {}
    exec(dict(BLOCKS)["MONAI"].replace("conv1_t_stride=2, ", ""), scope)
    with torch.no_grad():
        out = scope["net"].eval()(torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)))
    assert (out.flatten(1) - expected.mean((2, 3))).abs().max() > 0.01 * expected.abs().max()


def test_lightlys_own_model_comes_back(ours, tmp_path, monkeypatch, capsys):
    """A model of lightly's, built on our backbone, saved as its users do, is a backbone here."""
    lightly = pytest.importorskip("lightly", reason="lightly is not installed: pip install lightly")
    heads = importlib.import_module(f"{lightly.__name__}.models.modules")
    folder, expected = ours
    monkeypatch.chdir(folder)
    scope = {}
    exec(BLOCKS[0][1] + dict(BLOCKS)["lightly"], scope)
    model = torch.nn.Module()
    model.backbone, model.projection_head = scope["net"], heads.MoCoProjectionHead(2048, 2048, 128)
    net = opened(tmp_path, {"state_dict": model.state_dict()}, arch="resnet50")
    torch.testing.assert_close(features(net), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert capsys.readouterr().out.endswith("under 'state_dict.backbone.'; left out: 'state_dict.projection_head'\n")
