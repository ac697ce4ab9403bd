"""Every edge of every command: bad input ends it with one line and the right exit code, and nothing is written."""

import contextlib
import copy
import fcntl
import gzip
import hashlib
import io
import json
import os
import pickle
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import narrow
import nibabel as nib
import numpy as np
import pytest
import torch
import torchvision

import datasets
import svd_spectrum
import train_seg
import train_ssl
from ct import cgroup, command, phantom, prepare, tasks
from ct.volumes import BadInput, read_volume
from engine import backbones, figures, launch, processes, runs
from segment import Segmenter
from tools import bench, paper, study

ROOT = Path(__file__).parent.parent
COMMANDS = {"ssl": train_ssl.main, "seg": train_seg.main, "svd": svd_spectrum.main, "prepare": datasets.main,
            "audit": datasets.main, "phantom": phantom.main, "bench": bench.main, "study": study.main}
PROBE = ("--backbone", "random", "--amp", "off", "--split", "25", "--draw", "0", "--protocol", "linear-frozen",
         "--iterations", "1", "--crop-size", "32")
ARCH = "resnet_basic"  # where the network is none of the matter


class World:
    """The small phantom, its stores, and a folder of runs: a pre-training and a segmentation, made without training."""

    def __init__(self, data: Path, root: Path):
        self.data, self.root, self.out = data, root, root / "runs"
        self.stores = data.parent / "store", data.parent / "seg"
        datasets.prepare(data / "AbdomenCT-1K", self.stores[0], "pretrain", size=192)
        datasets.prepare(data / "BTCV", self.stores[1], "segment")
        net, model = narrow.narrow_basic(), Segmenter(narrow.narrow_basic(), "linear-frozen", len(tasks.ORGANS))
        weights = {f"encoder_q.backbone.{k}": v for k, v in net.state_dict().items()}
        self.run("phantom-moco", {"data": "phantom", "arch": ARCH, "init": "random"},
                 {"step": 1, "arch": ARCH, "zca": [], "model": weights})
        self.run("seg/a", {"data": "phantom", "arch": ARCH, "protocol": "linear-frozen", "crop_size": 32,
                           "window": [-175, 250]}, {"step": 1, "model": model.state_dict(), "amp": "off"})
        (self.out / "seg/a/result.json").write_text('{"mDS": 0.5}')
        (self.root / "file").write_text("no folder")

    def run(self, name: str, config: dict | None, state: dict) -> None:
        (self.out / name).mkdir(parents=True)
        torch.save(state, self.out / name / "checkpoint.pt")
        if config is not None:
            (self.out / name / "config.json").write_text(json.dumps(config))

    def argv(self, name: str, *more: object) -> list[str]:
        """A call of a command that would work, and `more`, which takes precedence."""
        ct, btcv = self.data / "AbdomenCT-1K", self.data / "BTCV"
        arch = ("--arch", ARCH)
        small = ("--image-size", 32, "--batch-size", 8, "--bn-group", 4, "--queue", 32, "--steps", 1, "--amp", "off")
        calls = {"ssl": ("--data", ct, "--store", self.stores[0], "--out", self.out, "--init", "random", *arch, *small),
                 "seg": ("--data", btcv, "--store", self.stores[1], "--out", self.out, *arch, *PROBE),
                 "svd": ("--data", btcv, "--store", self.stores[1], "--out", self.out, *arch, "--image-size", 32),
                 "prepare": ("prepare", "--data", ct, "--store", self.root / "new"),
                 "audit": ("audit", "--data", ct, "--store", self.root / "new"),
                 "phantom": ("--out", self.root / "new", "--labelled", 1, "--unlabelled", 0),
                 "bench": (), "study": ("--ssl", ct, "--seg", btcv, "--table")}
        return [str(a).format(w=self.root, out=self.out) for a in (*calls[name], *more)]

    def files(self) -> dict[str, tuple]:
        """All that lies in the runs and around, and in the stores, with sizes and times; locks aside."""
        found = [p for folder in (self.root, self.data.parent) for p in folder.rglob("*") if p.name != ".lock"]
        return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in found if not p.is_dir()}


@pytest.fixture(scope="module")
def made(small_phantom, small_networks, tmp_path_factory) -> World:
    return World(small_phantom, tmp_path_factory.mktemp("edges"))


@pytest.fixture
def shared(made, monkeypatch) -> World:
    """For calls that must leave it as it is."""
    monkeypatch.chdir(made.root)
    return made


@pytest.fixture
def world(made, tmp_path, monkeypatch) -> World:
    """A copy, to be written to."""
    shutil.copytree(made.root, tmp_path / "w", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "w")
    own = copy.copy(made)
    own.root, own.out = tmp_path / "w", tmp_path / "w/runs"
    return own


@pytest.fixture
def ends(capsys):
    """ends(command, argv) -> (exit code, the lines on stderr, stdout) of a call in this process."""

    def run(name: str, argv: list) -> tuple[int, list[str], str]:
        capsys.readouterr()
        code = 0
        try:
            COMMANDS[name]([str(a) for a in argv])
        except SystemExit as e:
            code = e.code
        captured = capsys.readouterr()
        return code, captured.err.splitlines(), captured.out

    return run


def case(name, *more, code=1, says, **environment):
    return pytest.param(name, more, code, says, environment, id=" ".join([name, *map(str, more), *environment]))


