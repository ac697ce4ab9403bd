"""organs.py, and what of it the commands show: labels that lie elsewhere than those of the other patients."""

import functools
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import io_orientation

import datasets
import train_seg
from ct import audit, organs, stores, tasks
from ct.volumes import BadInput, Volume

CASES = ("0001", "0002", "0003", "0004", "0005", "0006", "0007", "0008", "0009", "0035")
NAMES = ("background", "liver", "spleen", "stomach", "lung")


def test_measured_are_percentiles_of_hu_and_places_in_the_body():
    rng = np.random.default_rng(0)
    stored, labels = np.full((6, 40, 50), -1000, np.int16), np.zeros((6, 40, 50), np.uint8)
    stored[:, 10:30, 5:41] = rng.integers(-50, 80, (6, 20, 36))
    labels[1:4, 12:20, 30:38], labels[0:2, 25:28, 8:12], labels[5, 15, 20] = 1, 3, 200
    read = Volume(stored, (5.0, 1.0, 1.0), Path("a.nii"), nib.Nifti1Header(), np.eye(4))
    voxels, rows = organs.measure(read, labels, 201)
    assert np.flatnonzero(voxels).tolist() == [0, 1, 3, 200] and voxels[1] == 192 and voxels[3] == 24
    body = np.argwhere(stored > -300)
    for row, cut in zip(rows, (0, 1, 1), strict=True):
        there = labels == row[0]
        assert row[1:4] == np.percentile(stored[there], (10, 50, 90), method="lower").tolist()
        place = (np.argwhere(there).mean(0) - body.mean(0)) / (2 * body.std(0))
        np.testing.assert_allclose(row[4:7], place, atol=0.006)
        assert row[7] == cut
    assert len(rows) == 3
    json.dumps(rows)


