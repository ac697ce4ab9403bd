import functools
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from scipy.ndimage import label

import datasets
from ct import intake, phantom, phantom_anatomy, phantom_layouts, phantom_scene, pool, tasks
from ct.volumes import BadInput, read_volume

pytestmark = pytest.mark.pool
SMALL = (12, 48, 48)
SPLEEN, RIGHT_KIDNEY, LEFT_KIDNEY, GALLBLADDER, ESOPHAGUS, LIVER, STOMACH = range(1, 8)
AORTA, IVC, VEINS, PANCREAS, RIGHT_ADRENAL, LEFT_ADRENAL = range(8, 14)
# Means over a whole organ, from an unenhanced scan to an arterial phase at 80 kV; stomachs may hold much gas or
# bright contrast, livers much fat.
PLAUSIBLE_HU = {
    SPLEEN: (35, 200), RIGHT_KIDNEY: (20, 330), LEFT_KIDNEY: (20, 330), GALLBLADDER: (-25, 45),
    ESOPHAGUS: (-80, 120), LIVER: (0, 170), STOMACH: (-350, 400), AORTA: (30, 700), IVC: (30, 300),
    VEINS: (30, 330), PANCREAS: (20, 180), RIGHT_ADRENAL: (-10, 140), LEFT_ADRENAL: (-20, 140),
}


@pytest.fixture(scope="module")
def patients():
    """Four patients of the default size."""
    return [phantom_anatomy.patient(seed, number) for seed, number in ((0, 1), (0, 24), (0, 1007), (3, 5))]


def centroid(labels, organ):
    return np.argwhere(labels == organ).mean(0)


def test_all_organs_are_there(patients):
    for hu, labels, spacing in patients:
        assert hu.dtype == np.int16 and labels.dtype == np.uint8
        assert hu.shape == labels.shape and 36 <= hu.shape[0] <= 44 and hu.shape[1:] == (192, 192)
        assert 4.5 < spacing[0] < 6.8 and 1.7 < spacing[1] == spacing[2] < 2.2
        counts = np.bincount(labels.ravel(), minlength=14)
        assert len(counts) == 14 and counts.min() >= 20, counts
        assert counts[LIVER] == counts[1:].max()


def test_each_organ_is_one_piece_or_nearly(patients):
    for _, labels, _ in patients:
        for organ in range(1, 14):
            pieces, n = label(labels == organ, np.ones((3, 3, 3)))
            sizes = np.bincount(pieces.ravel())[1:]
            assert sizes.max() > 0.85 * sizes.sum(), (organ, n, sizes)


def test_hu_of_organs_and_tissues(patients):
    for hu, labels, _ in patients:
        for organ, (low, high) in PLAUSIBLE_HU.items():
            assert low < hu[labels == organ].mean() < high, organ
        assert hu[labels == GALLBLADDER].mean() < hu[labels == SPLEEN].mean()
        assert np.median(hu[:, :8, :8]) < -980  # air
        assert hu[-4:].min() < -800  # lung
        # Fat and soft tissue are the two peaks of the histogram of the body; some bone is above them.
        counts, edges = np.histogram(hu, bins=np.arange(-200, 300, 10))
        assert -130 <= edges[counts[:15].argmax()] <= -80
        assert 30 <= edges[15 + counts[15:].argmax()] <= 140
        assert 0.001 < (hu > 350).mean() < 0.05


