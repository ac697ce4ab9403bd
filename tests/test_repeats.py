"""repeats.py: what is there twice, in a volume, in two, by name and by content; and what is not."""

import re

import nibabel as nib
import numpy as np
import pytest

import datasets
from ct import audit, reading, repeats
from ct.judgement import SOFT
from ct.phantom_anatomy import patient
from ct.volumes import BadInput

LPS = np.diag([-1.5, -1.5, 5.0, 1.0])


def save(path, hu, affine=LPS, slope=1.0, inter=0.0):
    """(Z, Y, X) HU as a file of voxels (X, Y, Z), LPS, that hold (HU - inter) / slope."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(hu.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    if (slope, inter) != (1.0, 0.0):
        raw = bytearray(path.read_bytes())
        raw[112:120] = np.array([slope, inter], "<f4").tobytes()
        path.write_bytes(raw)
    return path


@pytest.fixture(scope="module")
def body():
    """A generated patient: HU (Z, 64, 64) of 24 slices, labels."""
    hu, labels, _ = patient(0, 1, (30, 64, 64))
    return hu[:24], labels[:24]


def sums_of(path, window=SOFT):
    record, *_ = reading.describe({"id": path.name, "image": path, "label": None}, None, window)
    return repeats.each(record["slice_sums"])


def test_a_slice_keeps_its_checksum_in_whatever_it_is_stored(body, tmp_path):
    hu, _ = body
    own = sums_of(save(tmp_path / "a.nii", hu))
    assert len(set(own)) == 24 and repeats.NONE not in own
    assert own == sums_of(tmp_path / "a.nii", (-1000.0, 1000.0)) == sums_of(tmp_path / "a.nii", (0.0, 80.0))
    assert own == sums_of(save(tmp_path / "f.nii", hu.astype(np.float32) + np.float32(1e-4)))
    assert own == sums_of(save(tmp_path / "u.nii", (hu.astype(int) + 1024).astype(np.uint16), inter=-1024.0))
    assert own == sums_of(save(tmp_path / "h.nii", (hu * 2).astype(np.int16), slope=0.5))
    ras = save(tmp_path / "r.nii", hu[:, ::-1, ::-1], np.diag([1.5, 1.5, 5.0, 1.0]))  # the same patient, on disk as RAS
    assert own == sums_of(ras)
    padded = np.full((30, 100, 80), -2000, np.int16)
    padded[3:27, 20:84, 10:74] = hu
    assert sums_of(save(tmp_path / "p.nii", padded)) == [repeats.NONE] * 3 + own + [repeats.NONE] * 3
    air = (hu > -175).any((0, 1))  # columns with anything but air: what is cut away here is air
    assert not air.all() and own == sums_of(save(tmp_path / "x.nii", hu[:, :, np.flatnonzero(air).min():
                                                                         np.flatnonzero(air).max() + 1]))
    assert own[5:17] == sums_of(save(tmp_path / "z.nii", hu[5:17]))
    assert own == sums_of(save(tmp_path / "c.nii", hu.clip(-400, 400)))
    # and these are other slices
    for name, other in (("noise", hu + 3), ("cut", hu[:, :, 20:]), ("turned", hu.transpose(0, 2, 1))):
        assert not {*own} & {*sums_of(save(tmp_path / f"{name}.nii", other.astype(np.int16)))}, name


def odd(hu, tmp_path, labels=None):
    path = save(tmp_path / "v.nii", hu.astype(np.int16))
    levels = np.stack([reading.window_to_uint8(s.astype(np.float32), SOFT) for s in hu])
    return repeats.within("".join(sums_of(path)), levels, labels, path)


def test_what_a_volume_shows_twice_is_counted_and_named(body, tmp_path):
    hu, _ = body
    noise = np.random.default_rng(0).normal(0, 8, hu.shape)
    phase = np.where(hu > 60, hu + 40, hu) + noise  # of another contrast phase: no slice of it is there before
    for name, volume, told in (
            ("twice", np.concatenate([hu, hu]), "24 of 48 slices repeat earlier ones (slices 24 to 47 as slices 0 to "
                                                "23)"),
            ("doubled", hu.repeat(2, 0), "24 of 48 slices repeat earlier ones (slice 1 as slice 0, slice 3 as slice 2, "
                                         "slice 5 as slice 4 ... 24 such)"),
            ("stuck", np.concatenate([hu, hu[-1:].repeat(4, 0)]), "4 of 28 slices repeat earlier ones (slices 24 to 27 "
                                                                  "as slice 23)"),
            ("some", np.concatenate([hu[:20], hu[7:9]]), "2 of 22 slices repeat earlier ones (slices 20 to 21 as "
                                                         "slices 7 to 8)"),
            ("another phase", np.concatenate([hu, phase]), "slices from 24 on look like those from 0 on"),
            ("a part of one", np.concatenate([hu, phase[4:]]), "on look like those from 0 on (a second scan")):
        lines = odd(volume, tmp_path)
        assert len(lines) == 1 and told in lines[0], (name, lines)


def test_air_and_padding_are_no_repeats_nor_is_a_body(body, tmp_path):
    hu, _ = body
    air = np.full((9, 64, 64), -1000)
    assert odd(hu, tmp_path) == []
    for value in (-1000, -3024, 0, 40):  # of padding
        assert odd(np.concatenate([air * 0 + value, hu, air * 0 + value]), tmp_path) == [], value
    round_field = np.where(np.hypot(*np.mgrid[-32:32, -32:32]) < 31, 0, -1000)[None].repeat(9, 0)  # two values
    assert odd(np.concatenate([round_field, hu]), tmp_path) == []
    noisy = air + np.random.default_rng(0).normal(0, 10, air.shape)
    assert odd(np.concatenate([noisy, hu, noisy]), tmp_path) == []


def test_a_half_that_repeats_the_other_without_labels_is_refused(body, tmp_path):
    hu, labels = body
    none = np.zeros_like(labels)
    phase = np.where(hu > 60, hu + 40, hu) + np.random.default_rng(0).normal(0, 8, hu.shape)
    count = int(labels.any((1, 2)).sum())
    assert count > 12
    for second in (hu, phase):
        for pair in ((labels, none), (none, labels)):
            with pytest.raises(BadInput, match=r"v\.nii: .* have labels in one place only; remove"):
                odd(np.concatenate([hu, second]), tmp_path, np.concatenate(pair))
        told = odd(np.concatenate([hu, second]), tmp_path, np.concatenate([labels, labels]))
        assert len(told) == 1 and "one place" not in told[0]
    interleaved = np.stack([labels, none], 1).reshape(-1, *labels.shape[1:])
    with pytest.raises(BadInput, match=f"; {count} of them have labels in one place only"):
        odd(hu.repeat(2, 0), tmp_path, interleaved)
    # a few of them: told, and used
    first = int(np.flatnonzero(labels.any((1, 2)))[0])
    told = odd(np.concatenate([hu, hu[first : first + 2]]), tmp_path, np.concatenate([labels, none[:2]]))
    assert told[0].endswith("; 2 of them have labels in one place only")


def test_the_commands_refuse_and_name_them(body, tmp_path, refusal, capsys):
    hu, labels = body
    training, store = tmp_path / "D" / "RawData" / "Training", tmp_path / "s"
    for case, scans, truth in ((1, [hu], [labels]), (2, [hu + 20, hu + 20], [labels, labels * 0])):
        save(training / "img" / f"img{case:04d}.nii.gz", np.concatenate(scans))
        save(training / "label" / f"label{case:04d}.nii.gz", np.concatenate(truth))
    argv = ["prepare", "--data", str(tmp_path / "D"), "--store", str(store)]
    line = refusal(datasets.main, argv)
    assert "img0002.nii.gz: 24 of 48 slices repeat earlier ones" in line and "leave the volume out" in line
    datasets.main([*argv, "--skip-bad"])
    assert "1 volume, 24 slices" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        datasets.main(["audit", *argv[1:]])
    assert "unusable: 1\n" in capsys.readouterr().out
    # without labels it is used, and odd
    datasets.main(["audit", *argv[1:], "--kind", "pretrain"])
    assert "warnings: 1\n" in capsys.readouterr().out


def records(tmp_path, **volumes):
    return [reading.describe({"id": name, "image": save(tmp_path / f"{name}.nii", hu), "label": None}, None, SOFT)[0]
            for name, hu in volumes.items()]


def test_slices_of_another_volume_are_counted(body, tmp_path):
    hu, _ = body
    other = patient(0, 2, (30, 64, 64))[0][:24]
    air = np.full((6, 64, 64), -1000, np.int16)
    found = records(tmp_path, a=hu, b=other, c=np.pad(hu, ((0, 0), (5, 5), (0, 0)), constant_values=-1024),
                    d=np.concatenate([other[:10], air]), e=np.concatenate([hu[4:9], other[:3], air]))
    assert repeats.between(found) == {
        "c": "the same image as a", "d": "10 of its 10 slices are also in b",
        "e": "5 of its 8 slices are also in a, others in 1 more volume"}
    assert repeats.shared({"a": found[0]["slice_sums"], "b": found[1]["slice_sums"]},
                          {r["id"]: r["slice_sums"] for r in found[2:]}) == {
        "c": ("a", 24, 24), "d": ("b", 10, 10), "e": ("a", 5, 8)}
    assert audit.remarks([r | {"odd": []} for r in found], [])[0].startswith("warnings: 3 ")
    # records of before, with a checksum of the whole image alone
    old = [{"id": "x", "content": "1", "odd": []}, {"id": "y", "content": "1", "odd": []}]
    assert repeats.between([*found[:2], *old]) == {"y": "the same image as x"}


@pytest.mark.parametrize("ids, copy", [
    (["p1", "p1_Eq_1"], "p1_Eq_1"), (["p1", "p1_Tilt_1"], "p1_Tilt_1"), (["p1", "p1_ROI1"], "p1_ROI1"),
    (["p1", "p1_Tilt_Eq_1"], "p1_Tilt_Eq_1"), (["p1", "p1_Eq"], "p1_Eq"), (["p1_0000", "p1_eq_0000"], "p1_eq_0000"),
    (["p1", "p1 (1)"], "p1 (1)"), (["p1", "p1 - Copy"], "p1 - Copy"), (["p1", "p1_resampled"], "p1_resampled"),
    (["p1", "cropped_p1"], "cropped_p1"), (["p1_2", "p1_Eq_2"], "p1_Eq_2"), (["p1_Eq_1", "p1_Tilt_1"], "p1_Tilt_1"),
    (["a__p1", "a__p1_Crop_1"], "a__p1_Crop_1")])
def test_copies_by_their_names(ids, copy):
    assert list(repeats.copies(ids)) == [copy]
    other = next(i for i in ids if i != copy)
    assert repeats.between([{"id": i, "content": i} for i in ids]) == {
        copy: f"by its name a copy of {other} (resampled, cropped?)"}


@pytest.mark.parametrize("ids", [
    ["lung_cropped_001", "lung_cropped_002"], ["scan (1)", "scan (2)"], ["p1_ROI1", "p11"], ["p1_Eq_1", "p2"],
    ["Equator_1", "ator_1"], ["tilted", "p1"], ["liver_1", "liver_10"], ["roi_1", "roi_2"], ["p_1", "p_1_venous"]])
def test_names_that_say_nothing_of_a_copy(ids):
    assert repeats.copies(ids) == {}


def test_of_what_abdomenct_was_made(tmp_path):
    for folder, ids, source in (
            ("Task09_Spleen", ["x"], "MSD Spleen"), ("Dataset009_Spleen", ["x"], "MSD Spleen"),
            ("mine", ["spleen_2", "spleen_63"], "MSD Spleen"), ("Task03_Liver", ["x"], "MSD Liver, which is LiTS"),
            ("kits19", ["x"], "KiTS"), ("d", ["case_00000", "case_00001"], "KiTS"), ("d", ["volume-1"], "LiTS"),
            ("d", ["PANCREAS_0001"], "NIH Pancreas-CT"), ("Task07_Pancreas", ["x"], "MSD Pancreas"),
            ("BTCV", ["0001", "0002"], ""), ("amos22", ["amos_0001"], ""), ("Task08_HepaticVessel", ["x"], ""),
            ("mine", ["spleen_2", "p1", "p2"], "")):
        (tmp_path / folder).mkdir(exist_ok=True)
        assert repeats.in_abdomenct(tmp_path / folder, ids) == source, folder
    (tmp_path / "mine" / "dataset.json").write_text('{"name": "Spleen"}')
    assert repeats.in_abdomenct(tmp_path / "mine", ["p1"]) == "MSD Spleen"
    (tmp_path / "mine" / "dataset.json").write_text("[]")
    assert repeats.in_abdomenct(tmp_path / "mine", ["p1"]) == ""


def test_real_ct_gives_no_false_alarm_and_the_true_one(real_ct):
    """Of 540 clipped JPEG slices of 108 patients no two are one; example_ct_sm was cut out of example_ct."""
    for folder, count in (("AbdomenCT-1K", 309), ("BTCV/RawData/Training/img", 231)):
        volumes = [{"id": p.name, "image": p, "label": None} for p in sorted((real_ct / folder).glob("*.nii.gz"))]
        found = [reading.describe(v, None, SOFT)[0] for v in volumes]
        assert repeats.between(found) == {} and sum(r["slices"] for r in found) == count
        assert not [line for r in found for line in r["odd"] if re.search("repeat earlier|look like those", line)]
    volumes = [{"id": n, "image": real_ct / "nifti" / f"{n}.nii.gz", "label": None}
               for n in ("aorta_ct", "example_ct", "example_ct_sm")]
    found = [reading.describe(v, None, SOFT)[0] for v in volumes]
    assert repeats.between(found) == {"example_ct_sm": "30 of its 30 slices are also in example_ct"}
    assert not [line for r in found for line in r["odd"] if re.search("repeat earlier|look like those", line)]