def test_large_volumes_are_measured_by_some_of_their_voxels():
    z, y, x = np.ogrid[:70, :140, :150]
    organ = (z - 30) ** 2 / 15**2 + (y - 60) ** 2 / 20**2 + (x - 90) ** 2 / 15**2 < 1
    stored = np.where(organ, 60 + x // 10, -1000 + 960 * ((y > 20) & (y < 110))).astype(np.int16)
    read = Volume(stored, (1.0, 1.0, 1.0), Path("a.nii"), nib.Nifti1Header(), np.eye(4))
    _, ((c, low, median, high, *place, cut),) = organs.measure(read, organ.astype(np.uint8), 2)
    body = np.argwhere(stored > -300)
    np.testing.assert_allclose(place, (np.argwhere(organ).mean(0) - body.mean(0)) / (2 * body.std(0)), atol=0.03)
    np.testing.assert_allclose((low, median, high), np.percentile(stored[organ], (10, 50, 90)), atol=1)
    assert (c, cut) == (1, 0)


def patient(i: int, **changed: list) -> dict:
    """A record as a store has it, of a liver, a spleen, a stomach with gas, and lungs; a little different in each."""
    d = 0.02 * (i % 5 - 2)
    rows = {"liver": [1, 60 + i, 100 + i, 130 + i, 0.1 + d, -0.1 + d, -0.5 + d, 0],
            "spleen": [2, 70 + i, 110 + i, 140 + i, 0.2 - d, 0.3 + d, 0.6 - d, 0],
            "stomach": [3, -900 if i % 3 else 10, 30 + i, 60, 0.2 + d, -0.3 - d, 0.4 + 2 * d, 0],
            "lung": [4, -920, -850 + i, -700, 0.8, d, d, 1]} | changed
    voxels = [10**6, 1500_000 + 1000 * i, 200_000, 300_000, 10**6]
    return {"id": f"p{i}", "spacing": [1, 1, 1], "bulk": [-1000, 900], "voxels": voxels,
            "organs": [row for row in rows.values() if row]}


def compared(n: int, *changed: dict) -> organs.Found:
    """Of n patients, the first of whom have other rows."""
    return organs.compare([patient(i, **(changed[i] if i < len(changed) else {})) for i in range(n)], NAMES)


AIR = [-1000, -990, -980]
HALF = [-1000, -600, 100]
LIVER, SPLEEN = [0.1, -0.1, -0.5, 0], [0.2, 0.3, 0.6, 0]


@pytest.mark.parametrize("n", [3, 4, 8, 30])
def test_organs_in_air_are_certain_where_three_others_have_them_in_the_body(n):
    found = compared(n, {"spleen": [2, *AIR, *SPLEEN]})
    assert found.in_air == ({"p0": f"spleen (median -990 HU, 111 to {109 + n} in the others)"} if n > 3 else {})
    assert found.elsewhere == {}
    both = compared(n, {"liver": [1, *HALF, *LIVER], "spleen": [2, *HALF, *SPLEEN], "lung": None})
    assert list(both.in_air) == (["p0"] if n > 3 else [])  # two of its three organs
    one = compared(n, {"liver": [1, *HALF, *LIVER]})
    assert one.in_air == {} and list(one.elsewhere) == (["p0"] if n > 3 else [])


def test_lungs_and_hollow_organs_may_lie_in_air_and_what_many_patients_have_is_how_the_data_is():
    assert compared(12) == ({}, {})
    assert compared(12, {"stomach": [3, -990, -800, 60, 0.2, -0.3, 0.4, 0]}) == ({}, {})
    assert compared(12, *[{"liver": [1, *AIR, *LIVER]}] * 4) == ({}, {})
    assert list(compared(12, *[{"liver": [1, *AIR, *LIVER]}] * 2).in_air) == ["p0", "p1"]


def test_air_that_was_clipped_counts_as_air():
    """In slices of 0 to 255 HU, air and fat are 0."""
    records = [{"id": f"p{i}", "spacing": [1, 1, 1], "bulk": [0, 255], "voxels": [9, 9],
                "organs": [[1, 80, 100, 120, *LIVER]]} for i in range(6)]
    assert organs.compare(records, NAMES) == ({}, {})
    records[2]["organs"] = [[1, 0, 0, 0, *LIVER]]
    assert organs.compare(records, NAMES).in_air == {"p2": "liver (median 0 HU, 100 to 100 in the others)"}


ASTRAY = {  # rows of the first patient -> what is said
    "mirrored": ({"liver": [1, 60, 100, 130, 0.1, -0.1, 0.5, 0], "spleen": [2, 60, 100, 130, 0.2, 0.3, -0.6, 0]},
                 "liver (1.0 half widths of the body nearer the left), spleen (1.2 half widths"),
    "front to back": ({"spleen": [2, 60, 100, 130, 0.2, -0.3, 0.6, 0]}, "nearer the front"),
    "over fat": ({"spleen": [2, -120, -100, -50, *SPLEEN]}, "spleen (median -100 HU, "),
    "all upside down": ({"liver": [1, 60, 90, 99, -0.9, -0.1, -0.5, 0], "spleen": [2, 60, 90, 99, -0.8, 0.3, 0.6, 0]},
                        "liver (1.0 half widths of the body nearer the bottom), spleen"),
    "another patient's": ({"liver": [1, -300, 90, 120, *LIVER], "spleen": [2, -100, 60, 120, *SPLEEN]},
                          "liver (median 90 HU, 106 in the others, a tenth under -300), spleen"),
    "one organ with some fat": ({"liver": [1, -100, 90, 120, *LIVER]}, None),
    "one organ higher": ({"liver": [1, 60, 100, 130, 0.9, -0.1, -0.5, 0]}, None),
    "another phase": ({"liver": [1, 20, 50, 80, *LIVER], "spleen": [2, 20, 45, 80, *SPLEEN]}, None),
    "noise": ({"liver": [1, 0, 100, 200, *LIVER], "spleen": [2, 5, 100, 200, *SPLEEN]}, None),
    "fat in the liver": ({"liver": [1, -20, 5, 30, *LIVER]}, None),
    "a stomach without a wall": ({"stomach": [3, *AIR, 0.2, -0.3, 0.4, 0]}, "stomach (median -990 HU, ")}


@pytest.mark.parametrize("how", ASTRAY)
def test_places_and_hu_far_from_the_others_are_named(how):
    rows, words = ASTRAY[how]
    found = compared(12, rows)
    assert found.in_air == {} and list(found.elsewhere) == (["p0"] if words else [])
    assert words is None or words in found.elsewhere["p0"]
    assert compared(7, rows) == ({}, {})  # too few


@pytest.mark.parametrize("factor, cut, told", [(8, 0, "times larger"), (1 / 30, 0, "times smaller"), (3, 0, None),
                                               (1 / 30, 1, None), (1 / 4, 0, None)])
def test_sizes_far_from_the_others_are_named_unless_the_scan_cuts_the_organ(factor, cut, told):
    records = [{"id": f"p{i}", "spacing": [2, 1, 1], "bulk": [-1000, 900], "voxels": [9, int(300_000 * (1 + i / 20))],
                "organs": [[1, 60, 100, 130, 0.1, -0.1, -0.5, 0]]} for i in range(9)]
    records[4]["voxels"][1] = int(360_000 * factor)
    records[4]["organs"][0][-1] = cut
    found = organs.compare(records, NAMES)
    assert found.in_air == {} and list(found.elsewhere) == (["p4"] if told else [])
    assert told is None or told in found.elsewhere["p4"]


def test_records_of_older_stores_are_not_judged():
    records = [patient(i) for i in range(12)]
    del records[0]["organs"], records[0]["bulk"]
    assert organs.compare(records, NAMES) == ({}, {})


# ------------------------------------------------------------------------------------------------- in the commands


def relabel(path: Path, change) -> None:
    """change(labels (X, Y, Z), the axis from right to left) of a label file."""
    image = nib.load(path)
    axis = int(np.flatnonzero(io_orientation(image.affine)[:, 0] == 0)[0])
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj), axis), image.affine, image.header), path)