ENVIRONMENTS = [({"WORLD_SIZE": "2"}, "without RANK"), ({"LOCAL_RANK": ""}, "LOCAL_RANK=''"),
                ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x'"), ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
                ({"RANK": ""}, "RANK=''"), ({"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE=''"),
                ({"WORLD_SIZE": "0"}, "RANK=0"), ({"RANK": "1"}, "WORLD_SIZE=1"), ({"WORLD_SIZE": "-2"}, "no number")]
FLAGS = {"ssl": ["--seed", "--lr", "--steps", "--epochs", "--workers", "--image-size"], "seg": ["--seed", "--lr",
         "--draw", "--iterations"], "svd": ["--seed", "--image-size"], "prepare": ["--size", "--workers"],
         "audit": ["--workers"], "phantom": ["--seed", "--labelled", "--unlabelled"], "study": ["--seeds", "--steps"]}
TABLE = [
    *(case(name, flag, "-1", *["-1"] * (name == "study" and flag == "--steps"), code=2, says=f"{flag}: -1: must be")
      for name, flags in FLAGS.items() for flag in flags),
    case("prepare", "--size", "0", code=2, says="--size: 0: must be"),
    case("svd", "--image-size", "0", code=2, says="--image-size: 0"),
    case("ssl", "--temperature", "0", code=2, says="--temperature: 0: must be a number above 0"),
    case("ssl", "--weight-decay", "-1", code=2, says="--weight-decay: -1: must be"),
    case("ssl", "--recipe", "mine", code=2, says="--recipe"),
    case("ssl", "--ema", "2", code=2, says="of at most 1"),
    *(case(name, flag, code=2, says=flag) for name in COMMANDS for flag in ("--nothing",)),
    *(case(name, "--a\nb", code=2, says=r"--a\nb") for name in COMMANDS),
    *(case(name, "--window", "nan", "5", code=2, says="--window: nan") for name in ("ssl", "seg", "svd", "prepare")),
    *(case(name, "--window", "5", "5", says="--window 5.0 5.0") for name in ("ssl", "seg", "svd", "prepare")),
    *(case(name, says=says, **environment) for environment, says in ENVIRONMENTS for name in ("ssl", "seg", "svd")),
    *(case(name, "--data", where, says="no such folder") for name in ("ssl", "seg", "svd", "prepare", "audit")
      for where in ("{w}/nowhere", "{w}/file")),
    *(case(name, flag, where, code=2, says="file is no folder") for name in ("ssl", "seg", "svd", "prepare")
      for flag in ("--store", "--out")[: 1 + (name != "prepare")] for where in ("{w}/file", "{w}/file/s")),
    case("phantom", "--out", "{w}/file/p", says="Not a directory"),
    case("phantom", "--out", "{w}/file", says="exists already"),
    case("seg", "--report", "--out", "{w}/s", says="no results yet"),
    *(case("ssl", "--name", name, says="--name ") for name in ("", "..", "a/b", "{w}/a", "seg", "random")),
    case("ssl", "--init", "nothing", says="nothing: no such run"), case("ssl", "--arch", "vgg16", says="--arch vgg16"),
    case("seg", "--backbone", "nothing", says="nothing: no such run"),
    case("svd", "nothing", says="nothing: no such run"),
    case("seg", "--arch", "vgg16", says="--arch vgg16"), case("svd", "--arch", "vgg16", "random", says="--arch vgg16"),
    case("svd", "seg/a", says="no checkpoint of a pre-training"),
    case("seg", "--backbone", "seg/a", says="no checkpoint of a pre-training"),
    case("ssl", "--init", "{out}/seg/a/checkpoint.pt", says="no checkpoint of a pre-training"),
    case("seg", "--predict", "{w}/file", "--run", "a", says="not a NIfTI name"),
    case("seg", "--predict", "{w}/nowhere", "--run", "a", says="nowhere"),
    case("seg", "--predict", "{w}/file", "--run", "phantom-moco", says="a pre-training run, which cannot label"),
    case("audit", "--verify", says="nothing was prepared there"),
    case("study", says="nothing was measured there yet"),
    case("study", "--rows", "moco-nothing", code=2, says="--rows: invalid choice"),
]


@pytest.mark.parametrize("name, more, code, says, environment", TABLE)
def test_bad_input_is_one_line_and_nothing_is_written(shared, ends, monkeypatch, name, more, code, says, environment):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    before = shared.files()
    ended, lines, _ = ends(name, shared.argv(name, *more))
    assert (ended, len(lines)) == (code, 1) and says in lines[0], (ended, lines)
    assert shared.files() == before


def test_refused_before_the_slices_are_prepared(world, ends):
    """That takes hours on the paper's data: what can be known before is refused before."""
    for name, more in (("ssl", ("--init", "nothing")), ("ssl", ("--arch", "vgg16")), ("seg", ("--arch", "vgg16")),
                       ("seg", ("--backbone", "nothing")), ("svd", ("nothing",)), ("svd", ("random", "--arch", "x"))):
        code, lines, _ = ends(name, world.argv(name, *more, "--store", world.root / "fresh"))
        assert code == 1 and len(lines) == 1 and not (world.root / "fresh").exists(), (name, more)


class Found(Exception):
    pass


@pytest.fixture
def flags_of(monkeypatch):
    """flags_of(command, argv) -> argparse's actions, one for each of its flags and arguments."""

    def stop(self, argv=None):
        raise Found(self)

    def run(name: str, argv: list) -> list:
        with monkeypatch.context() as patch, pytest.raises(Found) as found:
            patch.setattr(command.Parser, "parse_args", stop)
            COMMANDS[name](argv)
        return found.value.args[0]._actions

    return run


# Every flag is a promise to those who have it in their scripts, and one more thing to read in --help.
OF_ALL = "--amp --data --deterministic --out --seed --store --window --workers"
OF_TASKS = "--labels --organs --patient-regex --val --val-cases"
OF_TRAINING = "--arch --batch-size --checkpoint-minutes --compile --images --lr --overwrite"
EVERY_FLAG = {
    "ssl": f"{OF_ALL} {OF_TRAINING} --bn-group --ema --epochs --every --geometric --groups-per-pass --image-size "
           "--init --lambda-local --local --name --no-compile --no-geometric --patches --probe --queue --recipe --size "
           "--steps --temperature --temperature-local --weight-decay --zca --zca-group --zca-iterations",
    "seg": f"{OF_ALL} {OF_TASKS} {OF_TRAINING} --backbone --crop-size --draw --eval-every --iterations --no-flip "
           "--no-whole-slices --predict --predict-out --protocol --report --row --run --save-predictions --split "
           "--whitening --whole-slices",
    "svd": f"{OF_ALL} {OF_TASKS} --arch --backbone --image-size --positions",
    "prepare": f"{OF_TASKS} --data --images --kind --size --skip-bad --store --verify --window --workers",
    "phantom": "--labelled --layout --out --seed --unlabelled", "bench": "--json --peers --quick",
    "study": "--jobs --out --phantom --rows --seeds --seg --ssl --steps --table"}
EVERY_FLAG["audit"] = EVERY_FLAG["prepare"]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_flags_are_these(shared, flags_of, name):
    """A new flag is a decision: whoever wants one writes it down here, too."""
    found = [option for action in flags_of(name, shared.argv(name)) for option in action.option_strings]
    assert sorted(found) == sorted([*EVERY_FLAG[name].split(), "--help", "-h"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_among_the_flags_has_bounds(shared, ends, flags_of, name):
    for action in flags_of(name, shared.argv(name)):
        assert action.type in (None, Path) or action.type.__module__ == "ct.command", action.option_strings
        if action.type not in (None, Path, command.folder, command.listed):  # the others are numbers
            for value in ("nan", "x", "", "1e400"):
                values = [value] * (action.nargs if isinstance(action.nargs, int) else 1)
                code, lines, _ = ends(name, shared.argv(name, action.option_strings[0], *values))
                assert code == 2 and len(lines) == 1 and action.option_strings[0] in lines[0], (lines, value)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_text(ends, name):
    code, lines, out = ends(name, ["--help"])
    assert code == 0 and not lines and "{'" not in out and "%" not in out.replace("percent", "") and "usage" in out
    if name in ("ssl", "seg", "svd"):
        assert ("data/AbdomenCT-1K" if name == "ssl" else "data/BTCV") in out


# ----------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("config", [None, "[", "{}"])
def test_a_run_without_its_settings_is_refused_and_keeps_no_other_from_being_used(world, ends, config):
    state = runs.load(world.out / "phantom-moco/checkpoint.pt")
    for name in ("phantom-moco-zca", "seg/b"):
        world.run(name, None, state)
        if config is not None:
            (world.out / name / "config.json").write_text(config)
    (world.out / "seg/b/result.json").write_text("{}")
    before = world.files()
    calls = [("ssl", "--zca", "--zca-group", 16, "--name", "phantom-moco-zca"), ("ssl", "--init", "phantom-moco-zca"),
             ("seg", "--backbone", "moco-zca"), ("svd", "moco-zca")]
    if config is not None:  # without the file, a folder is no run
        calls += [("seg", "--predict", world.root / "file", "--run", "b")]
    for name, *more in calls:
        code, lines, _ = ends(name, world.argv(name, *more))
        # an object that is no config differs in every setting
        told = "config.json: " if config != "{}" or more[0] != "--zca" else "was started with other settings"
        assert code == 1 and len(lines) == 1 and told in lines[0], (name, more, lines)
        assert world.files() == before
    code, lines, out = ends("svd", world.argv("svd"))
    assert code == 0 and "phantom-moco: effective rank" in out and "phantom-moco-zca" not in out
    assert len(lines) == 1 and "left out" in lines[0] and "phantom-moco-zca/config.json" in lines[0]
    args = train_seg.parse(world.argv("seg", "--backbone", "all"))
    assert train_seg.choose_backbones(args, True) == ["random", "phantom-moco"]


def test_a_run_on_another_window_is_left_out_of_all_and_noted_alone(world, ends):
    config = {"data": "phantom", "arch": ARCH, "init": "random"}
    state = runs.load(world.out / "phantom-moco/checkpoint.pt") | {"horizon": 1}
    for name, more in (("author-moco", {"window": [-1024, 3071]}), ("moco-zca", {"window": [-175, 250]})):
        world.run(f"phantom-{name}", config | more, state)
    code, lines, out = ends("svd", world.argv("svd"))
    assert code == 0 and "phantom-moco-zca: effective rank" in out and "phantom-author-moco" not in out
    assert len(lines) == 1 and "left out: phantom-author-moco: pre-trained with --window -1024 3071" in lines[0]
    for window, expected in (([], ["phantom-moco", "phantom-moco-zca"]),
                             (["--window", -1024, 3071], ["phantom-moco", "phantom-author-moco"])):  # one: no window
        args = train_seg.parse(world.argv("seg", "--backbone", "all", *window))
        assert train_seg.choose_backbones(args, True) == ["random", *expected]
    for name, noted in (("author-moco", True), ("moco-zca", False)):
        code, _, out = ends("seg", world.argv("seg", "--backbone", name))
        assert code == 0 and ("pre-trained with --window -1024 3071; these slices have another" in out) is noted
        assert ("pre-trained at HU -1024 to 3071, measured at -175 to 250" in out) is noted
        code, _, out = ends("svd", world.argv("svd", name))
        assert code == 0 and ("WARNING: phantom-author-moco: pre-trained with --window" in out) is noted
        assert ("measured at -175 to 250" in (world.out / "spectrum.csv").read_text()) is noted


def test_a_file_of_weights_has_the_window_of_the_run_beside_it(world, ends):
    """And another name, place or neighbour tells nothing, which is said."""
    weights = narrow.narrow_basic().state_dict()
    config = {"data": "phantom", "arch": ARCH, "init": "random", "window": [-1024, 3071]}
    for folder, name, told in (("theirs", "backbone.pth", config), ("alone", "backbone.pth", None),
                               ("odd", "backbone.pth", "{"), ("theirs", "other.pth", config)):
        path = world.root / folder / name
        path.parent.mkdir(exist_ok=True)
        torch.save(weights, path)
        if told:
            path.with_name("config.json").write_text(told if isinstance(told, str) else json.dumps(told))
        known = folder == "theirs" and name == "backbone.pth"
        row = f"{folder} {name[:5]}"
        code, lines, out = ends("seg", world.argv("seg", "--backbone", path, "--row", row))
        assert code == 0 and not lines and (f"WARNING: {path}: pre-trained with --window -1024 3071" in out) is known
        assert (f"note: {path}: a file, which does not tell the HU window and normalisation" in out) is not known
        table = (world.out / "report.md").read_text()
        marked = next(line for line in table.splitlines() if line.startswith(f"| 25 % | {row}"))
        assert ("**pre-trained at HU -1024 to 3071, measured at" in marked) is known
        assert ("does not tell the HU window" in marked) is not known
        code, _, out = ends("svd", world.argv("svd", path))
        assert code == 0 and ("WARNING" in out) is known and ("note:" in out) is not known
    world.run("phantom-mirror", config | {"window": [-175, 250], "normalisation": [[0.5] * 3, [0.5] * 3]},
              runs.load(world.out / "phantom-moco/checkpoint.pt"))
    code, _, out = ends("svd", world.argv("svd", "phantom-mirror"))
    assert code == 0 and "WARNING: phantom-mirror: pre-trained with another normalisation" in out


def test_no_steps_is_nothing_to_do(world, ends):
    before = world.files()
    code, lines, out = ends("ssl", world.argv("ssl", "--steps", 0))
    assert code == 0 and not lines and "nothing to do" in out and world.files() == before


def test_predictions_that_cannot_be_written_are_one_line(world, ends):
    (world.out / "seg/a/predictions").write_text("in the way")  # as root, no mode makes a folder read-only
    image = world.data / "BTCV/RawData/Training/img/img0001.nii.gz"
    before = world.files()
    code, lines, _ = ends("seg", ["--predict", image, "--run", "a", "--out", world.out])
    assert code == 1 and len(lines) == 1 and "predictions" in lines[0] and world.files() == before


def test_an_error_of_the_system_reaches_all_processes_as_one_line():
    with pytest.raises(BadInput, match="/nowhere: No such file or directory"):
        processes.on_main(True, Path("/nowhere").read_text)


def test_more_processes_than_gpus_are_refused_by_each_of_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for local in "01":
        monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(BadInput, match="2 processes on this machine for 1 GPUs"):
            processes.start()


def test_an_address_where_no_one_listens_is_one_line(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match="cannot be joined at 127.0.0.1:x"):
        processes.start()


# ------------------------------------------------------------------------------------------------------ backbones


def test_one_way_from_a_name_to_a_backbone(world, ends):
    folder = world.out / "phantom-moco"
    names = ["moco", "phantom-moco", folder, folder / "checkpoint.pt", Path("runs/phantom-moco/checkpoint.pt")]
    for name in names:
        assert backbones.resolve(str(name), world.out, True) == "phantom-moco"
        args = train_seg.parse(world.argv("seg", "--backbone", name))
        assert train_seg.choose_backbones(args, True) == ["phantom-moco"]
    code, _, out = ends("svd", world.argv("svd", *names[2:]))
    assert code == 0 and out.count("phantom-moco: effective rank") == 3
    elsewhere = world.root / "my.pt"
    elsewhere.write_bytes((folder / "checkpoint.pt").read_bytes())
    code, lines, _ = ends("svd", world.argv("svd", elsewhere))
    assert code == 1 and "my.pt: the checkpoint of a run; name that run's folder" in lines[-1]


class Evil:
    def __reduce__(self):
        return (os.system, ("touch ran",))


def test_imagenet_weights_are_those_of_their_hash_and_run_no_code(world, ends, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(world.root))
    cached = world.root / "hub/checkpoints/resnet18-f37072fd.pth"
    cached.parent.mkdir(parents=True)
    good = torchvision.models.resnet18(weights=None).state_dict()
    for content in (b"torn", pickle.dumps(Evil()), None):
        cached.write_bytes(content or b"")
        if content is None:  # any weights of that name
            torch.save(good, cached)
        before = world.files()
        calls = (("svd", "--positions"), ("ssl", "--init"), ("seg", "--backbone"))
        for name, flag in calls if content is None else calls[:1]:
            code, lines, _ = ends(name, world.argv(name, flag, "imagenet", "--arch", "resnet18"))
            assert code == 1 and len(lines) == 1 and f"{cached}: is damaged" in lines[0] and "delete it" in lines[0]
        assert world.files() == before and not Path("ran").exists()
    start = hashlib.sha256(cached.read_bytes()).hexdigest()[:8]
    url = f"https://download.pytorch.org/models/resnet18-{start}.pth"
    monkeypatch.setattr(backbones, "_imagenet_url", lambda arch: url)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, *_, **k: shutil.copy(cached, path))
    shutil.copy(cached, world.root / "mine.pth")
    for name in ("imagenet", world.root / "mine.pth"):  # a file with their content is they, in the tables too
        opened = backbones.open_backbone(str(name), world.out, "resnet18", 0, "fold", True)
        assert opened.name == "imagenet" and torch.equal(opened.net.conv1.weight, good["conv1.weight"])


@pytest.mark.parametrize("kind, says", [
    ("vit", "its names begin with 'blocks.', 'cls_token.'"), ("two", "under 'student.net.', 'teacher.net.'"),
    ("numbered", "under 'trunk.'"), ("prefix", "under 'trunk.'"), ("arch", "give --arch resnet34"),
    ("code", "it holds more than tensors; save its state_dict alone")])
def test_weights_of_other_projects_are_told_what_stands_in_the_way(tmp_path, kind, says):
    own = torchvision.models.resnet18(weights=None).state_dict()
    stages = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]
    told = {"vit": {"blocks.0.attn.qkv.weight": torch.ones(2), "cls_token": torch.ones(2)},
            "two": {"student": {f"net.{k}": v for k, v in own.items()}, "epoch": 3,
                    "teacher": {f"net.{k}": v for k, v in own.items()}},
            "numbered": {f"trunk.{stages.index(k.split('.')[0])}.{k.split('.', 1)[1]}": v for k, v in own.items()},
            "prefix": {f"trunk.{k}": v for k, v in own.items()},
            "arch": torchvision.models.resnet34(weights=None).state_dict(), "code": {"args": Evil()}}
    torch.save(told[kind], tmp_path / "x.pth")
    with pytest.raises(BadInput, match="x.pth: ") as caught:
        backbones.build_backbone(str(tmp_path / "x.pth"), "resnet18")
    assert says in str(caught.value) and ("--arch" in str(caught.value)) == (kind == "arch")


# ------------------------------------------------------------------------------------------------ files and names


def write(path: Path, seed: int, shape=(20, 16, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)
    nib.save(nib.Nifti1Image(data, np.diag([-1.5, -1.5, 5.0, 1.0])), path)


@pytest.mark.parametrize("what, says", [
    ("double", "gzip within gzip); gunzip it once"), ("pointer", "a Git LFS pointer in its place); fetch the file"),
    ("page", "a web page in its place); download it again"), ("zip", "a zip archive); unpack it")])
def test_what_is_saved_under_a_nifti_name_is_named(tmp_path, what, says):
    write(tmp_path / "a.nii.gz", 0)
    content = {"double": gzip.compress((tmp_path / "a.nii.gz").read_bytes()),
               "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
               "page": b"\n<!DOCTYPE html><html><body>Please log in</body></html>", "zip": b"PK\3\4" + bytes(400)}
    (tmp_path / "a.nii.gz").write_bytes(content[what])
    with pytest.raises(BadInput, match="a.nii.gz: not a NIfTI file") as caught:
        read_volume(tmp_path / "a.nii.gz")
    assert says in str(caught.value)


def test_btcv_without_labels_is_listed(tmp_path, ends):
    write(tmp_path / "B/img/img0001.nii.gz", 1)
    code, lines, out = ends("audit", ["audit", "--data", tmp_path / "B", "--store", tmp_path / "s"])
    assert code == 1 and not lines and "img0001.nii.gz: has no label" in out and "unusable: 1" in out
    assert "30 volumes, 3,017 slices; by our inference" in out and not (tmp_path / "s").exists()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that cannot be read, by root either")
def test_one_unreadable_file_may_be_left_out(tmp_path, ends):
    for i in range(3):
        write(tmp_path / f"A/scan{i}.nii.gz", i)
    (tmp_path / "A/scan7.nii.gz").symlink_to("/proc/self/mem")
    argv = ["prepare", "--data", tmp_path / "A", "--store", tmp_path / "s", "--size", 16]
    code, lines, _ = ends("prepare", argv)
    assert code == 1 and "scan7.nii.gz: cannot be read" in lines[-1] and len(lines) == 1
    for _ in range(2):
        code, lines, out = ends("prepare", [*argv, "--skip-bad"])
        assert code == 0 and "3 volumes, 12 slices" in out and "unusable: 1" in out and not lines
    assert ends("audit", ["audit", *argv[1:5], "--skip-bad"])[0] == 0
    for index in (tmp_path / "s").rglob("index.json"):  # and a damaged list of a store is made again, or told
        index.write_text("")
    assert "index.json: damaged" in ends("audit", ["audit", *argv[1:5], "--verify"])[1][0]
    assert ends("prepare", [*argv, "--skip-bad"])[0] == 0


def test_names_of_any_bytes(world, ends):
    odd = os.fsdecode(b"scan\xff\n\x1b[1m")
    write(world.root / f"A/{odd}.nii.gz", 0)
    write(world.root / "A/good.nii.gz", 1)
    store = ("--data", world.root / "A", "--store", world.root / "s")
    code, lines, out = ends("prepare", ["prepare", *store, "--size", 16])
    assert code == 0 and not lines and "2 volumes" in out
    code, _, out = ends("audit", ["audit", *store])
    assert code == 0 and "2 volumes" in out
    (world.root / f"A/{odd}.nii.gz").write_bytes(b"")
    code, lines, _ = ends("prepare", ["prepare", *store, "--size", 16])
    assert code == 1 and r"scan\udcff\n\x1b[1m.nii.gz: empty file" in lines[-1]
    ends("audit", ["audit", *store])
    image = world.root / f"{odd}.nii.gz"
    image.write_bytes((world.data / "BTCV/RawData/Training/img/img0001.nii.gz").read_bytes())
    code, lines, _ = ends("seg", ["--predict", image, "--run", "a", "--out", world.out])
    assert code == 0 and (world.out / f"seg/a/predictions/{odd}.nii.gz").exists()
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), world.root / f"{odd}.pth")
    code, lines, _ = ends("svd", world.argv("svd", world.root / f"{odd}.pth", "--arch", "resnet18"))
    assert code == 0 and b"scan\xff" in (world.out / "spectrum.csv").read_bytes()
    config = {"data": "phantom", "slices": 120, "split": "25", "protocol": "linear-frozen", "organs": [0.5] * 13}
    runs.append(world.out / "results.jsonl", [config | {"backbone": odd, "draw": d, "mDS": 0.5} for d in (0, 1)])
    code, _, _ = ends("seg", ["--report", "--out", world.out])
    assert code == 0 and b"\xff" in (world.out / "report.md").read_bytes()


