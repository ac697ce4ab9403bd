"""leaks.py: whether a validation volume was seen before, said at the start, in the result and beside the number."""

import copy
import json
import shutil

import nibabel as nib
import numpy as np
import pytest

import datasets
import train_seg
import train_ssl
from ct import phantom
from ct.phantom_layouts import places
from ct.tasks import BTCV
from engine import leaks, report

SHAPE = (4, 64, 64)

pytestmark = pytest.mark.usefixtures("small_networks")


@pytest.fixture(scope="module")
def labelled(small_phantom):
    """The store of the phantom's labelled patients."""
    return datasets.prepare(small_phantom / "BTCV", small_phantom.parent / "leaks", "segment")


def command(small_phantom, out, *more):
    return [str(a) for a in ("--data", small_phantom / "BTCV", "--out", out, "--amp", "off", *more)]


def slices_of(small_phantom, case):
    return nib.load(small_phantom / "BTCV/RawData/Training/img" / f"img{case}.nii.gz").shape


def test_pretrained_on_the_validation_cases(small_phantom, labelled, tmp_path, capsys):
    """At another size and window, on volumes that are cut in z and padded; the start of a run counts, too."""
    seen = tmp_path / "CT"
    for i, path in enumerate(sorted((small_phantom / "BTCV").rglob("img*.gz"))):
        image = nib.load(path)
        hu = np.asarray(image.dataobj)
        axis = int(np.argmin(hu.shape))  # z
        hu = np.pad(hu, 5, constant_values=-1024) if i % 2 else hu.take(range(hu.shape[axis] - 1), axis)
        seen.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(hu, image.affine, image.header), seen / f"Case_{i:05d}_0000.nii.gz")
    flags = ("--image-size", 64, "--batch-size", 8, "--bn-group", 4, "--queue", 8, "--steps", 1, "--arch",
             "resnet_basic")
    train_ssl.main(command(small_phantom, tmp_path, *flags, "--data", seen, "--store", tmp_path / "a", "--init",
                           "random", "--name", "first", "--size", 80, "--window", -160, 240))
    leaks.keep(tmp_path / run_folder(tmp_path / "second"), datasets.prepare(
        small_phantom / "AbdomenCT-1K", tmp_path / "b", "pretrain", size=48), "first", tmp_path)  # that started from it
    capsys.readouterr()
    for name in ("first", "second"):
        found = leaks.find(labelled, BTCV.cases("12.5"), name, tmp_path)
        assert found["training"] == {} and set(found["pretraining"]) == set(BTCV.cases("val"))
        assert "sources" not in found or not found["sources"]
        for case, told in found["pretraining"].items():
            number = [p.name for p in sorted((small_phantom / "BTCV").rglob("img*.gz"))].index(f"img{case}.nii.gz")
            depth = min(slices_of(small_phantom, case))
            shared = depth if number % 2 else depth - 1
            assert told == f"Case_{number:05d}{' of first' * (name == 'second')}, {shared} of {depth} slices"
    train_seg.main(command(small_phantom, tmp_path, "--store", small_phantom.parent / "leaks", "--backbone", "first",
                           "--split", "12.5", "--draw", 0, "--protocol", "linear-frozen", "--iterations", 1,
                           "--crop-size", 64, "--batch-size", 2, "--no-whole-slices"))
    told = capsys.readouterr().out
    assert "first: its pre-training saw 6 of the 6 validation volumes: 0035 is Case_" in told[: told.index("mDS")]
    assert "(its pre-training saw 6 of 6 validation volumes" in told  # beside the result
    result = json.loads((tmp_path / "seg/first-linear-frozen-12.5-0/result.json").read_text())
    assert result["leaks"] == leaks.find(labelled, result["cases"], "first", tmp_path)
    assert leaks.marks(result) == ["**its pre-training saw 6 of 6 validation volumes**"]


def run_folder(folder, **config):
    """A pre-training's folder of an older commit: no seen.json, the checksums of whole volumes in config.json."""
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(b"")
    (folder / "config.json").write_text(json.dumps(config))
    return folder.name


