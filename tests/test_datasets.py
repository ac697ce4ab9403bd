"""datasets.py: layouts, stores, splits; what changed is prepared again, what is bad is named."""

import copy
import errno
import fcntl
import json
import multiprocessing
import os
import pickle
import re
import resource
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

import datasets
from ct import audit, intake, maps, pool, prepare, reading, repeats, stores, tasks
from ct.command import counted
from ct.volumes import BadInput, read_volume
from engine import launch, probe, processes

pytestmark = pytest.mark.pool
AFFINE = np.diag([-1.5, -1.5, 5.0, 1.0])  # LPS


def write(path, data, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)


def ct(seed, shape=(20, 16, 4)):
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The default store lies below the folder that a command is started in."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def abdomen(tmp_path):
    for i in (1, 2, 3):
        write(tmp_path / "A" / f"part{i % 2}" / f"Case_0000{i}_0000.nii.gz", ct(i, (20, 16, 3 + i)))
    return tmp_path / "A"


@pytest.fixture
def btcv(tmp_path):
    for case in (1, 2, 35):
        write(tmp_path / "B" / "RawData" / "Training" / "img" / f"img{case:04d}.nii.gz", ct(case))
        write(tmp_path / "B" / "RawData" / "Training" / "label" / f"label{case:04d}.nii.gz",
              np.random.default_rng(case).integers(0, 14, (20, 16, 4)).astype(np.uint8))
    return tmp_path / "B"


def test_splits_are_those_drawn_with_the_stated_seed():
    train = [f"{i:04d}" for i in [*range(1, 11), *range(21, 35)]]
    assert tasks.cases("100") == train and tasks.cases("val") == [f"{i:04d}" for i in range(35, 41)]
    rng = np.random.default_rng(0)
    for split, volumes in (("12.5", 3), ("25", 6)):
        for draw in range(3):
            assert tasks.cases(split, draw) == sorted(rng.choice(train, volumes, replace=False))
    with pytest.raises(BadInput, match="btcv_12.5_3.txt: no such split"):
        tasks.cases("12.5", 3)


def test_windowing_is_a_rounded_linear_map():
    hu = np.linspace(-400, 400, 5001, dtype=np.float32)
    expected = np.rint(np.clip((hu.astype(np.float64) + 175) / 425, 0, 1) * 255)
    assert np.abs(reading.window_to_uint8(hu, (-175, 250)) - expected).max() <= 1  # ties only
    assert (reading.window_to_uint8(hu, (-175, 250)) == expected).mean() > 0.999


@pytest.mark.parametrize("stored", ["<i2", ">i2", "<u2", "<f4", "<i4"])
def test_levels_are_those_of_the_whole_volume_in_hu(tmp_path, stored):
    header = nib.Nifti1Header(endianness=">" if stored.startswith(">") else "<")
    header.set_data_dtype(np.dtype(stored))
    data = (ct(5) + (1000 if stored == "<u2" else 0)).astype(stored)
    nib.save(nib.Nifti1Image(data, np.diag([1.5, -1.5, 5, 1]), header), tmp_path / "a.nii")
    levels, low, high = reading.levels(read_volume(tmp_path / "a.nii"), (-175, 250))
    expected = np.rint(np.clip((data[::-1].T.astype(np.float64) + 175) / 425, 0, 1) * 255)
    assert np.abs(levels - expected).max() <= 1 and (levels == expected).mean() > 0.99 and levels.dtype == np.uint8
    assert (low, high) == (data.min(), data.max())


def test_pretraining_slices_are_padded_with_air_and_resampled(abdomen, tmp_path):
    store = datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    assert len(store) == 4 + 5 + 6 and [v["id"] for v in store.volumes] == ["Case_00001", "Case_00002", "Case_00003"]
    data = ct(1, (20, 16, 4))  # LPS: x runs to the patient's left, y to posterior: rows are y, columns x
    expected = np.zeros((20, 20), np.uint8)
    expected[2:18] = reading.window_to_uint8(data[:, :, 3].T.astype(np.float32), (-175, 250))
    np.testing.assert_array_equal(store.slice(3), expected)
    np.testing.assert_array_equal(store.batch(np.array([4, 3]))[1], expected)
    mapped = np.load(store.folder / "Case_00001.npy", mmap_mode="r")  # any NumPy can map a volume
    np.testing.assert_array_equal(mapped[3], expected)
    half = datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=10).slice(3)
    assert half.shape == (10, 10) and abs(half.mean() - expected.mean()) < 3


@pytest.mark.parametrize("height, width", [(24, 16), (16, 24), (17, 24), (20, 20)])
def test_a_slice_is_padded_in_its_middle(height, width):
    slices, side = np.random.default_rng(0).integers(1, 256, (2, height, width), np.uint8), max(height, width)
    found = prepare.square(slices, side)
    top, left = (side - height) // 2, (side - width) // 2
    for y in range(side):
        for x in range(side):
            inside = 0 <= y - top < height and 0 <= x - left < width
            assert found[1, y, x] == (slices[1, y - top, x - left] if inside else 0)


def test_a_checksum_of_a_slice_sees_each_border_of_the_body():
    body = np.random.default_rng(0).integers(1, 256, (40, 40), np.uint8)
    sums = {repeats.slice_sums([body])}
    for place in ((0, 20), (-1, 20), (20, 0), (20, -1)):
        other = body.copy()
        other[place] ^= 1 if body[place] != 1 else 2
        sums.add(repeats.slice_sums([other]))
        sums.add(repeats.slice_sums([np.pad(other, 3)]))  # air around changes nothing
    assert len(sums) == 5


