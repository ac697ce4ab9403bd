"""tasks.py: what a split holds, how it is drawn once, and what of it is refused or told."""

import math

import pytest

from ct import tasks
from ct.volumes import BadInput

LABELS = {0: "background", 1: "spleen", 7: "liver"}


def task(folder, name="Task 09 (Spleen)"):
    return tasks.of(name, LABELS, folder / "splits")


def ids(count):
    return [f"spleen_{i}" for i in range(count)]


def read(folder):
    return {p.name: p.read_text().splitlines() for p in (folder / "splits").iterdir()}


def test_btcv_is_the_first_task():
    assert tasks.BTCV.ids == tuple(range(14)) and tasks.BTCV.organs[6] == "liver" == tasks.ORGANS[6]
    assert tasks.BTCV.file("12.5", 2) == tasks.SPLITS / "btcv_12.5_2.txt" and tasks.cases("val")[0] == "0035"
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tasks.SPLITS.iterdir()}
    assert tasks.draw_splits(tasks.BTCV, tasks.cases("100") + tasks.cases("val")) == []
    with pytest.raises(BadInput, match="btcv_val.txt.*already there"):
        tasks.draw_splits(tasks.BTCV, tasks.cases("100") + tasks.cases("val"), val=0.5)
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tasks.SPLITS.iterdir()}


@pytest.mark.parametrize("count", [2, 3, 8, 9, 41, 100])
def test_a_fifth_to_validate_on_and_draws_of_the_rest(tmp_path, count):
    assert tasks.draw_splits(task(tmp_path), reversed(ids(count))) == []
    drawn = read(tmp_path)
    assert sorted(drawn) == sorted(f"task_09_spleen_{part}.txt" for part in (
        "train", "val", *(f"{share}_{draw}" for share in ("12.5", "25") for draw in range(3))))
    train, val = drawn["task_09_spleen_train.txt"], drawn["task_09_spleen_val.txt"]
    assert sorted(train + val) == sorted(ids(count)) and len(val) == max(1, round(count / 5))
    for share, part in (("12.5", 8), ("25", 4)):
        draws = [drawn[f"task_09_spleen_{share}_{draw}.txt"] for draw in range(3)]
        assert all(len(set(d)) == len(d) == math.ceil(len(train) / part) and set(d) <= set(train) for d in draws)
        assert len(train) < 9 or len({tuple(d) for d in draws}) == 3
        assert [task(tmp_path).cases(share, draw) for draw in range(3)] == draws


def test_the_draw_depends_on_the_ids_alone(tmp_path):
    for folder in ("a", "b"):
        tasks.draw_splits(task(tmp_path / folder), ids(30))
    assert read(tmp_path / "a") == read(tmp_path / "b")
    tasks.draw_splits(task(tmp_path / "c"), ids(31))
    assert read(tmp_path / "a") != read(tmp_path / "c")


def test_files_are_written_once_and_may_be_edited(tmp_path):
    spleen = task(tmp_path)
    tasks.draw_splits(spleen, ids(20))
    moved = spleen.cases("val")[0]
    spleen.file("val").write_text("\ufeff" + "\r\n".join(spleen.cases("val")[1:]) + " \r\n\r\n", encoding="utf-8")
    spleen.file("100").write_text("\n".join([moved, *spleen.cases("100")]))
    spleen.file("25", 1).unlink()
    edited = {name: lines for name, lines in read(tmp_path).items()}
    assert tasks.draw_splits(spleen, ids(20)) == []
    again = read(tmp_path)
    assert {name: lines for name, lines in again.items() if "25_1" not in name} == edited
    assert len(spleen.cases("val")) == 3 and len(spleen.cases("100")) == 17 and len(spleen.cases("25", 1)) == 5
    assert tasks.draw_splits(spleen, ids(22)) == ["in no split: 2 volumes (spleen_20 ...)"]


@pytest.mark.parametrize("flags", [{"val": 0.3}, {"patients": r"spleen_\d"}, {"val_cases": "file"}])
def test_flags_that_would_give_other_splits_are_refused(tmp_path, flags):
    spleen = task(tmp_path)
    tasks.draw_splits(spleen, ids(20))
    before = read(tmp_path)
    if "val_cases" in flags:
        (tmp_path / "file").write_text("spleen_1\nspleen_2\n")
        flags = {"val_cases": tmp_path / "file"}
    with pytest.raises(BadInput, match=r"task_09_spleen_val.txt, .*already there.*leave these flags out") as caught:
        tasks.draw_splits(spleen, ids(20), **flags)
    assert read(tmp_path) == before and "\n" not in str(caught.value)
    (tmp_path / "same").write_text("\n".join(reversed(spleen.cases("val"))))
    for same in ({"val": 0.2}, {"val_cases": tmp_path / "same"}, {"val": 0.21}, {"patients": ".*"}):
        assert tasks.draw_splits(spleen, ids(20), **same) == []


