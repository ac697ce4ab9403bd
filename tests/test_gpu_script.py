"""tools/gpu.sh: all that a GPU is asked, at a small size on a CPU; a part that fails takes no other with it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest

from engine import runs
from tools import gpu

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """(how the script ended, the lines that it wrote), with a wheel of a lightly that holds nothing."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "wheels").mkdir()
    with zipfile.ZipFile(folder / "wheels/lightly-0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("lightly/__init__.py", "")
        wheel.writestr("lightly-0.dist-info/METADATA", "Metadata-Version: 2.1\nName: lightly\nVersion: 0\n")
        wheel.writestr("lightly-0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("lightly-0.dist-info/RECORD", "")
    environment = os.environ | {"PYTHON": sys.executable, "WHEELS": str(folder / "wheels"), "COMMIT": "abc",
                                "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", ROOT / "tools/gpu.sh", "out", "--tiny"], cwd=folder, env=environment, text=True,
                          capture_output=True)
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["gpu.jsonl", "gpu.log"], done.stderr
    return done, [json.loads(line) for line in (folder / "out/gpu.jsonl").read_text().splitlines()]


def test_all_parts_run_to_their_end_on_a_cpu(tiny):
    done, lines = tiny
    ended = {line["part"]: line["ended"] for line in lines if "ended" in line}
    assert list(ended) == list(gpu.PARTS)
    assert ended.pop("lightly") == "failed: ModuleNotFoundError: No module named 'lightly.loss'"
    assert set(ended.values()) == {"done"} and done.returncode == 1
    assert lines[0]["commit"] == "abc" and {"hardware", "driver", "date", "precision", "setting"} <= set(lines[0])
    assert {line["part"] for line in lines if "what" in line} == {*ended} - {"machine"}


def test_the_table_holds_every_row(tiny):
    done, lines = tiny
    table = done.stdout[done.stdout.index("hardware: ") :]
    for line in lines:
        if "what" in line:
            assert f"| {line['what']} | {line['target']} | {line['text']} |" in table
    assert "| lightly | | failed: ModuleNotFoundError: No module named 'lightly.loss' | NO |" in table
    assert all(f"{part} " in table.splitlines()[-1] for part in gpu.PARTS)


def test_rows_are_those_of_the_issue(tiny):
    """Each method eager and compiled, one group a pass and all; what is not measured says why."""
    rows = {line["what"]: line for line in tiny[1] if "what" in line}
    off = "compiled (--tiny: the compiler is off)"
    for name, groups, way in [(name, n, "eager") for name in gpu.METHODS for n in (1, 2)] + [
            (name, 2, off) for name in gpu.METHODS] + [("local + ZCA", 1, off)]:
        row = rows[f"{name}, {groups} of 2 groups a pass, {way} / bare"]
        assert row["groups_per_pass"] == groups and row["figure"] == pytest.approx(row["step_ms"] / row["other_ms"])
        assert row["images_per_s"] == pytest.approx(4000 / row["step_ms"])
        assert row["hours"] == pytest.approx(row["step_ms"] / 3.6e6 * 200 * 840 * 256 / 4, rel=0.01)
    targets = {what: row["target"] for what, row in rows.items() if re.match("local .* 2 of 2 .* / bare", what)}
    assert list(targets.values()) == ["at most 1.3", "at most 1.2"]
    assert rows["local + ZCA, 1 of 2 groups a pass, eager / one pass"]["target"] == "at most 1.1"
    assert sum(what.startswith(("linear-", "deeplab")) for what in rows) == 2 * 3
    assert all("no GPU here" in row["text"] for what, row in rows.items() if row["part"] in ("memory", "store"))
    assert rows["training, train_ssl.py --local --zca"]["figure"] > 0


@pytest.fixture
def drive(monkeypatch, tmp_path, capsys):
    """drive(parts, *flags) -> (exit code, lines, what was printed) of a run of these parts: {name: (work, limit)}."""

    def run(parts: dict, *flags: str) -> tuple[int, list[dict], str]:
        monkeypatch.setattr(gpu, "PARTS", {"machine": (lambda table, s: table.line(hardware="h"), 60)} | parts)
        with pytest.raises(SystemExit) as caught:
            gpu.main([str(tmp_path), "--tiny", *flags])
        return int(caught.value.code), runs.read_log(tmp_path / "gpu.jsonl"), capsys.readouterr().out

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


def row(table, s, then=lambda: None) -> None:
    table.add(f"row of {table.part}", 1.0)
    then()


def hang(folder: Path) -> None:
    """For ever, with a child that would go on, too."""
    child = subprocess.Popen(["sleep", "1000"])
    (folder / "child").write_text(str(child.pid))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    child.wait()


def wrong() -> None:
    raise ValueError("this\nand that")


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent's look does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_fails_hangs_or_crashes_loses_no_row(drive, tmp_path):
    code, lines, told = drive({
        "raises": (partial(row, then=wrong), 60), "hangs": (partial(row, then=partial(hang, tmp_path)), 1),
        "crashes": (partial(row, then=lambda: os.kill(os.getpid(), signal.SIGKILL)), 60), "last": (row, 60)})
    assert code == 1
    assert [(line["part"], line["ended"]) for line in lines if "ended" in line] == [
        ("machine", "done"), ("raises", "failed: and that"), ("hangs", "cut off at its limit of 1 s"),
        ("crashes", "killed by SIGKILL"), ("last", "done")]
    assert [line["what"] for line in lines if "what" in line] == [
        f"row of {part}" for part in ("raises", "hangs", "crashes", "last")]
    assert "| hangs | | cut off at its limit of 1 s | NO |" in told and "| row of crashes |  | 1 |  |" in told
    assert not alive(int((tmp_path / "child").read_text()))


def test_a_run_that_is_stopped_prints_its_table(drive):
    stop = partial(row, then=lambda: (os.kill(os.getppid(), signal.SIGTERM), time.sleep(60)))
    code, lines, told = drive({"first": (row, 60), "stopped": (stop, 60), "last": (row, 60)})
    assert code == 128 + signal.SIGTERM and lines[-1]["ended"] == "cut off from outside"
    assert "| row of first |  | 1 |  |" in told and "| row of stopped |  | 1 |  |" in told and "last" not in told


def test_parts_can_be_chosen_and_the_whole_has_a_limit(drive):
    parts = {"first": (row, 60), "slow": (partial(row, then=lambda: time.sleep(60)), 60), "last": (row, 60)}
    code, lines, told = drive(parts, "--only", "slow", "last", "--seconds", "2")
    ended = {line["part"]: line["ended"] for line in lines if "ended" in line}
    assert list(ended) == ["machine", "slow", "last"] and code == 1
    assert ended["slow"].startswith("cut off") and ended["last"] == "not run: the time was over"
    assert drive({"machine": (partial(row, then=wrong), 60), "first": (row, 60)})[1][-1]["part"] == "machine"


def test_without_a_gpu_it_says_so_and_stops(drive, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(gpu.BadInput, match="no GPU here; bash tools/gpu.sh OUT --tiny runs on a CPU"):
        gpu.machine(gpu.Lines("machine", tmp_path / "x"), gpu.Sizes(False))