def test_the_numbers_by_which_volumes_are_judged_and_drawn_are_these():
    """docs/data.md and docs/decisions.md; the organs as BTCV's label ids have them (MONAI's dataset_0.json)."""
    assert (maps.PLANES, maps.TURNS, intake.SQUARE, intake.OTHER_PLANE) == (16, 0.1, 1.1, 2.0)
    assert (repeats.LEVELS, repeats.LEAST_SCAN, repeats.ALIKE, repeats.SURE) == (16, 24, 0.6, 0.5)
    assert (tasks.SEED, tasks.VAL_SHARE, tasks.DRAWS) == (13, 0.2, 3) and prepare.WINDOW == (-175, 250)
    assert (probe.PENALTY, probe.FITTED, probe.SCORED) == (0.01, 128, 64)
    organs = dict(spleen=1, liver=6, stomach=7, aorta=8, pancreas=11, esophagus=5, gallbladder=4)
    named = {"right kidney": 2, "left kidney": 3, "inferior vena cava": 9, "portal and splenic veins": 10,
             "right adrenal gland": 12, "left adrenal gland": 13, "background": 0}
    assert {organ: i for i, organ in tasks.BTCV.labels.items()} == organs | named


def test_segmentation_keeps_sizes_and_labels(btcv, tmp_path):
    store = datasets.prepare(btcv, tmp_path / "s", "segment")
    labels = np.asarray(nib.load(btcv / "RawData/Training/label/label0002.nii.gz").dataobj)
    np.testing.assert_array_equal(store.slice(5, label=True), labels[:, :, 1].T)
    np.testing.assert_array_equal(store.of(["0002"]), [4, 5, 6, 7])
    assert store.where(*store.place(5)) == "0002 slice 1"
    with pytest.raises(BadInput, match="0007"):
        store.of(["0001", "0007"])


def test_any_folder_of_nifti_and_btcv_images_serve_pretraining(btcv, tmp_path):
    write(tmp_path / "own" / "a b" / "Ünal.nii", ct(0))
    write(tmp_path / "own" / "scan.nii.gz", ct(1))
    assert [v["id"] for v in intake.find_volumes(tmp_path / "own", "pretrain")[0]] == ["a b__Ünal", "scan"]
    assert len(datasets.prepare(tmp_path / "own", tmp_path / "s", "pretrain", size=16)) == 8
    assert len(intake.find_volumes(btcv, "pretrain")[0]) == 3


def test_masks_of_abdomenct_are_not_taken_for_images(abdomen):
    write(abdomen / "Mask" / "Case_00001.nii.gz", ct(9))
    volumes, skipped = intake.find_volumes(abdomen, "pretrain")
    assert len(volumes) == 3 and "Mask" in skipped[0]["file"]


def test_only_what_changed_is_prepared_again(abdomen, tmp_path, monkeypatch):
    done = []
    real = pool.in_processes

    def watch(work, items, *rest):
        done.append([v["id"] for v in items])
        return real(work, items, *rest)

    monkeypatch.setattr(pool, "in_processes", watch)
    datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    path = abdomen / "part0" / "Case_00002_0000.nii.gz"
    os.utime(path, ns=(1, 1))  # another time, the same content
    datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    write(path, ct(7, (20, 16, 5)))
    store = datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    (store.folder / "Case_00003.npy").unlink()
    datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    datasets.prepare(abdomen, tmp_path / "s", "pretrain", (-100, 200), 20)
    assert [ids for ids in done if ids] == [["Case_00001", "Case_00002", "Case_00003"], ["Case_00002"], ["Case_00003"],
                                            ["Case_00001", "Case_00002", "Case_00003"]]


def test_a_new_time_costs_a_checksum_once(abdomen, tmp_path, monkeypatch):
    datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    os.utime(abdomen / "part0" / "Case_00002_0000.nii.gz", ns=(1, 1))
    real, read = stores.checksum, []
    for module in (stores, prepare):  # of sources; of what is written
        monkeypatch.setattr(module, "checksum", lambda path: read.append(path.name) or real(path))
    for _ in range(2):
        datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    assert read == ["Case_00002_0000.nii.gz"]


def test_what_changed_is_said(abdomen, tmp_path, capsys):
    datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    capsys.readouterr()
    datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    assert "changed" not in capsys.readouterr().err
    write(abdomen / "part0" / "Case_00002_0000.nii.gz", ct(7, (20, 16, 5)))
    datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    assert re.search("1 volume changed.*Case_00002", capsys.readouterr().err)


def test_another_window_leaves_this_store_as_it_is(abdomen, tmp_path):
    store = datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    before = store.slice(3)
    other = datasets.prepare(abdomen, tmp_path / "s", "pretrain", (-100, 200), 20)
    assert other.folder != store.folder and not np.array_equal(other.slice(3), before)
    np.testing.assert_array_equal(store.slice(3), before)


def test_a_volume_whose_arrays_are_being_replaced_is_not_there(abdomen, tmp_path, monkeypatch):
    """Killed after the new array, before its record: the old record must not vouch for it."""
    path = abdomen / "part0" / "Case_00002_0000.nii.gz"
    old, stamp = path.read_bytes(), path.stat()
    datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    write(path, ct(7, (20, 16, 5)))
    monkeypatch.setattr(prepare, "write_json", lambda *a: os._exit(9))  # in the worker
    with pytest.raises(BadInput, match="killed"):
        datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    monkeypatch.undo()
    path.write_bytes(old)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    store = datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    fresh = datasets.prepare(abdomen, tmp_path / "fresh", "pretrain", size=20)
    np.testing.assert_array_equal(store.slice(4), fresh.slice(4))


def start(data, store):
    """The command as another process, by the file that has it: that of datasets.py would import torch for nothing."""
    return subprocess.Popen([sys.executable, "-m", "ct.prepare", "prepare", "--data", data, "--store", store],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            cwd=Path(datasets.__file__).parent)