def in_a_corner(labels: np.ndarray, axis: int) -> np.ndarray:
    moved = np.zeros_like(labels)
    moved[tuple(slice(n if n < 10 else n // 6) for n in moved.shape)] = 6
    return moved


@pytest.fixture
def ten(small_phantom, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("img", "label"):
        (folder := tmp_path / "B/RawData/Training" / part).mkdir(parents=True)
        for case in CASES:
            shutil.copy(small_phantom / f"BTCV/RawData/Training/{part}/{part}{case}.nii.gz", folder)
    return tmp_path / "B"


def test_labels_in_air_are_refused_until_they_are_accepted(ten, tmp_path, refusal, capsys):
    label = ten / "RawData/Training/label/label0003.nii.gz"
    own = label.read_bytes()
    prepared = functools.partial(datasets.prepare, ten, tmp_path / "s", "segment", workers=1)
    assert len(prepared().volumes) == 10
    relabel(label, in_a_corner)
    words = "img0003.nii.gz: its labels lie in air: liver (median -9"
    for _ in range(2):  # prepared just now, and before
        with pytest.raises(BadInput) as caught:
            prepared()
        assert words in str(caught.value)
    assert words in refusal(train_seg.main, ["--data", ten, "--split", "25", "--backbone", "random", "--workers", 1])
    with pytest.raises(SystemExit):
        datasets.main(["audit", "--data", str(ten), "--workers", "1"])
    assert "unusable: 1\n" in (told := capsys.readouterr().out) and words in told and "9 volumes" in told
    assert len(prepared(skip_bad=True).volumes) == 9
    assert len((store := prepared()).volumes) == 9 and words in store.skipped[0]["reason"]  # the choice holds
    label.write_bytes(own)
    assert len((store := prepared()).volumes) == 10 and store.skipped == []


def test_mirrored_labels_are_named_by_the_audit_and_at_each_start(ten, tmp_path, capsys):
    """A store of before knows no organs: nothing is said of it, and it is not prepared again."""
    prepared = functools.partial(datasets.prepare, ten, tmp_path / "s", "segment", workers=1)
    assert audit.remarks((store := prepared()).volumes, [], tasks.BTCV) == [
        line for line in audit.remarks(store.volumes, [], tasks.BTCV) if line.startswith("no volume has")]
    relabel(ten / "RawData/Training/label/label0005.nii.gz", np.flip)
    store = prepared()
    told = "\n".join(audit.remarks(store.volumes, store.skipped, store.task))
    assert "warnings: 1 " in told and "labels: in 1 of 10 volumes they seem to lie elsewhere" in told
    assert "the other patients' (0005: " in told
    datasets.main(["audit", "--data", str(ten), "--workers", "1"])
    assert "warnings: 1\n" in (told := capsys.readouterr().out)
    assert "img0005.nii.gz: its labels seem to lie elsewhere than the other patients': " in told
    assert "nearer the" in told
    for case in CASES:
        file = stores.record_file(store.folder, case)
        record = json.loads(file.read_text())
        del record["organs"], record["bulk"]
        file.write_text(json.dumps(record))
    before = {p: p.stat().st_mtime_ns for p in store.folder.glob("*.npy")}
    store = prepared()
    assert "labels:" not in "\n".join(audit.remarks(store.volumes, store.skipped, store.task))
    assert before == {p: p.stat().st_mtime_ns for p in store.folder.glob("*.npy")}


def test_real_labels_raise_no_alarm_and_are_found_mirrored_and_in_air(real_ct, tmp_path):
    store = datasets.prepare(real_ct / "BTCV", tmp_path / "b", "segment", workers=1)
    assert organs.compare(store.volumes, tasks.ORGANS) == ({}, {})
    first, second = (v["organs"][0] for v in store.volumes[:2])
    first[6] *= -1
    second[1:4] = [0, 0, 30]
    found = organs.compare(store.volumes, tasks.ORGANS)
    assert list(found.in_air) == ["0002"] and list(found.elsewhere) == ["0001"]
    assert [v["bulk"] for v in store.volumes[:2]] == [[0, 255], [0, 255]]
