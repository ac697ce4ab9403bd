"""volumes.py: every stored form of one volume reads into one array; damaged files are refused by name."""

import gzip
import os
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from ct import reading, volumes
from ct.label_maps import read_labels
from ct.volumes import BadInput, read_volume, write_labels

RAS = np.diag([0.8, 0.7, 2.5, 1.0])
RAS[:3, 3] = (-10, 20, 30)


def scene(seed=0, shape=(7, 6, 5)):
    """int16 HU in RAS order (x towards Right... the file's first axis runs to the patient's right)."""
    return np.random.default_rng(seed).integers(-1000, 1500, shape).astype(np.int16)


def stored(data, axes, affine=RAS):
    """The same voxels of a RAS array laid out along other axes, with the affine that says so."""
    move = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes))
    return nib.Nifti1Image(apply_orientation(data, move), affine @ inv_ornt_aff(move, data.shape))


def expected(data):
    """RAS array -> (Z, Y, X), row 0 anterior, column 0 the patient's right: by hand, no nibabel."""
    return data[::-1, ::-1, :].transpose(2, 1, 0).astype(np.float32)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "SPR", "PIR", "ASL"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_every_stored_orientation_reads_into_one_array(tmp_path, axes, suffix):
    nib.save(stored(scene(), axes), tmp_path / f"a{suffix}")
    volume = read_volume(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(volume.hu, expected(scene()))
    assert volume.hu.dtype == np.float32 and volume.hu.flags.c_contiguous
    np.testing.assert_allclose(volume.spacing, (2.5, 0.7, 0.8), rtol=1e-6)


def test_display_orientation_is_the_radiologists(tmp_path):
    """A voxel at the patient's right, anterior, inferior corner lands at [0, 0, 0], judged by world mm."""
    data = np.zeros((4, 4, 4), np.int16)
    data[3, 3, 0] = 99  # RAS: the last x is rightmost, the last y most anterior, the first z lowest
    for axes in ("RAS", "LPS", "SAL"):
        nib.save(stored(data, axes), tmp_path / "a.nii")
        assert read_volume(tmp_path / "a.nii").hu[0, 0, 0] == 99


def test_oblique_affine_goes_to_the_nearest_axes(tmp_path):
    a = np.deg2rad(20)
    turn = np.array([[np.cos(a), -np.sin(a), 0, 0], [np.sin(a), np.cos(a), 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    nib.save(stored(scene(), "LPS", turn @ RAS), tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.hu, expected(scene()))
    np.testing.assert_allclose(volume.spacing, (2.5, 0.7, 0.8), rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64, ">i2", ">f4"])
def test_types_and_byte_orders_read_alike(tmp_path, dtype):
    header = nib.Nifti1Header(endianness=">" if str(dtype).startswith(">") else "<")
    header.set_data_dtype(np.dtype(dtype))
    nib.save(nib.Nifti1Image(scene().astype(dtype), RAS, header), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").hu, expected(scene()))


def test_scale_and_intercept(tmp_path):
    stored_values = (scene().astype(int) + 1024).astype(np.uint16) * 2
    image = nib.Nifti1Image(stored_values, RAS)
    image.header.set_slope_inter(0.5, -1024)
    nib.save(image, tmp_path / "a.nii")  # nibabel keeps raw integers only through the header it writes itself
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[352:] = stored_values.tobytes(order="F")
    raw[112:120] = np.array([0.5, -1024], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii").hu, expected(scene()))


@pytest.mark.parametrize("dtype", ["<i2", "<u2", ">i4", "<f4"])
def test_a_volume_with_a_slope_needs_no_more_memory_than_one_without(tmp_path, dtype):
    """Its numbers, their 8-bit levels, and blocks of the file: not a second time its numbers, nor as floats."""
    header = nib.Nifti1Header(endianness="<>"[dtype[0] == ">"])
    header.set_data_dtype(np.dtype(dtype))
    data = np.random.default_rng(0).integers(0, 1500, (160, 160, 160)).astype(dtype)
    nib.save(nib.Nifti1Image(data, RAS, header), tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[112:120] = np.array([2, -1024], dtype[0] + "f4").tobytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(raw, 1))
    tracemalloc.start()
    try:
        slices, low, high = reading.levels(read_volume(tmp_path / "a.nii.gz"), (-175, 250))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (low, high) == (2.0 * data.min() - 1024, 2.0 * data.max() - 1024) and slices.nbytes == data.size
    assert peak < 1.15 * data.nbytes + slices.nbytes + 4 * volumes.BLOCK


def test_scaling_to_infinity_is_refused(tmp_path):
    """Of integers, too, whose ends alone are looked at first."""
    nib.save(nib.Nifti1Image(scene(), RAS), tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[112:120] = np.array([3e38, 0], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    with pytest.raises(BadInput, match=rf"a.nii: {(np.abs(scene()) > 1).sum()} of {scene().size} voxels are NaN or"):
        read_volume(tmp_path / "a.nii")


def test_one_time_point_and_nifti2(tmp_path):
    nib.save(nib.Nifti1Image(scene()[..., None], RAS), tmp_path / "t.nii.gz")
    nib.save(nib.Nifti2Image(scene(), RAS), tmp_path / "2.nii.gz")
    for name in ("t.nii.gz", "2.nii.gz"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).hu, expected(scene()))


def test_sform_wins_over_a_qform_that_disagrees(tmp_path):
    image = nib.Nifti1Image(scene(), RAS)
    image.set_sform(RAS, 1)
    image.set_qform(np.diag([-1.0, -1.0, 1.0, 1.0]), 1)
    nib.save(image, tmp_path / "a.nii")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii").hu, expected(scene()))


def test_names_with_spaces_and_letters_of_any_kind_and_links_to_them(tmp_path):
    path = tmp_path / "Bäuche 腹" / "Fall 1 (ö).nii.gz"
    path.parent.mkdir()
    nib.save(nib.Nifti1Image(scene(), RAS), path)
    (tmp_path / "link.nii.gz").symlink_to(path)
    for p in (path, tmp_path / "link.nii.gz"):
        np.testing.assert_array_equal(read_volume(p).hu, expected(scene()))


def test_long_extensions_and_a_handedness_of_zero_are_read(tmp_path):
    image = nib.Nifti1Image(scene(), None)
    image.set_qform(RAS, 1)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"long" * 500))
    nib.save(image, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[76:80] = np.array(0, "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii").hu, expected(scene()))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR"])
def test_labels_go_back_onto_the_files_own_grid(tmp_path, axes):
    nib.save(stored(scene(), axes), tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    labels = np.random.default_rng(1).integers(0, 14, volume.hu.shape)
    write_labels(tmp_path / "l.nii.gz", labels, volume)
    written, image = nib.load(tmp_path / "l.nii.gz"), nib.load(tmp_path / "a.nii.gz")
    assert written.get_data_dtype() == np.uint8 and written.shape == image.shape
    np.testing.assert_allclose(written.affine, image.affine, atol=1e-5)
    np.testing.assert_array_equal(read_labels(tmp_path / "l.nii.gz", volume, 14), labels)
    # a voxel's HU and its label sit at the same index of the two files
    own = np.asarray(image.dataobj)
    marked = np.unravel_index(np.argmax(own), own.shape)
    assert written.dataobj[marked] == labels[np.unravel_index(np.argmax(volume.hu), volume.hu.shape)]
    assert sorted(os.listdir(tmp_path)) == ["a.nii.gz", "l.nii.gz"]


def header_of(image, sform, qform, codes, **fields):
    """The image's header with these two affines (a NIfTI-1 qform holds no shear: its rotation and spacing only)."""
    header = image.header
    header.set_qform(qform, codes[1], strip_shears=True)
    header.set_sform(sform, codes[0])
    for name, value in fields.items():
        header[name] = value


SHEARED = RAS + np.array([[0, 0, 0.6, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
TURN = np.array([[np.cos(0.3), -np.sin(0.3), 0, 0], [np.sin(0.3), np.cos(0.3), 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
MOVED = RAS + np.array([[0, 0, 0, 7], [0, 0, 0, -3], [0, 0, 0, 11], [0, 0, 0, 0]])
LPS = RAS @ np.diag([-1, -1, 1, 1])
HEADERS = {"sheared": (SHEARED, RAS, (1, 1)), "sheared and moved": (SHEARED, MOVED, (2, 1)),
           "differing": (RAS, MOVED, (1, 1)), "differing codes": (RAS, MOVED, (4, 2)), "RAS": (RAS, RAS, (1, 1)),
           "LPS": (LPS, LPS, (1, 1)), "oblique": (TURN @ RAS, TURN @ RAS, (1, 1)), "sform": (TURN @ LPS, RAS, (3, 0)),
           "qform": (np.zeros((4, 4)), TURN @ LPS, (0, 1)), "neither": (np.zeros((4, 4)), RAS, (0, 0))}


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("case", HEADERS)
def test_labels_have_the_place_of_their_volume_for_every_reader(tmp_path, case, kind):
    """Both forms, their codes and the spacing as they stand in the volume's header; SimpleITK sees one grid."""
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed: pip install SimpleITK")
    image = kind(scene(), None)
    header_of(image, *HEADERS[case], xyzt_units=10)
    nib.save(image, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    labels = np.random.default_rng(1).integers(0, 14, volume.stored.shape)
    write_labels(tmp_path / "l.nii.gz", labels, volume)
    source, written = nib.load(tmp_path / "a.nii").header, nib.load(tmp_path / "l.nii.gz").header
    assert type(source) is type(written)
    for field in list(source.keys()):
        if field in ("pixdim", "xyzt_units") or field[:3] in ("qfo", "sfo", "qua", "qof", "sro"):
            np.testing.assert_array_equal(written[field], source[field], field)
    np.testing.assert_array_equal(read_labels(tmp_path / "l.nii.gz", volume, 14), labels)
    if kind is nib.Nifti1Image:  # ITK reads no other
        one, other = (sitk.ReadImage(str(tmp_path / name)) for name in ("a.nii", "l.nii.gz"))
        assert one.GetSize() == other.GetSize() and one.GetDirection() == other.GetDirection()
        for corner in ((0, 0, 0), tuple(n - 1 for n in one.GetSize())):
            places = (x.TransformIndexToPhysicalPoint(corner) for x in (one, other))
            np.testing.assert_array_equal(*places)


def test_labels_of_a_grid_longer_than_nifti_1_holds(tmp_path):
    nib.save(nib.Nifti2Image(np.zeros((2, 2, 33_000), np.int16), RAS), tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    write_labels(tmp_path / "l.nii.gz", np.ones(volume.stored.shape), volume)
    assert read_labels(tmp_path / "l.nii.gz", volume, 14).all()


def make_bad(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "bad.nii.gz"
    data = np.random.default_rng(0).integers(-1000, 1000, (24, 24, 12)).astype(np.int16)
    if kind == "2-D":
        data = data[..., 0]
    if kind == "5-D":
        data = data[..., None, None].repeat(2, 4)
    if kind == "time":
        data = data[..., None].repeat(3, 3)
    if kind in ("NaN", "infinity"):
        data = data.astype(np.float32)
        data[3, 4, 5] = np.nan if kind == "NaN" else np.inf
    if kind == "RGB":
        data = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(data, RAS), path)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    if kind == "10 TB":
        raw[40:56] = np.array([3, 32000, 32000, 5000, 1, 1, 1, 1], "<i2").tobytes()
    if kind == "affine":
        raw[280:284] = np.array([np.nan], "<f4").tobytes()
    if kind == "type":
        raw[70:72] = np.array([77], "<i2").tobytes()
    fields = {"bits": (72, "<i2", 32), "form_code": (254, "<i2", 77), "metres": (123, "u1", 3),
              "scl_inter": (112, "<f4", [1, np.inf]), "starts at": (108, "<f4", 100)}
    if kind in fields:
        at, dtype, value = fields[kind]
        value = np.array(value, dtype).tobytes()
        raw[at : at + len(value)] = value
    quaternion = {"spacing of": (80, -1), "damaged qform": (256, 5)}  # where the sform is not set
    if kind in quaternion:
        raw[252:256] = np.array([1, 0], "<i2").tobytes()
        at, value = quaternion[kind]
        raw[at : at + 4] = np.array(value, "<f4").tobytes()
    if kind == "longer than":
        raw += b"more"
    if kind in ("10 TB", "affine", "type", "longer than", *quaternion, *fields):
        path.write_bytes(gzip.compress(bytes(raw)))
    if kind == "text":
        path.write_text("this is no volume\n" * 50)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    if kind == "zero":
        path.write_bytes(b"")
    if kind == "short":
        path.write_bytes(gzip.compress(bytes(raw[:-100])))
    if kind == "missing":
        path.unlink()
    return path


@pytest.mark.parametrize("kind", ["2-D", "5-D", "time", "NaN", "infinity", "RGB", "10 TB", "affine", "type",
                                  "text", "truncated", "zero", "short", "missing", "bits", "form_code", "metres",
                                  "starts at", "scl_inter", "spacing of",
                                  "damaged qform", "longer than"])
def test_bad_files_are_refused_in_one_line_with_their_name(tmp_path, kind):
    path = make_bad(tmp_path, kind)
    with pytest.raises(BadInput) as caught:
        read_volume(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    words = ("bits", "form_code", "metres", "scl_inter", "starts at", "spacing of", "damaged qform",
             "longer than")
    assert kind not in words or kind in str(caught.value)


def test_members_padding_and_small_blocks_are_read_as_gzip_reads_them(tmp_path, monkeypatch):
    """Two members one behind the other, and zeros at the end, as tapes and some writers leave them."""
    nib.save(nib.Nifti1Image(scene(), RAS), tmp_path / "a.nii")
    raw = (tmp_path / "a.nii").read_bytes()
    for block in (1, 7, 1 << 20):
        monkeypatch.setattr(volumes, "BLOCK", block)
        for zipped in (gzip.compress(raw[:500]) + gzip.compress(raw[500:]), gzip.compress(raw) + bytes(50)):
            (tmp_path / "a.nii.gz").write_bytes(zipped)
            assert gzip.decompress(zipped) == raw
            np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").hu, expected(scene()))
        for zipped in (gzip.compress(raw) + b"more", gzip.compress(raw)[:-1], gzip.compress(raw)[:-8] + bytes(8)):
            (tmp_path / "a.nii.gz").write_bytes(zipped)
            with pytest.raises(BadInput, match="damaged gzip file"):
                read_volume(tmp_path / "a.nii.gz")


def test_no_flipped_bit_is_read_as_valid(tmp_path):
    nib.save(nib.Nifti1Image(scene(shape=(20, 20, 10)), RAS), tmp_path / "a.nii.gz")
    good, truth = (tmp_path / "a.nii.gz").read_bytes(), read_volume(tmp_path / "a.nii.gz").hu
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(100):
        raw = bytearray(good)
        at = int(rng.integers(len(raw)))
        raw[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "b.nii.gz").write_bytes(raw)
        try:
            # only gzip's own name, time and flags may change without harm
            np.testing.assert_array_equal(read_volume(tmp_path / "b.nii.gz").hu, truth)
        except BadInput as e:
            refused += 1
            assert "b.nii.gz" in str(e)
    assert refused > 90


def test_labels_that_do_not_fit_are_refused(tmp_path):
    nib.save(nib.Nifti1Image(scene(), RAS), tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    moved = RAS.copy()
    moved[0, 3] += 1
    good = np.zeros((7, 6, 5))
    half = good.copy()
    half[0, 0, 0] = 0.5
    other = RAS @ np.diag([-1, 1, 1, 1])
    other[0, 3] = 0.8 * 6 - 10  # the same places, stored the other way round
    for word, data, affine in (("grid", good[:-1], RAS), ("affine", good, moved), ("whole", half, RAS),
                               ("affine", good, other),
                               ("14", good + 14, RAS), ("-1", good - 1, RAS)):
        nib.save(nib.Nifti1Image(data.astype(np.float32), affine), tmp_path / "l.nii.gz")
        with pytest.raises(BadInput, match=word) as caught:
            read_labels(tmp_path / "l.nii.gz", volume, 14)
        assert "l.nii.gz" in str(caught.value)


def test_real_ct_reads(real_ct):
    """RAS and LPS files of real patients: the spine (bone) lies posterior of the middle in every one."""
    for path in sorted((real_ct / "nifti").glob("*ct*.nii.gz")):
        if "label" in path.name:
            continue
        volume = read_volume(path)
        rows = np.nonzero(volume.hu > 300)[1]
        assert volume.hu.min() < -200 and rows.mean() > 0.45 * volume.hu.shape[1]