def test_two_processes_preparing_one_store_do_not_harm_each_other(abdomen, tmp_path):
    (tmp_path / "s" / "pretrain-512").mkdir(parents=True)
    with open(tmp_path / "s" / "pretrain-512" / ".lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # a third one at work
        both = [start(abdomen, tmp_path / "s") for _ in range(2)]
        assert all("waiting for another process" in p.stdout.readline() for p in both)
        assert not list((tmp_path / "s" / "pretrain-512").glob("*.npy"))
    told = [p.communicate(timeout=60)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0] and all("3 volumes, 15 slices" in t for t in told), told
    assert audit.verify(tmp_path / "s") == 0


def test_a_killed_preparation_goes_on_where_it_was(tmp_path, capsys):
    for i in range(12):
        write(tmp_path / "A" / f"scan{i:02d}.nii", ct(i, (200, 200, 20)))
    first = start(tmp_path / "A", tmp_path / "s")
    folder = tmp_path / "s" / "pretrain-512"
    while len(list(folder.glob("scan*.json"))) < 2:
        time.sleep(0.005)
    workers = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    assert workers
    first.kill()
    first.wait()
    done = {p.name: p.stat().st_mtime_ns for p in folder.glob("scan*.npy") if p.with_suffix(".json").exists()}
    (folder / f".{first.pid}.scan11.npy").write_bytes(b"half")
    store = datasets.prepare(tmp_path / "A", tmp_path / "s", "pretrain", size=512)
    assert len(store.volumes) == 12 and [p.name for p in folder.glob(".*")] == [".lock"]  # nothing half-written
    assert done and all((folder / name).stat().st_mtime_ns == at for name, at in done.items())
    end = time.monotonic() + 5
    while any(Path(f"/proc/{w}").exists() for w in workers):  # they do not wait for ever for a parent that is gone
        assert time.monotonic() < end, workers
        time.sleep(0.05)


def test_data_that_cannot_be_written_to_and_links(abdomen, tmp_path):
    (tmp_path / "L" / "further").mkdir(parents=True)
    (tmp_path / "L" / "part 1").symlink_to(abdomen / "part1")
    (tmp_path / "L" / "further" / "Case_00002_0000.nii.gz").symlink_to(abdomen / "part0" / "Case_00002_0000.nii.gz")
    (tmp_path / "L" / "further" / "up").symlink_to(tmp_path / "L")
    (tmp_path / "L" / "Case_00005_0000.nii.gz").symlink_to(tmp_path / "nothing")
    folders = [abdomen, abdomen / "part0", abdomen / "part1"]
    before = [(f.stat().st_mtime_ns, sorted(os.listdir(f))) for f in folders]
    for f in folders:
        f.chmod(0o555)
    store = datasets.prepare(tmp_path / "L", tmp_path / "elsewhere", "pretrain", size=20, skip_bad=True)
    assert [v["id"] for v in store.volumes] == ["Case_00001", "Case_00002", "Case_00003"]
    assert [s["reason"] for s in store.skipped] == ["a broken link, or no file"]
    assert before == [(f.stat().st_mtime_ns, sorted(os.listdir(f))) for f in folders]
    for f in folders:
        f.chmod(0o755)


def test_a_full_disk_is_one_line(abdomen, tmp_path, monkeypatch):
    def full(path, array):
        raise OSError("1024 requested and 512 written")  # what NumPy says

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(BadInput, match="1024 requested and 512 written .while preparing"):
        datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)


def test_a_killed_preparation_leaves_no_half_volume(abdomen, tmp_path, monkeypatch):
    """Dying before the record is written leaves nothing that counts; the next call makes it good."""
    monkeypatch.setattr(prepare, "write_json", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(BaseException):  # noqa: B017 (the pool may report its own end)
        datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    monkeypatch.undo()
    assert not (tmp_path / "s" / "pretrain-20" / "index.json").exists()
    assert len(datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)) == 15


def test_bad_volumes_are_named_and_may_be_left_out(abdomen, tmp_path):
    bad = abdomen / "part0" / "Case_00002_0000.nii.gz"
    bad.write_bytes(bad.read_bytes()[:-20])
    with pytest.raises(BadInput, match="Case_00002_0000.nii.gz: damaged"):
        datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    store = datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20, skip_bad=True)
    assert len(store.volumes) == 2 and str(bad) in store.skipped[0]["file"]
    again = datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)  # training, later: the choice holds
    assert len(again.volumes) == 2 and len(again.skipped) == 1
    write(bad, ct(2, (20, 16, 5)))
    assert len(datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20).volumes) == 3


def test_a_store_is_named_after_the_whole_path_of_its_folder(abdomen, tmp_path, monkeypatch):
    (tmp_path / "other" / "A").mkdir(parents=True)
    (tmp_path / "link").symlink_to(abdomen)
    own = stores.default_store(abdomen)
    assert re.fullmatch(r"A-[0-9a-f]{8}", own.name) and own.parent == Path("stores")
    assert stores.default_store(tmp_path / "other" / "A") not in (own, stores.default_store(tmp_path))
    assert stores.default_store(tmp_path / "link") == own == stores.default_store(Path("A"))
    assert re.fullmatch(r"root-[0-9a-f]{8}", stores.default_store(Path("/")).name)
    monkeypatch.chdir(abdomen)
    assert stores.default_store(Path(".")) == own
    assert datasets.prepare(Path("."), tmp_path / "s", "pretrain", size=20).name == "A"


def test_a_store_of_another_folder_is_refused(abdomen, tmp_path, refusal):
    """Named both, with the flag; the folder's content under a new name is taken over without being prepared."""
    flags = ["prepare", "--store", tmp_path / "s", "--size", 20, "--data"]
    datasets.main([str(a) for a in (*flags, abdomen)])
    record = tmp_path / "s/pretrain-20/Case_00001.json"
    made = record.with_suffix(".npy").stat().st_mtime_ns
    moved = tmp_path / "B"
    shutil.copytree(abdomen, moved)
    line = refusal(datasets.main, [*flags, moved])
    assert all(str(x) in line for x in (abdomen, moved, tmp_path / "s/pretrain-20", "--store"))
    assert datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20).data == str(abdomen)  # as it was
    (tmp_path / "s/pretrain-20/index.json").unlink()
    write(moved / "part0" / "Case_00002_0000.nii.gz", ct(7, (20, 16, 5)))
    store = datasets.prepare(moved, tmp_path / "s", "pretrain", size=20)
    assert record.with_suffix(".npy").stat().st_mtime_ns == made and store.data == str(moved)
    assert json.loads(record.read_text())["source"]["image"]["file"].startswith(str(moved))
    fresh = datasets.prepare(moved, tmp_path / "fresh", "pretrain", size=20)
    np.testing.assert_array_equal(store.batch(np.arange(15)), fresh.batch(np.arange(15)))