# ---------------------------------------------------------------------------------- pictures, streams and signals


@pytest.mark.pictures
@pytest.mark.parametrize("error", [ZeroDivisionError("bug"), MemoryError(), ValueError("a\nb"), OSError(28, "full")])
def test_a_picture_that_cannot_be_drawn_ends_nothing(world, ends, monkeypatch, error):
    def draw(path, *rest):
        raise error

    figures._tell_once.cache_clear()
    monkeypatch.setattr(figures, "spectrum", draw)
    code, lines, out = ends("svd", world.argv("svd", "random"))
    assert code == 0 and len(lines) == 1 and "spectrum.png: not drawn" in lines[0]
    assert "spectrum.csv: " in out and "spectrum.png" not in out and (world.out / "spectrum.csv").exists()


@pytest.mark.pictures
def test_half_a_picture_is_not_left(tmp_path, monkeypatch, capsys):
    import matplotlib.figure

    def half(self, file, **more):
        Path(file if isinstance(file, str | Path) else file.name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", half)
    figures._tell_once.cache_clear()
    assert not figures.attempt(figures.contact_sheet, tmp_path / "x.png", [np.zeros((9, 9), np.uint8)], ["a"])
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())
    assert not matplotlib.pyplot.get_fignums()


def test_stdout_in_ascii(world, monkeypatch):
    told = {"data": "phantom", "slices": 120, "split": "25", "protocol": "linear-frozen", "organs": [0.5] * 13}
    runs.append(world.out / "results.jsonl", [told | {"backbone": "mäßig", "draw": d, "mDS": 0.5} for d in (0, 1)])
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    monkeypatch.setattr(figures, "attempt", lambda *_: False)
    train_seg.main(["--report", "--out", str(world.out)])
    ascii_only.flush()
    assert rb"m\xe4\xdfig" in (printed := ascii_only.buffer.getvalue()) and b"50.00 +- 0.00" in printed