def test_what_is_not_known_is_not_called_clean(small_phantom, labelled, tmp_path):
    """Old runs have checksums of whole stored volumes: equal where those are square and of the store's size."""
    cases = BTCV.cases("val")
    same = datasets.prepare(small_phantom / "BTCV", tmp_path / "s", "pretrain", size=64)
    other = datasets.prepare(small_phantom / "BTCV", tmp_path / "s", "pretrain", size=48)
    old = run_folder(tmp_path / "old", store=same.contents())
    found = leaks.find(labelled, [], old, tmp_path)
    assert found["pretraining"] == {case: f"{case}, the whole volume" for case in cases}
    unlike = run_folder(tmp_path / "unlike", store=other.contents())
    assert leaks.find(labelled, [], unlike, tmp_path)["pretraining"] is None
    assert "cannot be said" in leaks.lines(leaks.find(labelled, [], unlike, tmp_path), unlike)[0]
    leaks.keep(tmp_path / "unlike", other, "random", tmp_path)  # its command given again
    assert set(leaks.find(labelled, [], unlike, tmp_path)["pretraining"]) == set(cases)
    # its backbone.pth, named as a file, is the same; another file is not known
    (tmp_path / "unlike" / "backbone.pth").write_bytes(b"")
    by_file = leaks.find(labelled, [], str(tmp_path / "unlike" / "backbone.pth"), tmp_path)
    assert set(by_file["pretraining"]) == set(cases)
    assert leaks.find(labelled, [], str(tmp_path / "mine.pth"), tmp_path)["pretraining"] is None
    # clean: nothing is said
    for clean in ("random", "imagenet", run_folder(tmp_path / "clean")):
        if clean == "clean":
            leaks.keep(tmp_path / clean, datasets.prepare(small_phantom / "AbdomenCT-1K", tmp_path / "c", "pretrain",
                                                          size=48), "random", tmp_path)
        found = leaks.find(labelled, BTCV.cases("100"), clean, tmp_path)
        assert found["pretraining"] == found["training"] == {} and leaks.lines(found, clean) == []
        assert leaks.marks({"leaks": found}) == []
    assert leaks.marks({}) == []  # a result of an older commit


def test_volumes_without_checksums_of_slices_go_by_those_of_their_voxels(small_phantom, labelled, tmp_path):
    """As older stores have them: a volume under two ids is found, one that cannot be compared is not clean."""
    seen, old = run_folder(tmp_path / "seen"), copy.copy(labelled)
    leaks.keep(tmp_path / seen, datasets.prepare(small_phantom / "AbdomenCT-1K", tmp_path / "c", "pretrain", size=48),
               "random", tmp_path)
    old.volumes = copy.deepcopy(labelled.volumes)
    records = {v["id"]: v for v in old.volumes}
    del records["0035"]["slice_sums"]
    found = leaks.find(old, BTCV.cases("100"), seen, tmp_path)
    assert found["training"] == {} and found["pretraining"] is None
    twin, own = records[BTCV.cases("100")[0]], records["0035"]
    twin["checksums"] = dict(zip(twin["checksums"], own["checksums"].values(), strict=True))
    assert leaks.find(old, BTCV.cases("100"), seen, tmp_path)["training"] == {"0035": f"{twin['id']}, the whole volume"}


def test_by_its_sources(labelled, tmp_path, monkeypatch):
    """MSD Spleen after AbdomenCT-1K, with no slice in both: said, and marked."""
    name = run_folder(tmp_path / "run", store={f"Case_{i:05d}": f"{i:08x}" for i in range(1, 9)})
    monkeypatch.setattr(labelled, "data", str(tmp_path / "Task09_Spleen"))
    (tmp_path / "Task09_Spleen").mkdir()
    found = leaks.find(labelled, [], name, tmp_path)
    assert "by its sources holds MSD Spleen" in leaks.lines(found, name)[0]
    assert leaks.marks({"leaks": found}) == ["**pre-trained on AbdomenCT-1K, which by its sources holds MSD Spleen**"]
    assert leaks.marks({"leaks": leaks.find(labelled, [], "random", tmp_path)}) == []


def test_one_ct_under_two_ids_on_both_sides_of_the_split(tmp_path, capsys):
    data = tmp_path / "Task60"
    phantom.write(data, labelled=5, unlabelled=0, shape=SHAPE, layout="msd")
    content = json.loads((data / "dataset.json").read_text())
    twin = [data / part / "0041.nii.gz" for part in ("imagesTr", "labelsTr")]
    for path, old in zip(twin, places("msd", data, 2), strict=True):
        shutil.copy(old, path)
    content["training"].append({"image": "imagesTr/0041.nii.gz", "label": "labelsTr/0041.nii.gz"})
    (data / "dataset.json").write_text(json.dumps(content))
    (tmp_path / "val").write_text("0041\n0003\n")
    train_seg.main(command(tmp_path, tmp_path, "--data", data, "--store", tmp_path / "s", "--backbone", "random",
                           "--split", "100", "--protocol", "linear-frozen", "--iterations", 1, "--crop-size", 64,
                           "--batch-size", 2, "--arch", "resnet_basic", "--val-cases", tmp_path / "val",
                           "--no-whole-slices"))
    told, depth = capsys.readouterr().out, min(nib.load(twin[0]).shape)
    line = f"1 of the 2 validation volumes are among those to train on, under another id: 0041 is 0002, {depth} of"
    assert line in told[: told.index("mDS")]
    assert "Random weights (its head was trained on 1 of 2 validation volumes): linear-frozen" in told
    result = json.loads((tmp_path / "seg/random-linear-frozen-100-0-task60/result.json").read_text())
    assert result["leaks"] == {"validation": 2, "pretraining": {},
                               "training": {"0041": f"0002, {depth} of {depth} slices"}}
    assert report.remarks_on(result)[0] == "**its head was trained on 1 of 2 validation volumes**"