def test_two_folders_at_once_into_one_store(abdomen, tmp_path, monkeypatch):
    """Who has waited for the lock finds another's store, and leaves it as it is."""
    shutil.copytree(abdomen, tmp_path / "B")
    index = datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20).folder / "index.json"
    made = index.read_text()
    index.unlink()
    monkeypatch.setattr(fcntl, "lockf", lambda *_: index.write_text(made))  # the other one has just ended
    with pytest.raises(BadInput, match="was made from"):
        datasets.prepare(tmp_path / "B", tmp_path / "s", "pretrain", size=20)
    assert index.read_text() == made


def test_a_file_of_the_same_size_and_time_in_another_folder_is_another_file(tmp_path):
    for name, seed in (("A", 1), ("B", 2)):
        write(tmp_path / name / "scan.nii", ct(seed))
        os.utime(tmp_path / name / "scan.nii", ns=(1, 1))  # as some archives leave them
    datasets.prepare(tmp_path / "A", tmp_path / "s", "pretrain", size=20)
    (tmp_path / "s/pretrain-20/index.json").unlink()  # killed before it was written
    store = datasets.prepare(tmp_path / "B", tmp_path / "s", "pretrain", size=20)
    fresh = datasets.prepare(tmp_path / "B", tmp_path / "fresh", "pretrain", size=20)
    np.testing.assert_array_equal(store.slice(0), fresh.slice(0))


def test_a_torn_index_is_written_again(abdomen, tmp_path):
    index = datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20).folder / "index.json"
    whole = index.read_text()
    for torn in (whole[:50], "", "[1]"):
        index.write_text(torn)
        assert len(datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)) == 15
        assert json.loads(index.read_text()) == json.loads(whole)


def test_a_volume_may_have_any_name(tmp_path, capsys):
    """That of a file of the store's own too, or the one that such a volume's files get."""
    names = ("index", "_index", "Index", "__index", "a", "_a")  # label-a is left out by its name
    for i, name in enumerate(names):
        write(tmp_path / "A" / f"{name}.nii.gz", ct(i))
    for _ in range(2):
        store = datasets.prepare(tmp_path / "A", tmp_path / "s", "pretrain", size=20)
        assert [v["id"] for v in store.volumes] == sorted(names) and audit.verify(tmp_path / "s") == 0
    assert "prepared again" not in capsys.readouterr().err
    for i, name in enumerate(names):
        (tmp_path / str(i)).mkdir()
        shutil.copy(tmp_path / "A" / f"{name}.nii.gz", tmp_path / str(i) / "x.nii.gz")
        alone = datasets.prepare(tmp_path / str(i), tmp_path / f"s{i}", "pretrain", size=20)
        np.testing.assert_array_equal(store.slice(int(store.of([name])[0])), alone.slice(0))


def test_cases_of_btcv_may_have_any_name(tmp_path):
    """The slices of a case `label-0001` and the label of case 0001."""
    for i, case in enumerate(("0001", "label-0001", "")):
        write(tmp_path / "img" / f"img{case}.nii.gz", ct(i))
        write(tmp_path / "label" / f"label{case}.nii.gz", np.full((20, 16, 4), i + 1, np.uint8))
    store = datasets.prepare(tmp_path, tmp_path / "s", "segment")
    for i, case in enumerate(("0001", "label-0001", "")):
        assert (store.slice(int(store.of([case])[0]), label=True) == i + 1).all()


@pytest.mark.parametrize("part", ["img", "label"])
def test_one_case_zipped_and_unzipped_is_told(btcv, tmp_path, part):
    for suffix in (".nii", ".nii.gz"):
        path = btcv / "RawData/Training" / part / f"{part}0035{suffix}"
        write(path, np.ones((20, 16, 4), np.uint8))
    with pytest.raises(BadInput, match=f"{part}0035.nii.gz: the same case as .*{part}0035.nii;"):
        datasets.prepare(btcv, tmp_path / "s", "segment")


def test_btcv_is_found_where_its_zip_files_unpack(btcv, tmp_path, capsys):
    (tmp_path / "C").mkdir()
    (btcv / "RawData").rename(tmp_path / "C" / "RawData")
    (tmp_path / "D").mkdir()
    (tmp_path / "C").rename(tmp_path / "D" / "Abdomen")
    code, out = outcome(capsys, "prepare", "--data", tmp_path / "D", "--store", tmp_path / "s")
    assert code == 0 and f"{tmp_path / 's/segment'}: 3 volumes, 12 slices" in out
    assert [v["id"] for v in intake.find_volumes(tmp_path / "D", "pretrain")[0]] == ["0001", "0002", "0035"]


def no_locks(monkeypatch, number=errno.ENOLCK):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_without_locks_a_store_is_made_with_a_warning_and_opened_without_one(abdomen, tmp_path, monkeypatch, capsys,
                                                                             number):
    no_locks(monkeypatch, number)
    (tmp_path / "s/pretrain-20").mkdir(parents=True)
    others = tmp_path / "s/pretrain-20/.99-ab.Case_00001.npy"  # perhaps being written, on another machine
    others.write_bytes(b"half")
    assert len(datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)) == 15
    assert "no locks on this file system" in capsys.readouterr().err and others.exists()
    assert len(datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)) == 15
    assert capsys.readouterr().err == "" and audit.verify(tmp_path / "s") == 0