def test_grey_values_differ_between_patients_as_physics_has_it():
    """Contrast from 80 to 140 kV against the published falls; patients by number, scenes only (no painting)."""
    scenes = [phantom_scene.Scene(np.random.default_rng(i), (4, 24, 24)) for i in range(400)]
    assert {s.kv for s in scenes} == set(phantom_scene.VOLTAGES)
    low, high = (next(s for s in scenes if s.kv == kv) for kv in (80, 140))
    for material, fall in (("iodine", 0.52), ("bone", 0.35), ("fat", 0.21), ("soft", 0.11)):
        assert 1 - high.contrast(material) / low.contrast(material) == pytest.approx(fall, abs=0.01), material
    unenhanced = [s for s in scenes if s.iodine == 0]
    assert 0.10 < len(unenhanced) / len(scenes) < 0.20
    for s in unenhanced:  # the phase does not matter
        assert s.now((40, 300, 160, 120)) == pytest.approx(40 * s.contrast("soft"))
    amounts = np.array([s.iodine for s in scenes if s.iodine])
    assert amounts.max() / amounts.min() > 2 and 0.6 < amounts.mean() < 1
    livers = np.array([s.liver for s in scenes])
    assert 0.05 < (livers < 40).mean() < 0.2 and 50 < np.median(livers) < 62
    # so one grey value is another organ in another patient
    spleens, aortas = (np.array([s.now(phantom_anatomy.ORGANS[organ][1]) for s in scenes]) for organ in (SPLEEN, AORTA))
    assert np.percentile(aortas, 10) < np.percentile(spleens, 90)
    assert np.ptp(spleens) > 100


def test_noise_is_correlated():
    hu, labels, _ = phantom_anatomy.patient(0, 1)
    inner = labels == LIVER
    for shift in (-1, 1):
        inner = inner & (np.roll(labels, shift, 2) == LIVER)
    left, right = (hu - np.roll(hu, 1, 2))[inner], (np.roll(hu, -1, 2) - hu)[inner]
    assert 6 < hu[labels == LIVER].std() < 45
    assert np.corrcoef(left, right)[0, 1] > -0.35  # differences of white noise: -0.5


def test_anatomy_lies_as_displayed(patients):
    for _, labels, _ in patients:
        z, row, column = np.array([centroid(labels, organ) for organ in range(1, 14)]).T
        z, row, column = (dict(enumerate(axis, 1)) for axis in (z, row, column))
        assert column[LIVER] < 96 < column[SPLEEN]  # the patient's right is on the left
        assert column[RIGHT_KIDNEY] < column[IVC] < column[AORTA] < column[LEFT_KIDNEY]
        assert column[RIGHT_ADRENAL] < column[LEFT_ADRENAL] and column[GALLBLADDER] < column[STOMACH]
        assert row[STOMACH] < row[PANCREAS] < row[AORTA] < row[LEFT_KIDNEY]  # anterior is up
        assert row[GALLBLADDER] < row[SPLEEN]
        assert z[RIGHT_KIDNEY] < z[RIGHT_ADRENAL] and z[LEFT_KIDNEY] < z[LEFT_ADRENAL]  # slices go up
        assert max(z[RIGHT_KIDNEY], z[LEFT_KIDNEY], z[PANCREAS]) < z[SPLEEN] < z[ESOPHAGUS]


def test_lungs_are_at_the_top_only(patients):
    for hu, _, _ in patients:
        inner = hu[:, 40:150, 40:150]
        assert (inner[-1] < -700).mean() > 0.15 > (inner[0] < -700).mean()


def test_patients_vary():
    """The default size keeps within 0.15 and 0.40; few patients on a coarse grid need wider bounds."""
    counts = []
    for number in range(1, 21):
        _, labels, spacing = phantom_anatomy.patient(0, number, (24, 96, 96))
        counts.append(np.bincount(labels.ravel(), minlength=14)[1:] * np.prod(spacing))
    variation = np.std(counts, 0, ddof=1) / np.mean(counts, 0)
    assert (variation > 0.12).all() and (variation < 0.48).all(), variation.round(2)


def test_seeded():
    hu, labels, spacing = phantom_anatomy.patient(5, 7, SMALL)
    again = phantom_anatomy.patient(5, 7, SMALL)
    assert np.array_equal(hu, again[0]) and np.array_equal(labels, again[1]) and spacing == again[2]
    for other in (phantom_anatomy.patient(5, 8, SMALL), phantom_anatomy.patient(6, 7, SMALL)):
        assert other[2] != spacing and (other[0].shape != hu.shape or (other[0] != hu).mean() > 0.3)


