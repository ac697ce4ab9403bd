"""intake.py, and what of it every command shows: what is left out, what is refused, what is told."""

import os
import shutil

import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage

import datasets
import svd_spectrum
import train_seg
import train_ssl
from ct import audit, intake, maps, prepare, reading, volumes
from ct.command import counted
from ct.volumes import BadInput
from engine import predict

LPS = np.diag([-1.5, -1.5, 5.0, 1.0])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The default store and --out lie below the folder that a command is started in."""
    monkeypatch.chdir(tmp_path)


def ct(shape=(20, 16, 4), seed=0):
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def save(path, data=None, affine=LPS, **fields):
    """A NIfTI file with these fields of its header, whatever they contradict."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(ct() if data is None else data, affine), plain := path.with_name("plain.nii"))
    raw = bytearray(plain.read_bytes())
    for name, value in fields.items():
        at, kind = {"slope": (112, "<f4"), "codes": (252, "<i2"), "pixdim": (80, "<f4"), "quatern": (256, "<f4"),
                    "srow": (280, "<f4")}[name]
        value = np.array(value, kind).tobytes()
        raw[at : at + len(value)] = value
    plain.unlink()
    path.write_bytes(raw)  # unzipped: by content, a .gz in the name is no matter


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


# ------------------------------------------------------------------------------------------------------ by its names