@pytest.mark.parametrize("touched", [False, True])
def test_a_complete_store_that_cannot_be_written_to_is_used(abdomen, tmp_path, monkeypatch, touched):
    """Its sources copied meanwhile, too; one that is not complete is one line."""
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    folder = datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20).folder
    if touched:
        os.utime(abdomen / "part0" / "Case_00002_0000.nii.gz", ns=(1, 1))
    before = {p.name: p.stat().st_mtime_ns for p in (folder, *folder.iterdir())}
    monkeypatch.setattr(os, "replace", refuse)
    real = open
    monkeypatch.setattr("builtins.open", lambda p, mode="r", *rest: (refuse if mode == "w" else real)(p, mode, *rest))
    assert len(datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)) == 15
    assert before == {p.name: p.stat().st_mtime_ns for p in (folder, *folder.iterdir())}
    (abdomen / "part1" / "Case_00003_0000.nii.gz").rename(abdomen / "part1" / "Case_00009_0000.nii.gz")
    with pytest.raises(BadInput, match="Read-only file system .while preparing"):
        datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)


def test_a_fingerprint_knows_slices_labels_and_spacing_alone(btcv, tmp_path):
    def contents():
        return datasets.prepare(btcv, tmp_path / "s", "segment").contents()

    first, folder = contents(), btcv / "RawData/Training"
    assert set(first) == {"0001", "0002", "0035"}
    os.utime(folder / "img/img0001.nii.gz", ns=(1, 1))
    assert contents() == first
    write(folder / "label/label0001.nii.gz", np.ones((20, 16, 4), np.uint8))
    write(folder / "img/img0002.nii.gz", ct(9))
    for part in ("img", "label"):
        path = folder / f"{part}/{part}0035.nii.gz"
        write(path, np.asarray(nib.load(path).dataobj), AFFINE @ np.diag([1, 1, 2, 1]))
    second = contents()
    assert [[a == b for a, b in zip(first[c].split(), second[c].split(), strict=True)] for c in sorted(first)] == [
        [True, False, True, True, True], [False, True, True, True, True], [True, True, False, True, True]]
    assert datasets.prepare(btcv, tmp_path / "s", "segment").contents(["0002"]) == {"0002": second["0002"]}


def test_verify_finds_a_flipped_bit_and_what_was_deleted(abdomen, tmp_path, capsys):
    store = datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    flags = ["audit", "--data", str(abdomen), "--store", str(tmp_path / "s"), "--verify"]
    with pytest.raises(SystemExit) as caught:
        datasets.main(flags)
    assert caught.value.code == 0
    path = store.folder / "Case_00003.npy"
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 4
    path.write_bytes(raw)
    with pytest.raises(SystemExit) as caught:
        datasets.main(flags)
    assert caught.value.code == 1 and f"{path}: damaged" in capsys.readouterr().out
    path.unlink()
    datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    assert audit.verify(tmp_path / "s") == 0
    with pytest.raises(BadInput, match="nothing was prepared"):
        audit.verify(tmp_path)


def test_damaged_stores_are_found_at_load(abdomen, tmp_path):
    store = datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    index = json.loads((store.folder / "index.json").read_text())
    with open(store.folder / "Case_00003.npy", "r+b") as f:
        f.truncate(500)
    with pytest.raises(BadInput, match="Case_00003"):
        datasets.Store(store.folder, index)


def fill(store):
    """Every slice's expected voxels, read by NumPy."""
    return np.concatenate([np.load(stores.array(store.folder, v["id"])) for v in store.volumes])


def test_files_stay_open_for_all_threads_and_go_with_the_store(abdomen, tmp_path, monkeypatch):
    store = datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    wanted, opened, real = fill(store), [], os.open
    monkeypatch.setattr(os, "open", lambda path, *more, **kw: opened.append(real(path, *more, **kw)) or
                        opened[-1])
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(15), 40))
    for _, (part, got) in datasets.prefetch(lambda t: (order[t::60], store.batch(order[t::60])), range(60), 8):
        np.testing.assert_array_equal(got, wanted[part])
    now = len(opened)
    assert len(store.files) == 3 and now <= 3 * 8  # threads that meet at a file's first read each open it
    copied, twice = pickle.loads(pickle.dumps(store)), copy.deepcopy(store)
    np.testing.assert_array_equal(store.batch(order), wanted[order])
    assert len(opened) == now
    still = [f.descriptor for f in store.files.values()]
    store = None
    for file in still:
        with pytest.raises(OSError):
            os.fstat(file)
    for other in (copied, twice):
        np.testing.assert_array_equal(other.slice(7), wanted[7])


def test_no_more_files_stay_open_than_the_limit_has_room_for(tmp_path):
    """In a process of its own: a soft limit below the number of volumes is raised, or else not exhausted."""
    for i in range(40):
        write(tmp_path / "A" / f"scan{i:02d}.nii", ct(i, (20, 16, 3)))
    store = datasets.prepare(tmp_path / "A", tmp_path / "s", "pretrain", size=20)
    (tmp_path / "told").touch()

    def limited() -> None:
        """Of each limit twice the sum of all slices and how many files stay open, into a file."""
        os.closerange(3, 256)  # those of the process that this is a fork of
        with open(tmp_path / "told", "w") as told:
            for hard in (200, 30):
                store = None  # and with it what it holds open
                resource.setrlimit(resource.RLIMIT_NOFILE, (30, hard))
                store = datasets.prepare(tmp_path / "A", tmp_path / "s", "pretrain", size=20)
                for _ in range(2):
                    print(store.batch(np.arange(120)).astype(int).sum(), len(store.files), file=told)
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=limited)
    child.start()
    child.join(60)
    total = str(fill(store).astype(int).sum())
    assert (tmp_path / "told").read_text().split() == [total, "40"] * 2 + [total, "15"] * 2