def start(*argv: object, **more) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", *map(str, argv)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, **{"stdout": subprocess.PIPE, **more})


def test_a_reader_that_goes_away_ends_nothing(tmp_path):
    write(tmp_path / "A/scan.nii.gz", 0)
    store = ("--data", tmp_path / "A", "--store", tmp_path / "s")
    begun = [start("ct.prepare", what, *store) for what in ("prepare", "audit")]
    for process in begun:
        process.stdout.close()
    assert [(p.wait(60), p.stderr.read()) for p in begun] == [(0, "")] * 2
    assert list((tmp_path / "s").glob("*/index.json"))
    with open("/dev/full", "w") as full:  # where someone would miss what was printed, it is told
        process = start("ct.prepare", "audit", *store, stdout=full)
        told = process.stderr.read().splitlines()
    assert process.wait(60) == 1 and len(told) == 1 and "No space left" in told[0]


# Says that it is there, waits, and then prints line after line in every way that commands have.
TALKER = """
import os, pathlib, sys, warnings
from tqdm import tqdm
from ct.command import command
@command
def main(argv):
    bar = tqdm(total=9, mininterval=0)
    print("here", flush=True)
    os.read(0, 1)
    for i in range(9):
        print("a line " * 1000, flush=bool(i % 2))
        print("another", file=sys.stderr)
        bar.update(), tqdm.write("beside the bar"), warnings.warn(f"{i}")
    bar.close()
    pathlib.Path(sys.argv[1]).touch()
main()
"""