LAYOUTS = {
    "TotalSegmentator": (["s0000/ct.nii.gz", "s0001/ct.nii.gz"], ["s0000/segmentations/liver.nii.gz",
                                                                  "s0001/segmentations/spleen.nii.gz"]),
    "AbdomenCT-1K without _0000": (["images/Case_00000.nii.gz"], ["Mask/Case_00000.nii.gz"]),
    "AbdomenCT-1K": (["Case_00001_0000.nii.gz", "scan.nii"], ["Case_00001.nii.gz"]),
    "MSD": (["imagesTr/liver_1.nii.gz", "imagesTs/liver_7.nii.gz"], ["labelsTr/liver_1.nii.gz"]),
    "KiTS": (["case_00000/imaging.nii.gz"], ["case_00000/segmentation.nii.gz"]),
    "LiTS": (["volume-0.nii"], ["segmentation-0.nii"]),
    "SegTHOR": (["Patient_01/Patient_01.nii.gz"], ["Patient_01/GT.nii.gz"]),
    "RibFrac": (["RibFrac1-image.nii.gz"], ["RibFrac1-label.nii.gz"]),
    "endings": (["a.nii"], ["a_seg.nii", "a_label.nii", "a_labels2.nii", "a_mask.nii.gz", "liverMask.nii",
                              "A-SEG.NII"]),
    "folders": (["x/a.nii"], ["Labels/a.nii", "label/b.nii", "MASKS/c.nii", "Ground Truth/d.nii", "pseudo-labels/e.nii",
                              "Mask_cleaned/f.nii", "deep/labelsVal/g.nii"]),
    "images below": (["liver segmentation/imagesTr/a.nii"], ["liver segmentation/labelsTr/a.nii"]),
    "no labels": (["unlabelled/a.nii", "Segert/b.nii", "masked_ct.nii", "gta.nii", "TotalSegmentator/ct.nii"], []),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_and_folders_that_name_labels_are_left_out_and_listed(tmp_path, layout):
    images, labels = LAYOUTS[layout]
    touch(tmp_path / "D", *images, *labels)
    found, skipped = intake.find_volumes(tmp_path / "D", "pretrain")
    assert sorted(str(v["image"].relative_to(tmp_path / "D")) for v in found) == sorted(images)
    assert sorted(s["file"] for s in skipped) == sorted(str(tmp_path / "D" / name) for name in labels)
    assert all(s["no_image"] for s in skipped)


def mask(seed=0):
    return np.random.default_rng(seed).integers(0, 3, (20, 16, 4)).astype(np.uint8)


UNSURE = {  # files that are CT, files that are none
    "ids of a centre": (["CT0001.nii.gz", "GT0002.nii.gz", "SEG-0003.nii.gz", "MSK_0004.nii.gz"], []),
    "all of them": (["GT0001.nii", "GT0002.nii"], []), "a study": (["Segmentation study 2021/a.nii", "b.nii"], []),
    "alone": (["Segmentation study 2021/p1/a.nii", "Segmentation study 2021/p2/a.nii"], []),
    "both": (["SEG-0003.nii", "a.nii", "c.nii"], ["a_seg.nii", "c-seg.nii", "SEG-0005.nii"]),
    "two centres, the same numbers": (["CT0001.nii", "GT0001.nii", "CT0002.nii", "GT0002.nii"], []),
    "truth of two": (["CT0001.nii", "CT0002.nii"], ["GT0001.nii", "GT0002.nii"]),
    "a folder that holds CT": (["gt/a.nii", "other/b.nii"], ["labels/b.nii"]),
    "no partner": (["x/a.nii"], ["y/b_mask.nii", "Mask_cleaned/c.nii", "pseudo-labels/d.nii"]),
    "AbdomenCT-1K without _0000": (["Case_00001_0000.nii", "Case_00002.nii"], ["Case_00001.nii"]),
    "called maps": (["dist/p1_distal.nii", "dose.nii", "prob_0001.nii"], [])}


@pytest.mark.parametrize("what", UNSURE)
def test_where_a_name_is_unsure_the_voxels_decide(tmp_path, what):
    images, labels = UNSURE[what]
    for name in images + labels:
        save(tmp_path / "D" / name, ct(seed=images.index(name)) if name in images else mask())
    found, skipped = intake.find_volumes(tmp_path / "D", "pretrain")
    assert sorted(str(v["image"].relative_to(tmp_path / "D")) for v in found) == sorted(images)
    left_out = [s for s in skipped if not s.get("odd")]
    assert sorted(s["file"] for s in left_out) == sorted(str(tmp_path / "D" / name) for name in labels)
    assert all(s["no_image"] for s in skipped)
    store = datasets.prepare(tmp_path / "D", tmp_path / "s", "pretrain", size=20)
    told = "".join(audit.remarks(store.volumes, store.skipped))
    odd = len(skipped) - len(left_out)  # what is used in spite of its name
    assert (f"warnings: {odd} " in told) == (odd > 0)
    assert (f"by their names: {len(labels)} " in told) == (len(labels) > 0)


def smooth(what, shape=(96, 96, 12)):
    rng = np.random.default_rng(4)
    organ = scipy.ndimage.gaussian_filter(rng.normal(size=shape), 14) > 0
    outside, inside = (scipy.ndimage.distance_transform_edt(x, sampling=(8, 8, 8)) for x in (organ, ~organ))
    blobs = scipy.ndimage.gaussian_filter(rng.normal(size=shape), 14)
    return {"signed distance": outside - inside, "integers": (outside - inside).round(),
            "dose": 7000 * (blobs - blobs.min()) / np.ptp(blobs), "blocks": 10.0 * np.kron(rng.integers(
                -80, 80, (12, 12, 3)), np.ones((8, 8, 4)))}[what].astype(np.float32)


@pytest.mark.parametrize("what", ["signed distance", "integers", "dose", "blocks"])
def test_distances_and_doses_are_no_ct(tmp_path, what):
    """By their name and voxels left out, by their voxels alone refused; their values alone could be those of a CT."""
    save(tmp_path / "D/a.nii", ct((96, 96, 12)))
    data = smooth(what)
    for name in ("a_dist.nii", "dose/a.nii", "RTDOSE0001.nii", "b-sdf.nii"):
        save(tmp_path / "D" / name, data)
    found, skipped = intake.find_volumes(tmp_path / "D", "pretrain")
    assert [v["id"] for v in found] == ["a"] and {s["reason"] for s in skipped} == {intake.BY_VOXELS}
    save(tmp_path / "D/b.nii", data)
    with pytest.raises(BadInput, match="b.nii: no CT by its voxels, as smooth as a distance, a dose or a label map"):
        reading.read_ct(tmp_path / "D/b.nii", prepare.WINDOW)


def test_turns_are_the_peaks_and_troughs_of_rows():
    rows = np.random.default_rng(1).integers(0, 4, (5, 3, 40)) * 7.5 - 100
    def share(some):
        moving = turning = 0
        for row in some.reshape(15, -1).tolist():
            for a, b, c in zip(row, row[1:], row[2:], strict=False):
                moving += not a == b == c
                turning += a < b > c or a > b < c
        return turning / moving

    assert maps.turns(rows) == max(share(rows), share(rows[..., ::2])) and maps.turns(np.zeros((2, 9))) == 0
    assert maps.turns(rows.repeat(2, -1)) == share(rows) > 0.3  # doubled by nearest neighbour


def test_real_ct_and_the_phantom_have_more_turns_than_any_map(real_ct, small_phantom):
    """Of the volumes that are clipped to 0..255 and of those in true HU, the least of all is told in maps.TURNS."""
    images = [*real_ct.glob("AbdomenCT-1K/*")][:20] + [*real_ct.glob("nifti/*ct*.nii.gz")]
    images = [p for p in images if "label" not in p.name] + [*small_phantom.rglob("img00*.nii.gz")][:3]
    for path in images:
        assert maps.shows_ct(path) and maps.turns(volumes.read_volume(path).stored) > 2 * maps.TURNS, path
    for path in [label := real_ct / "nifti/example_ct_sm_label.nii.gz", *small_phantom.rglob("label000*")]:
        assert maps.shows_ct(path) is False, path
    assert maps.turns(volumes.read_volume(label).stored) < maps.TURNS


def test_what_is_read_to_decide_on_a_name_is_its_first_planes(tmp_path, monkeypatch):
    planes = np.zeros((64, 64, 40), np.int16)
    planes[..., 3:] = ct((64, 64, 37))
    nib.save(nib.Nifti1Image(planes, LPS), tmp_path / "GT1.nii.gz")
    (tmp_path / "GT1.nii.gz").write_bytes((tmp_path / "GT1.nii.gz").read_bytes()[:40000])  # the rest is not needed
    assert maps.shows_ct(tmp_path / "GT1.nii.gz") is True
    (tmp_path / "GT1.nii.gz").write_bytes((tmp_path / "GT1.nii.gz").read_bytes()[:400])
    assert maps.shows_ct(tmp_path / "GT1.nii.gz") is None


IMAGES = {"GT*": ["GT0002.nii.gz", "deep/GT1.nii"], "deep/*,a.nii": ["a.nii", "deep/GT1.nii", "deep/c_seg.nii"],
          "*.nii": ["a.nii", "a_dist.nii", "deep/GT1.nii", "deep/c_seg.nii"], "*_dist.nii": ["a_dist.nii"]}


@pytest.mark.parametrize("patterns", IMAGES)
def test_a_flag_says_which_files_are_the_images(tmp_path, patterns, capsys, refusal):
    for name in ("GT0002.nii.gz", "deep/GT1.nii", "a.nii", "a_dist.nii", "deep/c_seg.nii"):
        save(tmp_path / "D" / name, ct(seed=len(name)))
    flags = ["--data", str(tmp_path / "D"), "--images", patterns]
    datasets.main(["audit", *flags])
    told = capsys.readouterr().out
    number = len(IMAGES[patterns])
    assert f"{counted(number, 'volume')}, " in told and f"by its name: {5 - number}\n" in told
    store = datasets.prepare(tmp_path / "D", tmp_path / "s", "pretrain", size=20, images=patterns.split(","))
    assert sorted(v["file"] for v in store.volumes) == [str(tmp_path / "D" / name) for name in IMAGES[patterns]]
    paths, _ = predict.find_volumes(tmp_path / "D", patterns.split(","))
    assert sorted(paths.values()) == [tmp_path / "D" / name for name in IMAGES[patterns]]
    assert f"--images x*: matches no .nii or .nii.gz file in {tmp_path / 'D'}" in refusal(
        train_ssl.main, ["--data", tmp_path / "D", "--images", "x*", "--init", "random"])
    assert "--images needs --kind pretrain" in refusal(datasets.main, ["prepare", "--kind", "segment", *flags])


def test_many_labels_of_a_folder_are_listed_by_their_folder(tmp_path, capsys):
    save(tmp_path / "D/s0/ct.nii.gz")
    touch(tmp_path / "D/s0", *(f"segmentations/rib_{i}.nii.gz" for i in range(24)), "segmentations_old/a.nii")
    datasets.main(["audit", "--data", str(tmp_path / "D")])
    listed = capsys.readouterr().out.partition("no image by its name: 25\n")[2].splitlines()
    assert len(listed) == 2 and "s0/segmentations: 24 files, each a label map by its name (rib_0.nii.gz" in listed[0]
    assert "segmentations_old/a.nii: a label map" in listed[1]


def test_labels_alone_are_no_volumes(tmp_path):
    touch(tmp_path / "D", "labelsTr/a.nii.gz", "labelsTr/b.nii.gz")
    with pytest.raises(BadInput, match="no .nii or .nii.gz volumes.*labelsTr/a.nii.gz: a label map by its name"):
        intake.find_volumes(tmp_path / "D", "pretrain")


@pytest.mark.parametrize("names", [("a/Case_00001_0000.nii.gz", "b/Case_00001_0000.nii.gz"), ("x.nii", "x.nii.gz"),
                                   ("a/b__c.nii", "a__b/c.nii")])
def test_two_files_of_one_id_stop_every_command_with_both_names(tmp_path, refusal, names):
    for name in names:
        save(tmp_path / "D" / name)
    for main, argv in ((train_ssl.main, ["--init", "random"]), (datasets.main, ["prepare"]),
                       (datasets.main, ["audit"])):
        line = refusal(main, [*argv, "--data", tmp_path / "D"])
        assert all(str(tmp_path / "D" / name) in line for name in names)
    assert os.listdir(tmp_path) == ["D"]


def test_names_in_capitals_are_read(tmp_path):
    save(tmp_path / "D" / "a.nii.gz")
    (tmp_path / "D" / "a.nii.gz").rename(tmp_path / "D" / "B.NII.GZ")
    store = datasets.prepare(tmp_path / "D", tmp_path / "s", "pretrain", size=20)
    assert [v["id"] for v in store.volumes] == ["B"] and predict.find_volumes(tmp_path / "D")[0].keys() == {"B"}


@pytest.mark.parametrize("names, count, tool", [
    (["a.dcm", "deep/b.DCM"], 2, "dcm2niix"), (["a.hdr", "a.img"], 1, "SimpleITK"), (["b.img"], 1, "SimpleITK"),
    (["a.mha"], 1, "SimpleITK"), (["a.mhd", "a.raw"], 1, "SimpleITK"), (["a.nrrd"], 1, "SimpleITK"),
    (["IM0001", "1.2.840.113"], 2, "dcm2niix"), (["a.nii.bz2"], 1, "bunzip2")])
def test_other_formats_are_counted_and_named_with_their_tool(tmp_path, capsys, names, count, tool):
    save(tmp_path / "D" / "scan.nii.gz")
    touch(tmp_path / "D", *names, "README", "notes.txt")
    for name in ("IM0001", "1.2.840.113"):
        if name in names:
            (tmp_path / "D" / name).write_bytes(bytes(128) + b"DICM")
    with pytest.raises(BadInput, match=f"{count} files of another format.*{names[0]}.*{tool}"):
        datasets.prepare(tmp_path / "D", tmp_path / "s", "pretrain", size=20)
    with pytest.raises(SystemExit):
        datasets.main(["audit", "--data", str(tmp_path / "D")])
    assert f"unusable: 1\n  {tmp_path / 'D'}: {count} files of another format" in capsys.readouterr().out
    (tmp_path / "D" / "scan.nii.gz").unlink()
    with pytest.raises(BadInput, match=f"no .nii or .nii.gz volumes.*{count} files.*{tool}"):
        intake.find_volumes(tmp_path / "D", "pretrain")


def test_other_formats_that_are_labels_or_were_converted_miss_nothing(tmp_path):
    save(tmp_path / "D" / "scan.nii.gz")
    touch(tmp_path / "D", "scan.mha", "scan.seg.nrrd", "labels/scan.mha")
    _, skipped = intake.find_volumes(tmp_path / "D", "pretrain")
    assert len(skipped) == 1 and "3 files" in skipped[0]["reason"] and skipped[0]["no_image"]


@pytest.mark.parametrize("what", ["file", "folder", "loop", "closed"])
def test_what_cannot_be_opened_is_an_error_until_it_is_accepted(tmp_path, monkeypatch, refusal, what):
    data = tmp_path / "D"
    save(data / "a.nii.gz")
    bad = data / {"file": "b.nii.gz", "folder": "part2", "loop": "turns", "closed": "closed"}[what]
    if what == "closed":
        touch(bad, "c.nii.gz")
        scan = os.scandir

        def refuse(path="."):
            if str(path) == str(bad):
                raise PermissionError(13, "Permission denied", str(bad))
            return scan(path)

        monkeypatch.setattr(os, "scandir", refuse)
    else:
        bad.symlink_to(bad if what == "loop" else tmp_path / "nowhere")
    assert str(bad) in refusal(train_ssl.main, ["--data", data, "--init", "random"])
    assert not (tmp_path / "runs").exists()
    assert len(datasets.prepare(data, tmp_path / "s", "pretrain", size=20, skip_bad=True).skipped) == 1
    assert len(datasets.prepare(data, tmp_path / "s", "pretrain", size=20)) == 4  # the choice holds
    (data / "more").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="more: a broken link"):  # for what it was made
        datasets.prepare(data, tmp_path / "s", "pretrain", size=20)