def test_written_files_are_the_patients(tmp_path):
    folder = tmp_path / "phantom"
    phantom.write(folder, seed=2, labelled=5, unlabelled=2, shape=SMALL, workers=2)
    training = folder / "BTCV/RawData/Training"
    expected = {folder / f"AbdomenCT-1K/Case_{i:05d}_0000.nii.gz": (1000 + i, 0) for i in (1, 2)}
    expected |= {training / f"img/img{i:04d}.nii.gz": (i, 0) for i in range(1, 6)}
    expected |= {training / f"label/label{i:04d}.nii.gz": (i, 1) for i in range(1, 6)}
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == set(expected)
    seen, affines = set(), {}
    for path, (number, kind) in expected.items():
        image = nib.load(path)
        assert image.get_data_dtype() == (np.int16, np.uint8)[kind]
        assert bytes(image.header["descrip"]).strip(b"\0") == b"phantom"
        assert image.header["qform_code"] > 0 and image.header["sform_code"] > 0
        assert np.allclose(image.header.get_qform(), image.header.get_sform(), atol=1e-3)
        *arrays, spacing = phantom_anatomy.patient(2, number, SMALL)
        to_lps = ornt_transform(io_orientation(image.affine), axcodes2ornt("LPS"))
        data = apply_orientation(np.asanyarray(image.dataobj), to_lps).transpose(2, 1, 0)
        assert np.array_equal(data, arrays[kind])
        assert np.allclose(nib.affines.voxel_sizes(image.as_reoriented(to_lps).affine)[::-1], spacing)
        seen.add(nib.aff2axcodes(image.affine))
        assert np.allclose(affines.setdefault(number, image.affine), image.affine)
        volume = read_volume(path)
        assert volume.is_phantom and np.array_equal(volume.hu, arrays[kind])
        if kind:  # by the affine alone: world coordinates point to the right, anterior, superior
            data = np.asanyarray(image.dataobj)
            liver, spleen, kidney = (nib.affines.apply_affine(image.affine, centroid(data, organ))
                                     for organ in (LIVER, SPLEEN, RIGHT_KIDNEY))
            assert spleen[0] < liver[0] and kidney[1] < liver[1] and kidney[2] < liver[2]
    assert len(seen) == 5


def test_other_layouts_hold_the_same_patients(tmp_path):
    """Their stores, slices and label classes, equal that of BTCV's layout."""
    few = dict(seed=3, labelled=4, unlabelled=0, shape=(4, 64, 64), workers=2)
    phantom.write(tmp_path / "btcv", **few)
    stores = {None: datasets.prepare(tmp_path / "btcv/BTCV", tmp_path / "s", "segment")}
    for layout in phantom_layouts.LAYOUTS:
        phantom.write(tmp_path / layout, **few, layout=layout)
        organs = phantom_layouts.MASKS if layout == "totalsegmentator" else None
        stores[layout] = datasets.prepare(tmp_path / layout, tmp_path / layout / "s", "segment", organs=organs)
    masks = tmp_path / "totalsegmentator/s0002/segmentations"
    whole = np.asarray(nib.load(tmp_path / "btcv/BTCV/RawData/Training/label/label0002.nii.gz").dataobj)
    for organ, number in (("spleen", SPLEEN), ("kidney_right", RIGHT_KIDNEY), ("kidney_left", LEFT_KIDNEY),
                          ("aorta", AORTA), ("adrenal_gland_left", LEFT_ADRENAL)):
        np.testing.assert_array_equal(nib.load(masks / f"{organ}.nii.gz").dataobj, whole == number)
    first = [(v["id"], list(v["checksums"].values()), v["voxels"], v["spacing"]) for v in stores[None].volumes]
    assert np.sum([v["voxels"] for v in stores[None].volumes], 0)[[1, 2, 3, 6]].all()
    for layout, store in stores.items():
        ids = "s" * (layout == "totalsegmentator")
        assert [(v["id"], list(v["checksums"].values()), v["voxels"], v["spacing"]) for v in store.volumes] == [
            (ids + case, *rest) for case, *rest in first]
        assert store.is_phantom and intake.is_phantom(Path(store.data)) and not store.skipped
        assert layout == "totalsegmentator" or store.task.labels == tasks.BTCV.labels