def talker(done: Path, **streams) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", TALKER, done], cwd=ROOT, start_new_session=True,
                            stdin=subprocess.PIPE, **streams)


def test_a_terminal_that_is_closed_ends_nothing(tmp_path):
    """As after `python ... & disown` and closing it: each write fails with EIO, and the work goes on."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # tqdm draws nothing where there is no place
    process = talker(tmp_path / "done", stdout=theirs, stderr=theirs)
    os.close(theirs)
    told = b""
    while b"here" not in told:
        told += os.read(ours, 1000)
    assert b"0/9" in told  # a bar, as in a terminal
    os.close(ours)
    process.communicate(b"x", timeout=60)
    assert process.returncode == 0 and (tmp_path / "done").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only under Linux")
@pytest.mark.parametrize("full", ["stdout", "stderr", "both"])
def test_a_full_disk_for_what_is_printed_ends_nothing_and_is_told_in_the_end(tmp_path, full):
    with open("/dev/full", "w") as device:
        streams = {name: device if full in (name, "both") else subprocess.PIPE for name in ("stdout", "stderr")}
        process = talker(tmp_path / "done", **streams)
        out, err = process.communicate(b"x", timeout=60)
    assert (tmp_path / "done").exists() and process.returncode == (0 if full == "stderr" else 1)
    if full == "stdout":
        assert err.decode().splitlines()[-1] == "-c: No space left on device"
    if full == "stderr":
        assert out.count(b"a line") == 9000


def test_what_a_command_ends_with_is_not_hidden_by_what_it_could_not_print():
    for raised, code in ((SystemExit(143), 143), (BadInput("damaged"), 1), (SystemExit(0), 1), (None, 1)):
        def main(argv, raised=raised):
            print("lost")
            if raised:
                raise raised

        class Full(io.StringIO):
            def write(self, text):
                raise OSError(28, "No space left on device")

        with contextlib.redirect_stdout(Full()), contextlib.redirect_stderr(io.StringIO()) as told, pytest.raises(
                SystemExit) as caught:
            command.command(main)([])
        assert caught.value.code == code
        assert ("damaged" if isinstance(raised, BadInput) else "No space" * (code == 1)) in told.getvalue()


@pytest.mark.parametrize("what", ["prepare", "audit", "phantom"])
def test_ctrl_c_is_one_line(tmp_path, what):
    write(tmp_path / "A/scan000.nii", 0, (200, 200, 40))
    for i in range(1, 200):
        os.link(tmp_path / "A/scan000.nii", tmp_path / f"A/scan{i:03d}.nii")
    store = ("--data", tmp_path / "A", "--store", tmp_path / "s", "--workers", 2)
    process = start("ct.phantom", "--out", tmp_path / "p") if what == "phantom" else start("ct.prepare", what, *store)
    children, end = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.monotonic() + 30
    while len(children.read_text().split()) < 2 and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(0.1)  # the workers are at work
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and len(told.splitlines()) == 1 and "interrupted" in told, told
    assert not [p for p in tmp_path.rglob(".*") if p.name != ".lock"]  # nothing half-written
    if what == "prepare":  # and nothing lost: what was done stays done
        assert len(list((tmp_path / "s/pretrain-512").glob("*.npy"))) == len(
            list((tmp_path / "s/pretrain-512").glob("scan*.json")))


# ------------------------------------------------------------------------------------------------ where it is run


def test_windows_is_told_at_import():
    code = "import sys; sys.platform = 'win32'; import ct.prepare"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr == "this runs on Linux and macOS; on Windows, in WSL\n"


# In torch's place: it tells whether the project is importable, and drops an exception, as C code does that imports
SLOW = """
import importlib.util, os, pathlib, time
found = all(map(importlib.util.find_spec, ("moco", "engine", "ct")))
pathlib.Path(os.environ["READY"]).write_text(str(found))
try:
    time.sleep(60)