def test_a_volume_prepared_again_is_read_as_it_was(abdomen, tmp_path):
    """All of it from one file: half of the old one and half of the new would be a volume that never was."""
    store = datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    wanted = fill(store)
    store.slice(0)
    write(abdomen / "part1" / "Case_00001_0000.nii.gz", ct(77, (20, 16, 4)))
    new = datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    np.testing.assert_array_equal(store.batch(np.arange(4)), wanted[:4])
    assert (new.slice(3) != wanted[3]).any()


@pytest.mark.parametrize("damage,match", [
    ("missing", "cannot be read .No such file"), ("short", "ends too early"), ("cut while open", "ends too early"),
    ("long", "ends too early"), ("failing", "cannot be read .Input/output error")])
def test_a_file_that_is_damaged_later_is_named(abdomen, tmp_path, monkeypatch, damage, match):
    store = datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    path = stores.array(store.folder, "Case_00001")
    if damage == "missing":
        path.unlink()
    if damage == "cut while open":
        store.slice(0)
    if damage in ("short", "cut while open"):
        os.truncate(path, 1200)  # a header and two slices of four
    if damage == "long":
        os.truncate(path, 9000)
    if damage == "failing":
        def fail(*args):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(BadInput, match=match) as caught:
        store.slice(3)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_read_that_comes_in_parts_is_put_together(abdomen, tmp_path, monkeypatch):
    store = datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=20)
    wanted, real = fill(store), os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: real(file, [buffers[0][:37]], at))
    np.testing.assert_array_equal(store.batch(np.arange(15)), wanted)


@pytest.mark.parametrize("what,match", [
    ("missing", "no such folder"), ("empty", "no .nii or .nii.gz"), ("window", "--window"), ("label", "has no label"),
    ("shape", "one grid"), ("affine", "one grid"), ("half", "not all whole numbers"),
    ("id", "unknown label id 14"), ("blank", "empty label"), ("layout", "RawData.zip")])
def test_bad_folders_are_refused_in_one_line(btcv, tmp_path, what, match):
    data, kind, window = btcv, "segment", (-175, 250)
    label = btcv / "RawData" / "Training" / "label" / "label0002.nii.gz"
    if what == "missing":
        data = tmp_path / "nowhere"
    if what == "empty":
        (tmp_path / "empty").mkdir()
        data, kind = tmp_path / "empty", "pretrain"
    if what == "layout":
        write(tmp_path / "own" / "scan.nii.gz", ct(1))
        data = tmp_path / "own"
    if what == "window":
        window = (250, -175)
    if what == "label":
        label.unlink()
    if what == "shape":
        write(label, np.ones((20, 16, 5), np.uint8))
    if what == "affine":
        write(label, np.ones((20, 16, 4), np.uint8), AFFINE @ np.diag([-1, 1, 1, 1]))
    if what == "half":
        write(label, np.full((20, 16, 4), 0.5, np.float32))
    if what == "id":
        write(label, np.full((20, 16, 4), 14, np.uint8))
    if what == "blank":
        write(label, np.zeros((20, 16, 4), np.uint8))
    with pytest.raises(BadInput, match=match) as caught:
        datasets.prepare(data, tmp_path / "s", kind, window)
    assert "\n" not in str(caught.value)


def test_crops_are_drawn_as_mmsegmentation_draws_them():
    """configs/_base_/datasets/pascal_voc12.py, without hue, saturation and cat_max_ratio: ranges and probabilities."""
    n = 20_000
    drawn = datasets.draw_crops(np.random.default_rng(0), n)
    brightened, contrasted = drawn["brightness"] != 0, drawn["contrast"] != 1
    for share in (drawn["flip"], brightened, contrasted):
        assert share.mean() == pytest.approx(0.5, abs=0.015)
    uniform = [(drawn["scale"], 0.5, 2.0), *((place, 0, 1) for place in drawn["place"].T),
               (255 * drawn["brightness"][brightened], -32, 32), (drawn["contrast"][contrasted], 0.5, 1.5)]
    for values, low, high in uniform:
        margin = 0.002 * (high - low)
        assert low <= values.min() < low + margin and high - margin < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.015 * (high - low))
        assert values.std() == pytest.approx((high - low) / 12**0.5, rel=0.02)
    columns = [drawn["scale"], *drawn["place"].T, drawn["flip"], drawn["brightness"], drawn["contrast"], brightened,
               contrasted]
    assert np.abs(np.corrcoef(columns) - np.eye(8)).max() < 0.03  # each is drawn for itself
    still = datasets.draw_crops(np.random.default_rng(0), n, flip=False)
    assert not still["flip"].any() and all(np.array_equal(still[k], v) for k, v in drawn.items() if k != "flip")


def test_crops_and_the_order_of_slices_are_new_in_every_iteration_and_pass():
    """Slices of a ramp in both directions: the light of a crop says which part of it is shown."""
    ramp = np.add.outer(np.arange(100, 164), np.arange(0, 32, 0.5)).astype(np.uint8)
    store = SimpleNamespace(slice=lambda i, label=False: np.zeros_like(ramp) if label else ramp)
    args = SimpleNamespace(seed=5, batch_size=4, crop_size=32, whole_slices=False, flip=True)
    crops, again = (datasets.Crops(args, store, np.arange(40, 60), processes.Processes(0, 1, torch.device("cpu")))
                    for _ in range(2))
    shown = torch.cat([crops.apply(t, crops.fetch(t))[0][:, 0].flatten(1) for t in range(30)])
    assert len(shown.unique(dim=0)) > 115  # of 120; two crops may show the same pixels
    passes = np.array([crops.indices(t) for t in range(30)]).reshape(6, 20)
    assert (np.sort(passes, 1) == np.arange(40, 60)).all()
    same = [(a == b).sum() for i, a in enumerate(passes) for b in passes[:i]]  # of 20: one is expected
    assert max(same) < 8 and not (passes == np.arange(40, 60)).all(1).any()
    assert again.indices(17) == crops.indices(17)  # a function of seed and t, whatever was asked before
    assert torch.equal(again.apply(17, again.fetch(17))[0], crops.apply(17, crops.fetch(17))[0])


