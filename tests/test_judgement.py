"""judgement.py: what the bulk of the voxels says. The bodies are mixtures of tissues at their textbook HU."""

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ct import intake, judgement, prepare, reading
from ct.volumes import BadInput, read_volume

AIR, LUNG, FAT, SOFT, CONTRAST, MARROW, BONE, METAL = ((-1000, 12), (-850, 70), (-100, 15), (45, 20), (170, 30),
                                                       (250, 100), (1000, 300), (2800, 200))  # mean, deviation in HU
BODIES = {  # share of the voxels that each tissue has
    "abdomen": {AIR: 0.4, FAT: 0.25, SOFT: 0.3, MARROW: 0.04, BONE: 0.01},
    "with contrast": {AIR: 0.4, FAT: 0.2, SOFT: 0.2, CONTRAST: 0.15, MARROW: 0.04, BONE: 0.01},
    "chest": {AIR: 0.2, LUNG: 0.35, FAT: 0.15, SOFT: 0.25, MARROW: 0.04, BONE: 0.01},
    "crop of a chest": {LUNG: 0.6, FAT: 0.1, SOFT: 0.25, CONTRAST: 0.05},
    "head": {AIR: 0.45, FAT: 0.05, SOFT: 0.35, MARROW: 0.05, BONE: 0.1},
    "pelvis with metal": {AIR: 0.3, FAT: 0.3, SOFT: 0.3, MARROW: 0.06, BONE: 0.02, METAL: 0.02},
    "arm in air": {AIR: 0.94, FAT: 0.02, SOFT: 0.03, BONE: 0.01}}


def body(name: str, n: int = 20_000) -> np.ndarray:
    rng = np.random.default_rng(0)
    hu = np.concatenate([rng.normal(*tissue, int(share * n)) for tissue, share in BODIES[name].items()])
    return np.clip(np.rint(hu), -1024, 3071)


def padded(values: np.ndarray, value: float, share: float = 0.2) -> np.ndarray:
    return np.where(np.random.default_rng(1).random(len(values)) < share, value, values)


def verdict(values: np.ndarray) -> str:
    """The words of a refusal, those of what is odd, or ''."""
    ascending = np.sort(values.astype(np.float32))
    try:
        judgement.refuse(Path("a.nii"), ascending)
    except BadInput as e:
        return f"refused: {e}"
    return "; ".join(judgement.odd(ascending))


FINE = {"as it is": lambda hu: hu, "padding -2000": lambda hu: padded(hu, -2000),
        "padding -3024, half of it": lambda hu: padded(hu, -3024, 0.5), "field of view": lambda hu: padded(hu, -1024),
        "noise": lambda hu: hu + np.random.default_rng(2).normal(0, 60, len(hu)),
        "bone window": lambda hu: np.clip(hu, -450, 1050), "wide window": lambda hu: np.clip(hu, -1000, 1000),
        "window": lambda hu: np.clip(hu, -200, 300), "body alone": lambda hu: np.where(hu < -300, -1024, hu)}


@pytest.mark.parametrize("how", FINE)
@pytest.mark.parametrize("name", BODIES)
def test_no_alarm_for_any_part_of_the_body_nor_for_paddings_and_windows(name, how):
    assert verdict(FINE[how](body(name))) == ""