def test_hidden_folders_are_no_data(tmp_path):
    touch(tmp_path / "D", "a.nii", ".Trash/b.nii", "._a.nii")
    (tmp_path / "D" / ".gone").symlink_to(tmp_path / "nowhere")
    found, skipped = intake.find_volumes(tmp_path / "D", "pretrain")
    assert [v["id"] for v in found] == ["a"] and [s["reason"] for s in skipped] == ["hidden file"] * 2


@pytest.fixture
def btcv(tmp_path):
    for case in (1, 35):
        save(tmp_path / f"B/RawData/Training/img/img{case:04d}.nii.gz", ct(seed=case))
        save(tmp_path / f"B/RawData/Training/label/label{case:04d}.nii.gz",
             np.random.default_rng(case).integers(0, 14, (20, 16, 4)).astype(np.uint8))
    return tmp_path / "B"


def test_btcv_has_the_same_gate(btcv, tmp_path):
    training = btcv / "RawData/Training"
    save(training / "img/img0001_mask.nii.gz")
    for kind in ("pretrain", "segment"):
        found, skipped = intake.find_volumes(btcv, kind)
        assert [v["id"] for v in found] == ["0001", "0035"]
        assert [s["reason"] for s in skipped] == ["a label map by its name"]
    touch(tmp_path / "b", "img/x.txt")
    (tmp_path / "b/img/img0001.nii.gz").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="no image can be used: .*img0001.nii.gz: a broken link"):
        intake.find_volumes(tmp_path / "b", "pretrain")
    touch(training, "img/img0002.mha")
    (training / "label/label0035.nii.gz").unlink()
    (training / "label/label0035.nii.gz").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SystemExit):
        datasets.main(["audit", "--data", str(btcv)])
    with pytest.raises(BadInput, match="2 such volumes or files"):  # a broken link, another format
        datasets.prepare(btcv, tmp_path / "s", "segment")
    store = datasets.prepare(btcv, tmp_path / "s", "segment", skip_bad=True)
    assert [v["id"] for v in store.volumes] == ["0001"] and sum(not s["no_image"] for s in store.skipped) == 3