def test_prefetch_keeps_the_order_and_passes_errors_on():
    assert list(datasets.prefetch(lambda t: t * t, range(3, 20), 3)) == [(t, t * t) for t in range(3, 20)]
    with pytest.raises(ZeroDivisionError):
        list(datasets.prefetch(lambda t: 1 // t, range(-2, 2), 2))


def test_workers_default_to_the_cores_of_a_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(96)), raising=False)
    for processes_here, threads in ((None, 16), ("8", 12), ("64", 1), ("200", 1)):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if processes_here:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes_here)
        assert launch.readers() == threads
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    at_work = threading.Barrier(3)  # passed only by three threads at once
    assert [n for n, _ in datasets.prefetch(lambda t: at_work.wait(60), range(3))] == [0, 1, 2]


def test_audit_names_duplicates_and_odd_volumes(btcv, abdomen, capsys):
    shutil.copy(abdomen / "part1" / "Case_00001_0000.nii.gz", abdomen / "part0" / "Case_00007_0000.nii.gz")
    write(abdomen / "part0" / "Case_00008_0000.nii.gz", ct(8), np.eye(4))
    datasets.main(["audit", "--data", str(abdomen), "--store", str(abdomen.parent / "s")])
    out = capsys.readouterr().out
    assert "5 volumes, 23 slices" in out and "1,062 volumes, 215,325 slices" in out
    assert "Case_00007: the same image as Case_00001" in out and "spacing (1, 1, 1)" in out
    datasets.main(["audit", "--data", str(btcv), "--store", str(btcv.parent / "s")])
    out = capsys.readouterr().out
    total = sum(int((np.asarray(nib.load(p).dataobj) == 6).sum()) for p in btcv.rglob("label*.gz"))
    assert "3,017 slices; by our inference" in out
    assert "train: 2 volumes, 8 slices" in out and f"{total:,d} voxels in 3 volumes" in out


def outcome(capsys, *argv):
    """(exit code, stdout and stderr) of the command."""
    capsys.readouterr()
    code = 0
    try:
        datasets.main([str(a) for a in argv])
    except SystemExit as e:
        code = e.code
    return code, "".join(capsys.readouterr())


def test_both_commands_end_with_what_was_skipped_or_odd(abdomen, btcv, tmp_path, capsys):
    data, store = ("--data", abdomen), ("--store", tmp_path / "s", "--size", 20)
    write(abdomen / "Mask" / "Case_00001.nii.gz", ct(9))
    write(abdomen / "part0" / "Case_00008_0000.nii.gz", ct(8), np.eye(4))
    for command in (("audit", *data), ("prepare", *data, *store)):
        code, out = outcome(capsys, *command)
        assert code == 0
        assert re.search(r"unusable: 0\nwarnings: 1\n .*Case_00008.*placeholder\nno image.*: 1\n .*Mask", out)
    (abdomen / "part0" / "Case_00009_0000.nii.gz").write_bytes(b"")
    assert outcome(capsys, "audit", *data)[0] == 1
    assert "Case_00009_0000.nii.gz: empty file" in outcome(capsys, "prepare", *data, *store)[1]
    (abdomen / "part0" / "Case_00007_0000.nii.gz").symlink_to(tmp_path / "nowhere")
    assert "Case_00007_0000.nii.gz: a broken link" in outcome(capsys, "prepare", *data, *store)[1]
    for command in (("audit", *data), ("prepare", *data, *store)):
        code, out = outcome(capsys, *command, "--skip-bad")
        assert code == 0 and re.search("unusable: 2\n(.*\n)*.*Case_00009_0000.nii.gz: empty file", out)
    label = btcv / "RawData/Training/label"
    (label / "label0002.nii.gz").rename(label / "label0003.nii.gz")
    code, out = outcome(capsys, "audit", "--data", btcv)
    assert code == 1 and "img0002.nii.gz: has no label" in out and "label0003.nii.gz: a label without its image" in out
    command = ("prepare", "--data", btcv, "--store", tmp_path / "b")
    assert "label0003.nii.gz: a label without its image" in outcome(capsys, *command)[1]
    code, out = outcome(capsys, *command, "--skip-bad")
    assert code == 0 and "2 volumes, 8 slices" in out and "unusable: 2" in out
    write(label / "label0002.nii.gz", np.ones((20, 16, 4), np.uint8))  # it has come: no longer left out
    assert "3 volumes, 12 slices" in outcome(capsys, "prepare", "--data", btcv, "--store", tmp_path / "b")[1]


@pytest.mark.parametrize("number, noun, told", [
    (1, "volume", "1 volume"), (0, "slice", "0 slices"), (1062, "volume", "1,062 volumes"), (1, "process", "1 process"),
    (2, "process", "2 processes"), (2, "box", "2 boxes"), (2, "patch", "2 patches")])
def test_a_number_and_what_it_counts(number, noun, told):
    assert counted(number, noun) == told


@pytest.mark.parametrize("what, words", [
    ("plain", []), ("with a space", []), ("labelled", ["--kind", "pretrain"]), ("two folders", ["--kind", "segment"]),
    ("named", ["--labels", "names.txt"]), ("patterns", ["--images", "'s*,*/t.nii.gz'"])])