def test_only_the_first_labelled_ids(tmp_path):
    assert phantom.BTCV_IDS[9:11] == (10, 21) and len(phantom.BTCV_IDS) == 30
    phantom.write(tmp_path / "p", labelled=12, unlabelled=0, shape=(4, 16, 16), workers=1)
    ids = sorted(int(p.name[3:7]) for p in tmp_path.rglob("img*.nii.gz"))
    assert ids == [*range(1, 11), 21, 22]


def test_existing_folder_is_refused(tmp_path):
    with pytest.raises(BadInput, match="exists already; remove"):
        phantom.write(tmp_path, labelled=1, unlabelled=0, shape=SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("numbers", [dict(labelled=31), dict(labelled=-1), dict(unlabelled=-1), dict(seed=-1),
                                     dict(labelled=0, unlabelled=0)])
def test_numbers_out_of_range_are_refused(tmp_path, numbers):
    with pytest.raises(BadInput):
        phantom.write(tmp_path / "p", shape=SMALL, **numbers)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_interrupted(tmp_path, monkeypatch):
    def interrupt(iterable, *args, **kwargs):
        next(iter(iterable))
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "tqdm", interrupt)
    with pytest.raises(KeyboardInterrupt):
        phantom.write(tmp_path / "p", labelled=3, unlabelled=0, shape=SMALL, workers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the patch reaches the workers by fork")
def test_nothing_is_left_when_a_worker_fails(tmp_path, monkeypatch):
    real = phantom_anatomy.patient

    def fail(seed, number, shape):
        if number == 2:
            raise OSError("disk full")
        return real(seed, number, shape)

    monkeypatch.setattr(phantom, "patient", fail)
    with pytest.raises(OSError, match="disk full"):
        phantom.write(tmp_path / "p", labelled=3, unlabelled=0, shape=SMALL, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_ensure_makes_it_once_and_accepts_another_process_result(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "new" / "p"
    small = functools.partial(phantom.write, labelled=1, unlabelled=0, shape=SMALL, workers=1)
    monkeypatch.setattr(phantom, "write", small)

    def meanwhile(iterable, *args, **kwargs):  # another process comes first
        folder.mkdir()
        (folder / "theirs").touch()
        yield from iterable

    with monkeypatch.context() as patch:
        patch.setattr(pool, "tqdm", meanwhile)
        assert phantom.ensure(folder) == folder
    assert [p.name for p in folder.parent.iterdir()] == ["p"] and [p.name for p in folder.iterdir()] == ["theirs"]
    (folder / "theirs").unlink()
    folder.rmdir()
    capsys.readouterr()
    assert phantom.ensure(folder) == folder == phantom.ensure(folder)
    assert capsys.readouterr().out.count(f"{folder}: generated CT volumes written (0 MB on disk)") == 1
    assert len(list(folder.rglob("*.nii.gz"))) == 2 and [p.name for p in folder.parent.iterdir()] == ["p"]


def test_command(tmp_path, capsys, monkeypatch, refusal):
    monkeypatch.setattr(phantom, "write", functools.partial(phantom.write, shape=SMALL, workers=1))
    out = str(tmp_path / "p")
    phantom.main(["--out", out, "--labelled", "2", "--unlabelled", "1", "--seed", "4"])
    assert "2 labelled and 1 unlabelled patients" in capsys.readouterr().out
    assert f"{out}: exists already" in refusal(phantom.main, ["--out", out])
    phantom.main(["--out", out + "m", "--labelled", "2", "--layout", "msd"])
    assert "2 labelled and 0 unlabelled patients" in capsys.readouterr().out
    line = refusal(phantom.main, ["--out", out + "n", "--layout", "nnunet", "--unlabelled", "3"])
    assert "takes labelled patients only" in line