# ----------------------------------------------------------------------------------------- by its values and geometry


def not_hu(kind, shape=(20, 16, 4)):
    rng = np.random.default_rng(0)
    return {"labels": rng.integers(0, 14, shape), "many labels": rng.integers(0, 118, shape), "unit": rng.random(shape),
            "deviation": rng.normal(size=shape), "constant": np.zeros(shape), "16 bit": rng.integers(0, 65536, shape),
            "no intercept": rng.integers(900, 1400, shape), "0 and 255": 255 * rng.integers(0, 2, shape),
            "far below": rng.integers(-20000, 1000, shape)}[kind].astype(np.float32)


NOT_HU = ["labels", "many labels", "unit", "deviation", "constant", "16 bit", "no intercept", "0 and 255", "far below"]


@pytest.mark.parametrize("kind", NOT_HU)
def test_values_that_cannot_be_hu_are_unusable_whatever_the_window(tmp_path, kind):
    save(tmp_path / "D/a.nii.gz", not_hu(kind))
    for window in (prepare.WINDOW, (0, 60), (-1000, 2000)):
        with pytest.raises(BadInput, match=r"a.nii.gz: no CT by its values"):
            datasets.prepare(tmp_path / "D", tmp_path / "s", "pretrain", window, 20)


def test_every_command_stops_on_what_is_no_ct(btcv, tmp_path, refusal):
    bad = btcv / "RawData/Training/img/img0035.nii.gz"
    save(bad, not_hu("0 and 255"))
    for main, more in ((train_ssl.main, ["--init", "random"]), (svd_spectrum.main, ["random"]),
                       (train_seg.main, ["--split", "25", "--backbone", "random"]), (datasets.main, ["prepare"])):
        assert f"{bad}: no CT by its values" in refusal(main, [*more, "--data", btcv])
    assert not (tmp_path / "runs").exists()