SHIFTED, TWICE = "1250 HU, where only bone is; stored without its intercept: subtract 1024", "twice: add 1024"
WRONG = {  # what was done to the HU -> what is said
    "no intercept": (lambda hu: hu + 1024, "refused: .*" + SHIFTED),
    "no intercept of 1000, clipped": (lambda hu: np.maximum(hu + 1000, 0), "refused: .*" + SHIFTED),
    "no intercept, padding -2000": (lambda hu: padded(hu + 1024, -2000), "refused: .*" + SHIFTED),
    "no intercept, padding -1024": (lambda hu: padded(hu + 1024, -1024), "refused: .*" + SHIFTED),
    "intercept twice": (lambda hu: hu - 1024, "refused: .*" + TWICE),
    "intercept twice, clipped": (lambda hu: np.maximum(hu - 1024, -2048), "refused: .*" + TWICE),
    "padding -32768": (lambda hu: padded(hu, -32768), r"refused: a.nii: a padding under -8192 HU, -32768, in 2\d"),
    "padding -10000": (lambda hu: padded(hu, -10000), "refused: a.nii: a padding under -8192 HU, -10000"),
    "padding as unsigned": (lambda hu: padded(hu, 63536), "refused: .*over 32767 HU, 63536, -2000 read as unsigned"),
    "all as unsigned": (lambda hu: np.where(hu < 0, hu + 65536, hu), "refused: .*over 32767"),
    "0..1": (lambda hu: np.clip((hu + 175) / 425, 0, 1), "refused: .*normalised"),
    "0..1, padding -1024": (lambda hu: padded(np.clip((hu + 175) / 425, 0, 1), -1024), "refused: .*beside a padding"),
    "unit deviation": (lambda hu: (hu - hu.mean()) / hu.std(), "refused: .*normalised"),
    "thousandths": (lambda hu: hu / 1000, "refused: .*normalised"),
    "0..255": (lambda hu: np.rint(np.clip((hu + 175) / 425, 0, 1) * 255), "^HU from 0 to 255 only, never under -200"),
    "0..255, padding -2000": (lambda hu: padded(np.rint(np.clip((hu + 175) / 425, 0, 1) * 255), -2000),
                              "^HU from 0 to 255 only, never under -200 but for a padding of -2000"),
    "tenths": (lambda hu: hu / 10, "never under -200"),
    "double": (lambda hu: 2 * hu, "lie under -1150 HU, less than air; another slope"),
    "half": (lambda hu: hu / 2, "no air at -1000 HU, but much at -700 to -350; another slope"),
    "raw, twice the slope": (lambda hu: 2 * hu + 1024, "refused|over 650 HU|most of the body at about|less than air"),
    "cone beam, +300": (lambda hu: np.where(hu > -500, hu + 300, hu), "most of the body at about [23]"),
    "cone beam, -300": (lambda hu: np.where(hu > -500, hu - 300, hu), "most of the body at about -[234]"),
    "inverted": (lambda hu: -hu, "refused: .*inverted|over 650 HU|body at about 9")}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("name", ["abdomen", "with contrast", "chest", "head", "pelvis with metal"])
def test_what_is_no_hu_is_refused_or_told_with_its_reason_and_one_voxel_changes_nothing(name, how):
    change, expected = WRONG[how]
    values = change(body(name))
    told = verdict(values)
    assert re.search(expected, told), told
    for value in (-32768, -9000, -1000, 0, 3071, 40000):
        assert re.sub(r"\d", "", verdict(np.append(values, value))) == re.sub(r"\d", "", told)


def test_one_voxel_far_out_is_no_reason_to_refuse(tmp_path):
    stored = np.random.default_rng(0).permutation(body("abdomen", 16_000)).reshape(20, 20, 40).astype(np.int32)
    for value in (-32768, 70000):
        stored[3, 4, 5] = value
        nib.save(nib.Nifti1Image(stored, np.diag([-1.5, -1.5, 5, 1])), tmp_path / "a.nii")
        read, _, (low, high), odd = reading.read_ct(tmp_path / "a.nii", prepare.WINDOW)
        assert odd == [] and value in (low, high) and judgement.bulk(read.sample)[0] < -1000


@pytest.mark.parametrize("slope", [1, -1, 0.5])
def test_the_sample_is_in_hu_and_ascending(tmp_path, slope):
    stored = np.random.default_rng(0).integers(-500, 500, (33, 70, 40)).astype(np.int16)
    image = nib.Nifti1Image(stored, np.diag([-1, -1, 2, 1]))
    image.header.set_slope_inter(slope, 10)
    nib.save(image, tmp_path / "a.nii")
    raw = nib.load(tmp_path / "a.nii")
    expected = np.sort(np.asarray(raw.get_fdata())[:, ::2, ::3], axis=None)
    sample = read_volume(tmp_path / "a.nii").sample
    assert len(sample) == 33 * 35 * 14 and sample.dtype == np.float32
    np.testing.assert_allclose(sample, expected, atol=1e-3)


def test_real_ct_raises_no_alarm_and_its_raw_values_are_refused(real_ct):
    for name in ("example_ct", "example_ct_sm", "aorta_ct"):
        read = read_volume(real_ct / f"nifti/{name}.nii.gz")
        assert intake.judge(read) == []
        for values, expected in ((read.sample + 1024, "subtract 1024"), (read.sample - 1024, "add 1024")):
            assert expected in verdict(values) and expected in verdict(padded(values, -3024))