def test_the_command_that_lists_warnings_runs_as_it_is_printed(abdomen, btcv, tmp_path, capsys, what, words):
    """In a shell, with as many warnings as were counted; with the flags without which it would find something else."""
    data = {"with a space": Path("my ct"), "labelled": btcv}.get(what, Path("D"))
    few, kind, given = ct(1, (20, 16, 2)), "pretrain", {}
    if what == "labelled":
        write(btcv / "RawData/Training/img/img0003.nii.gz", few)
    elif what in ("two folders", "named"):
        kind, training = "segment", btcv / "RawData/Training"
        data.mkdir()
        for part in ("images", "labels"):
            (training / part.replace("images", "img").replace("labels", "label")).rename(data / part)
        write(data / "images/img0003.nii.gz", few)
        write(data / "labels/label0003.nii.gz", np.ones((20, 16, 2), np.uint8))
        if what == "named":
            given = {"labels": Path("names.txt")}
            given["labels"].write_text("".join(f"{i} organ {i}\n" for i in range(1, 14)))
    else:
        for name in ("s1.nii.gz", "x/t.nii.gz", "other.nii.gz"):
            write(data / name, few)
        given = {"images": ("s*", "*/t.nii.gz")} if what == "patterns" else {}
    line = audit.command_line(data, kind, **given)
    assert line == " ".join(["python datasets.py audit --data", "'my ct'" if " " in str(data) else str(data), *words])
    passed = {"names": given.get("labels"), "images": given.get("images")}
    store = datasets.prepare(data, tmp_path / "s", kind, size=20, **passed)
    number = re.search(r"warnings: (\d+) \((.*) lists them\)",
                       "\n".join(audit.remarks(store.volumes, store.skipped, store.task or tasks.BTCV, line)))
    capsys.readouterr()
    assert number[2] == line and outcome(capsys, *shlex.split(line)[2:])[1].count(f"\nwarnings: {number[1]}\n") == 1


def test_that_slices_are_written_is_said_once(abdomen, tmp_path, capsys):
    for told in ("3 volumes prepared", "", "1 volume prepared"):
        if told.startswith("1"):
            write(abdomen / "Case_00009_0000.nii.gz", ct(9))
        datasets.prepare(abdomen, tmp_path / "s", "pretrain", size=200)
        out = capsys.readouterr().out
        assert out.count("later starts read them there") == bool(told) and told in out
    # 4 + 5 + 6 + 4 slices of 200 x 200 pixels, a byte each
    assert f"{tmp_path / 's/pretrain-200'}: 1 volume prepared (1 MB on disk in all)" in out


def test_a_long_list_is_cut_and_written_as_a_whole(tmp_path, capsys):
    """Ids without order, files that cannot be used for one reason: a line each on the screen, all of them in a file."""
    records = [{"id": f"c{i:02d}", "file": f"D/c{i:02d}.nii", "odd": [f"{i} slices only"] * (i % 2)} for i in range(40)]
    bad = [intake.skip(Path(f"D/b{i:02d}.nii"), f"D/b{i:02d}.nii: empty file ({i} bytes)") for i in range(25)]
    assert audit.print_skipped(records, bad, None, tmp_path / "s/audit.txt") == 25
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "unusable: 25", "  25 volumes: empty file (0 bytes) (and alike): b00.nii to b24.nii", "warnings: 20",
        "  20 volumes: 1 slices only (and alike): c01, c03, c05, c07, c09, c11, c13, c15 ...",
        "no image by its name: 0", f"{tmp_path / 's/audit.txt'}: the whole list, one a line"]
    assert (tmp_path / "s/audit.txt").read_text().splitlines() == [
        *(f"unusable: D/b{i:02d}.nii: empty file ({i} bytes)" for i in range(25)),
        *(f"warnings: D/c{i:02d}.nii: {i} slices only" for i in range(1, 40, 2))]
    # nothing is cut: no file; nothing can be written: no failure
    assert audit.print_skipped(records[:2], bad[:20], None, tmp_path / "t/audit.txt") == 20
    assert not (tmp_path / "t").exists() and len(capsys.readouterr().out.splitlines()) == 24
    (tmp_path / "t").touch()
    assert audit.print_skipped(records, bad, None, tmp_path / "t/audit.txt") == 25
    assert "the whole list was not written" in capsys.readouterr().out


def test_what_is_odd_about_many_volumes_is_one_line_with_their_ids(abdomen, capsys):
    for i, slices in ((11, 2), (12, 2), (13, 1), (15, 2), (17, 4)):
        write(abdomen / f"Case_000{i}_0000.nii.gz", ct(i, (20, 16, slices)))
    write(abdomen / "Case_00014_0000.nii.gz", np.abs(ct(14)) // 4)
    code, out = outcome(capsys, "audit", "--data", abdomen)
    listed = out.partition("warnings: 5\n")[2].partition("no image by its name")[0].splitlines()
    assert code == 0 and len(listed) == 2 and "Case_00014_0000.nii.gz: HU from 1 to 249 only, never" in listed[1]
    assert listed[0] == "  4 volumes: 2 slices only (a scout?) (and alike): Case_00011 to Case_00013, Case_00015"


def test_the_audit_of_the_real_ct_is_ten_lines(real_ct, capsys):
    code, out = outcome(capsys, "audit", "--data", real_ct / "AbdomenCT-1K", "--workers", "1")
    assert code == 0 and len(out.splitlines()) <= 10 and "warnings: 93\n" in out
    assert "  78 volumes: HU from 0 to 255 only, never under -200" in out and "Case_00001 to Case_00078\n" in out


def test_audit_fails_on_an_unreadable_volume(abdomen, capsys):
    (abdomen / "part0" / "Case_00009_0000.nii.gz").write_text("no volume")
    with pytest.raises(SystemExit) as caught:
        datasets.main(["audit", "--data", str(abdomen), "--store", str(abdomen.parent / "s")])
    assert caught.value.code == 1 and "unusable: 1" in capsys.readouterr().out


def test_real_ct_folders(real_ct, tmp_path):
    store = datasets.prepare(real_ct / "AbdomenCT-1K", tmp_path / "a", "pretrain", size=256)
    assert len(store.volumes) == 78 and len(store) == 309
    store = datasets.prepare(real_ct / "BTCV", tmp_path / "b", "segment")
    assert len(store.volumes) == 30 and len(store) == 231 and len(store.of(tasks.cases("val"))) > 0