def turned(degrees):
    a = np.deg2rad(degrees)
    return np.array([[1, 0, 0, 0], [0, np.cos(a), -np.sin(a), 0], [0, np.sin(a), np.cos(a), 0], [0, 0, 0, 1]]) @ LPS


GEOMETRY = {  # shape, affine, what follows
    "1 slice": ((20, 16, 1), LPS, "odd 1 slice only"),
    "2 slices": ((20, 16, 2), LPS, "odd 2 slices only"),
    "frontal scout": ((40, 1, 90), LPS, "refused 90 of 1 x 40 pixels"),
    "frontal scout, stored LSP": ((40, 90, 1), LPS[:, [0, 2, 1, 3]], "refused 90 of 1 x 40 pixels"),
    "few rows": ((20, 8, 9), LPS, "refused 9 of 8 x 20"),
    "coronal": ((20, 16, 20), np.diag([-0.8, -5, 0.8, 1]), "refused pixels of 5 x 0.8 mm (coronal"),
    "sagittal": ((16, 20, 20), np.diag([-5, -0.8, 0.8, 1]), "refused pixels of 0.8 x 5 mm (sagittal"),
    "not square": ((20, 16, 4), np.diag([-1, -1.4, 5, 1]), "odd pixels of 1.4 x 1 mm"),
    "tilted gantry": ((20, 16, 4), turned(15), "usual"),
    "oblique": ((20, 16, 4), turned(35), "odd axes turned by 35 degrees"),
    "usual": ((20, 16, 4), LPS, "usual")}