except BaseException:
    pass
"""


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    """Of each command; scripts also find the project where PYTHONSAFEPATH keeps their folder from the path."""
    (tmp_path / "torch.py").write_text(SLOW)
    calls = [["train_ssl.py"], ["train_seg.py"], ["svd_spectrum.py"], ["datasets.py"], ["-m", "tools.study"]]
    begun = []
    for i, call in enumerate(calls):
        more = {"PYTHONPATH": str(tmp_path), "READY": str(tmp_path / f"{i}")}
        if call[0] != "-m":
            more["PYTHONSAFEPATH"] = "1"
        begun.append(subprocess.Popen([sys.executable, *call], cwd=ROOT, env=os.environ | more, stderr=subprocess.PIPE,
                                      text=True, start_new_session=True))
    end = time.monotonic() + 60
    while len(list(tmp_path.glob("[0-9]"))) < len(calls) and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.05)
    for process, call in zip(begun, calls, strict=True):
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
        name = call[-1].removeprefix("tools.").removesuffix(".py")
        assert process.returncode == 130 and told.splitlines() == [
            f"{name}.py: interrupted; the same command continues"], (call, told)
    assert {p.read_text() for p in tmp_path.glob("[0-9]")} == {"True"}


def test_importing_the_project_changes_no_signal(tmp_path):
    code = "import signal, ct, ct.command; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "True\n"


# /proc/self/cgroup, mounts (root, place, kind, options), files: the limits of a container as systems show them
V1 = [("/docker/ab", "/sys/fs/cgroup/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct"),
      ("/docker/ab", "/sys/fs/cgroup/memory", "cgroup", "rw,memory"), ("/", "/sys/fs/cgroup/unified", "cgroup2", "rw")]
V2 = [("/", "/sys/fs/cgroup", "cgroup2", "rw,nsdelegate")]
CPU_V1, MEMORY_V1 = "/sys/fs/cgroup/cpu,cpuacct/", "/sys/fs/cgroup/memory/"
GROUPS_V1 = "12:cpu,cpuacct:/docker/ab\n5:memory:/docker/ab\n4:cpuset:/\n0::/"
GB = 2**30
CONTAINERS = {
    "none": ("0::/", V2, {}, 96, None),
    "macOS": (None, V2, {"/sys/fs/cgroup/cpu.max": "100000 100000"}, 96, None),
    "v2": ("0::/", V2, {"/sys/fs/cgroup/cpu.max": "150000 100000\n", "/sys/fs/cgroup/memory.max": f"{GB}\n"}, 2, GB),
    "v2 without limits": ("0::/a", V2, {"/sys/fs/cgroup/a/cpu.max": "max 100000",
                                       "/sys/fs/cgroup/a/memory.max": "max"}, 96, None),
    "v2, Slurm's job above its step": ("0::/slurm/job_3/step_0", V2, {
        "/sys/fs/cgroup/slurm/job_3/step_0/cpu.max": "max 100000",
        "/sys/fs/cgroup/slurm/job_3/step_0/memory.max": f"{2 * GB}",
        "/sys/fs/cgroup/slurm/job_3/cpu.max": "400000 100000", "/sys/fs/cgroup/slurm/job_3/memory.max": f"{GB}",
        "/sys/fs/cgroup/slurm/cpu.max": "900000 100000", "/sys/fs/cgroup/other/cpu.max": "1000 100000"}, 4, GB),
    "v1, the host's paths": (GROUPS_V1, V1, {CPU_V1 + "cpu.cfs_quota_us": "50000",
                                            CPU_V1 + "cpu.cfs_period_us": "100000",
                                            MEMORY_V1 + "memory.limit_in_bytes": f"{GB}"}, 1, GB),
    "v1 without limits": (GROUPS_V1, V1, {CPU_V1 + "cpu.cfs_quota_us": "-1", CPU_V1 + "cpu.cfs_period_us": "100000",
                                         MEMORY_V1 + "memory.limit_in_bytes": "9223372036854771712"}, 96, None),
    "v1, a group of its own": (GROUPS_V1.replace("/docker/ab", "/docker/ab/c"), V1, {
        CPU_V1 + "c/cpu.cfs_quota_us": "300000", CPU_V1 + "c/cpu.cfs_period_us": "100000",
        CPU_V1 + "cpu.cfs_quota_us": "700000", CPU_V1 + "cpu.cfs_period_us": "100000",
        MEMORY_V1 + "c/memory.limit_in_bytes": f"{3 * GB}", MEMORY_V1 + "memory.limit_in_bytes": f"{GB}"}, 3, GB),
    "outside of what is mounted": ("0::/../elsewhere", V2, {"/sys/fs/cgroup/cpu.max": "200000 100000"}, 2, None)}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_containers_limits_are_what_counts(tmp_path, monkeypatch, name):
    groups, mounts, limits, cores, memory = CONTAINERS[name]
    mountinfo = [f"{31 + i} 23 0:{i} {root} {place} rw,relatime shared:{i} - {kind} none {options}\n"
                 for i, (root, place, kind, options) in enumerate([("/", "/", "ext4", "rw"), *mounts])]
    own = {"/proc/self/cgroup": f"{groups}\n", "/proc/self/mountinfo": "".join(mountinfo)}
    for file, text in (limits | (own if groups else {})).items():
        (tmp_path / file[1:]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file[1:]).write_text(text)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert physical > GB
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(96)), raising=False)
    assert command.cores() == cores
    assert processes.memory(torch.device("cpu")) == (memory or physical)
    # threads, too, but for a number that was asked for
    told = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 48)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    for asked in (True, False):
        monkeypatch.setenv("OMP_NUM_THREADS", "48") if asked else monkeypatch.delenv("OMP_NUM_THREADS")
        processes.start()
    assert told == ([cores] if cores < 48 else [])


def test_torchrun_starts_in_a_folder_with_a_space(tmp_path):
    """The Makefile's own recipe, with stand-ins for what it would install."""
    clone = tmp_path / "a clone"
    (clone / ".venv/bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        (clone / name).write_bytes((ROOT / name).read_bytes())
    python = clone / ".venv/bin/python"
    python.write_text('#!/bin/sh\nfor a in "$@"; do echo "<$a>"; done\n')
    python.chmod(0o755)
    subprocess.run(["make", "-s", "setup", "PYTHON=true"], cwd=clone, check=True, capture_output=True)
    torchrun = clone / ".venv/bin/torchrun"
    told = subprocess.run([torchrun, "train ssl.py", "--local"], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == [f"<{torchrun}>", "<train ssl.py>", "<--local>"]
    assert "run.main()" in torchrun.read_text() and compile(torchrun.read_text(), "torchrun", "exec")


def test_make_paper_plans_or_says_in_one_line_what_is_wrong(made, tmp_path, monkeypatch, capsys, refusal):
    folder = str(made.data / "AbdomenCT-1K")
    settings = {"PLAN": "1", "SSL": folder, "SEG": folder, "OUT": str(made.out)}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    paper.main([])
    told = capsys.readouterr()
    assert "pre-train phantom-moco-local-zca: to do" in told.out and not told.err
    for wrong in (tmp_path, tmp_path / "nowhere"):
        for name, value in (settings | {"SSL": str(wrong), "SEG": str(wrong)}).items():
            monkeypatch.setenv(name, value)
        assert str(wrong) in refusal(paper.main, [])


def test_exit_codes_are_those_of_the_docstring(monkeypatch, capsys):
    for error, code in ((BadInput("a\nb"), 1), (FileNotFoundError(2, "No such file", "x"), 1),
                        (KeyboardInterrupt(), 130), (torch.OutOfMemoryError("CUDA out of memory"), 1)):
        @launch.command
        def main(argv, error=error):
            raise error

        with pytest.raises(SystemExit) as caught:
            main([])
        assert caught.value.code == code and capsys.readouterr().err.count("\n") == 1
    assert prepare.main.__wrapped__ is not None  # the commands of ct too


def test_a_stream_opened_as_a_file_may_have_become_a_pipe(tmp_path):
    """As in a process that was forked with its output redirected: what is printed must not depend on the position."""
    code = ("import os; from ct.command import command; read, write = os.pipe(); os.dup2(write, 1); "
            "command(lambda argv: print('here'))([]); os.close(1); os.close(write); "
            "assert os.read(read, 99) == b'here\\n'")
    with open(tmp_path / "out", "w") as out:
        print("something before", file=out, flush=True)
        done = subprocess.run([sys.executable, "-c", code], stdout=out, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert "Error" not in done.stderr and done.returncode in (0, 120), done.stderr