def test_a_file_of_cases_decides(tmp_path):
    (tmp_path / "cases").write_text("spleen_3\nspleen_11\n\n")
    tasks.draw_splits(task(tmp_path), ids(12), val_cases=tmp_path / "cases")
    assert task(tmp_path).cases("val") == ["spleen_11", "spleen_3"] and len(task(tmp_path).cases("100")) == 10
    assert tasks.draw_splits(task(tmp_path), ids(12)) == []  # later, without the flag


def test_patients_stay_together_where_a_pattern_says_so(tmp_path):
    scans = [f"{i:04d}_{phase}" for i in range(20) for phase in ("arterial", "venous")]
    told = tasks.draw_splits(task(tmp_path / "apart"), scans)
    assert len(told) == 1 and "--patient-regex" in told[0] and "_arterial, " in told[0]
    for pattern in (r"\d+", r"(\d+)_.*", r"^[^_]+"):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        assert tasks.draw_splits(task(folder), scans, patients=pattern) == []
        val = task(folder).cases("val")
        assert len(val) == 8 and len({name[:4] for name in val}) == 4


def test_scans_of_one_patient_are_known_by_their_suffix():
    together = [["0012", "0012_venous"], ["a-7_pre", "a-7_post_contrast"], ["s0001-art", "s0001-VEN"]]
    alone = ["liver_1", "liver_2", "FLARE22_Tr_0001", "FLARE22_Tr_0002", "Patient_a", "Patient_b", "0012_2", "7_1", "7"]
    assert sorted(tasks.siblings([*sum(together, []), *alone]).values()) == sorted(together)


@pytest.mark.parametrize("what, match", [
    ("one volume", "1 patient; a split needs two"), ("unknown case", "cases: spleen_99 is not among the volumes"),
    ("all cases", "cases: no volume is left to train on"), ("no case", "cases: no volume in it"),
    ("no file", "nowhere: cannot be read"), ("both", "--val and --val-cases: give one"),
    ("pattern", r"--patient-regex \(: not a regular expression"), ("no match", "--patient-regex x: matches nothing in"),
    ("one patient", "1 patient; a split needs two"), ("torn", "cases: names only some of spleen_1, spleen_10, sp")])
def test_what_cannot_be_drawn_is_one_line(tmp_path, what, match):
    cases = tmp_path / "cases"
    cases.write_text({"unknown case": "spleen_99", "all cases": "\n".join(ids(12)), "no case": "\n",
                      "torn": "spleen_1"}.get(what, "spleen_1"))
    flags = {"unknown case": {"val_cases": cases}, "all cases": {"val_cases": cases}, "no case": {"val_cases": cases},
             "no file": {"val_cases": tmp_path / "nowhere"}, "both": {"val": 0.2, "val_cases": cases},
             "pattern": {"patients": "("}, "no match": {"patients": "x"}, "one patient": {"patients": "spleen"},
             "torn": {"val_cases": cases, "patients": r"_\d"}}.get(what, {})
    with pytest.raises(BadInput, match=match) as caught:
        tasks.draw_splits(task(tmp_path), ids(1 if what == "one volume" else 12), **flags)
    assert "\n" not in str(caught.value) and not (tmp_path / "splits").exists()


def test_splits_that_were_edited_wrongly_are_refused(tmp_path):
    spleen = task(tmp_path)
    with pytest.raises(BadInput, match="val.txt: no such split; there are none"):
        spleen.cases("val")
    tasks.draw_splits(spleen, ids(12))
    with pytest.raises(BadInput, match=r"50_0.txt: no such split; there are task_09_spleen_12.5_0, "):
        spleen.cases("50")
    shared = spleen.cases("val")[0]
    spleen.file("25").write_text("\n".join([*spleen.cases("25"), shared]))
    with pytest.raises(BadInput, match=f"25_0.txt: {shared} is in .*val.txt, too"):
        spleen.cases("25")
    spleen.file("25").write_text("")
    with pytest.raises(BadInput, match="25_0.txt: no volume in it"):
        spleen.cases("25")