@pytest.mark.parametrize("kind", GEOMETRY)
def test_what_is_no_stack_of_axial_slices_is_refused_or_odd(tmp_path, kind):
    shape, affine, follows = GEOMETRY[kind]
    how, _, words = follows.partition(" ")
    save(tmp_path / "a.nii.gz", ct(shape), affine)
    if how == "refused":
        with pytest.raises(BadInput, match="a.nii.gz: no stack of axial slices") as caught:
            reading.read_ct(tmp_path / "a.nii.gz", prepare.WINDOW)
        assert words in str(caught.value)
    else:
        odd = reading.read_ct(tmp_path / "a.nii.gz", prepare.WINDOW)[3]
        assert len(odd) == (how == "odd") and all(line.startswith(words) for line in odd)


SHEARED = LPS.copy()
SHEARED[0, 1] = 0.2
HEADERS = {  # fields, what is told; the affine that is used stays LPS
    "sform of zeros": ({"codes": [1, 1], "pixdim": [1.5, 1.5, 5], "quatern": [0, 0, 1], "srow": [0] * 12},
                       "an sform of zeros"),
    "qform elsewhere": ({"codes": [1, 1], "pixdim": [1.5, 1.5, 5], "quatern": [0, 0, 1, 0, 0, 9]}, "up to 9 mm apart"),
    "qform damaged": ({"codes": [1, 1], "quatern": [5, 5, 5]}, "a damaged qform"),
    "both alike": ({"codes": [1, 1], "pixdim": [1.5, 1.5, 5], "quatern": [0, 0, 1, 0, 0, 0]}, None),
    "another spacing": ({"pixdim": [1.5, 1.5, 3]}, "a spacing of 1.5 x 1.5 x 3 mm in its header, of 1.5 x 1.5 x 5"),
    "sheared": ({"srow": SHEARED[:3].ravel()}, "not at right angles"),
    "slope NaN": ({"slope": [np.nan, np.nan]}, "scl_slope nan"),
    "slope infinite": ({"slope": [np.inf, 0]}, "scl_slope inf")}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_contradict_themselves_are_odd(tmp_path, kind):
    fields, told = HEADERS[kind]
    save(tmp_path / "a.nii.gz", **fields)
    read, _, ends, odd = reading.read_ct(tmp_path / "a.nii.gz", prepare.WINDOW)
    assert bool(odd) == bool(told) and (told is None or any(told in line for line in odd)), odd
    np.testing.assert_array_equal(read.hu, ct().transpose(2, 1, 0).astype(np.float32))
    np.testing.assert_allclose(read.spacing, (5, 1.5, 1.5), rtol=0.01)
    assert ends == (ct().min(), ct().max())


# ---------------------------------------------------------------------------------------------------- what is told


@pytest.fixture
def bright(small_phantom, tmp_path):
    """The phantom with one volume of each part exported to 0..255, and without gallbladders (it lacks esophagi)."""
    shutil.copytree(small_phantom, tmp_path / "phantom")
    training = tmp_path / "phantom/BTCV/RawData/Training"
    for path in (training / "img/img0001.nii.gz", tmp_path / "phantom/AbdomenCT-1K/Case_00003_0000.nii.gz"):
        image = nib.load(path)
        image.header.set_data_dtype(np.uint8)
        nib.save(nib.Nifti1Image(np.clip(image.dataobj, 0, 255).astype(np.uint8), image.affine, image.header), path)
    for path in sorted((training / "label").glob("*")):
        image = nib.load(path)
        labels = np.asarray(image.dataobj).copy()
        labels[labels == 4] = 0
        nib.save(nib.Nifti1Image(labels, image.affine, image.header), path)
    return tmp_path / "phantom"


@pytest.mark.parametrize("command", ["train_ssl", "train_seg", "svd_spectrum"])
def test_commands_tell_what_is_odd_before_they_start(bright, monkeypatch, capsys, command):
    """The training itself is left out."""
    def stop(*args, **kw):
        raise BadInput("it would start here")

    monkeypatch.setattr(train_ssl, "pretrain", stop)
    monkeypatch.setattr(train_seg, "measure", stop)
    monkeypatch.setattr(svd_spectrum, "features", stop)
    main, more = {"train_ssl": (train_ssl.main, ["--data", bright / "AbdomenCT-1K", "--batch-size", 8,
                                                  "--bn-group", 4]),
                  "train_seg": (train_seg.main, ["--data", bright / "BTCV", "--split", "25", "--backbone", "random"]),
                  "svd_spectrum": (svd_spectrum.main, ["--data", bright / "BTCV", "random"])}[command]
    with pytest.raises(SystemExit):
        main([str(a) for a in more])
    out, err = capsys.readouterr()
    assert f"warnings: 1 (python datasets.py audit --data {more[1]} lists them)" in out and "it would start here" in err
    volumes, name = (6, "Case_00003") if command == "train_ssl" else (30, "0001")
    assert f"intensities: in 1 of {volumes} volumes nothing lies under -200 HU ({name}: 0 to 255)" in out
    assert ("no volume has: gallbladder, esophagus;" in out) == (command != "train_ssl")


def test_audit_names_the_organs_that_no_volume_has(bright, capsys):
    datasets.main(["audit", "--data", str(bright / "BTCV")])
    out = capsys.readouterr().out
    assert "  no volume has: gallbladder, esophagus\n" in out and "warnings: 1\n" in out and "never under -200" in out


def test_labels_near_whole_numbers_are_rounded_and_listed(btcv, tmp_path, capsys):
    label = btcv / "RawData/Training/label/label0001.nii.gz"
    whole = np.random.default_rng(3).integers(1, 13, (20, 16, 4)).astype(np.float32)
    save(label, whole + np.where(whole > 3, -0.0001, 0.04).astype(np.float32))
    store = datasets.prepare(btcv, tmp_path / "s", "segment")
    np.testing.assert_array_equal(store.slice(1, label=True), whole[:, :, 1].T)
    datasets.main(["audit", "--data", str(btcv)])
    assert "warnings: 1\n" in (out := capsys.readouterr().out)
    assert "1,280 voxels of label0001.nii.gz hold nearly whole" in out
    save(label, whole + np.float32(0.06))
    with pytest.raises(BadInput, match="label0001.nii.gz: label values are not all whole numbers"):
        datasets.prepare(btcv, tmp_path / "s", "segment")
