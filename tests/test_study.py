"""tools/study.py: what it runs, in which order and beside what, and what its tables say of it."""

import csv
import json
import os
import signal
import statistics
import sys
from pathlib import Path

import pytest

import train_seg
import train_ssl
from ct.volumes import BadInput
from engine import figures, runs
from tools import study

SMALL = dict(arch="resnet_basic", image_size=32, batch_size=8, bn_group=4, lr=0.01, queue=16, ema=0.9, size=32)
MAINS = {"train_ssl.py": train_ssl.main, "train_seg.py": train_seg.main}


@pytest.fixture
def small(monkeypatch, small_networks):
    """Settings of seconds, and commands that run in this process, one after the other; they are kept in the list."""
    monkeypatch.setattr(study, "PRETRAINING", SMALL)
    monkeypatch.setattr(study, "SIDES", (32,))
    monkeypatch.setattr(study, "HEAD", study.HEAD | dict(iterations=1, split="12.5", draw=0))
    monkeypatch.setattr(study, "ROWS", {"aligned": ["--local", "--geometric", "--patches", "4"]})
    done = []

    def beside(chains, jobs, log):
        for chain in chains:
            for argv in chain:
                MAINS[Path(argv[1]).name](argv[2:])
                done.append(argv)
                if len(done) == beside.stop:
                    raise SystemExit(143)

    beside.stop = None
    monkeypatch.setattr(study, "beside", beside)
    return beside, done


def test_every_row_is_measured_on_its_way_and_a_stop_changes_nothing(small, small_phantom, tmp_path, capsys):
    beside, done = small
    argv = [str(a) for a in ("--ssl", small_phantom / "AbdomenCT-1K", "--seg", small_phantom / "BTCV", "--out",
                             tmp_path / "s", "--seeds", 1, "--steps", 2, 6)]  # 24 slices: 2 steps an epoch
    beside.stop = 6  # the row stands beyond its first share, not yet measured at its second
    with pytest.raises(SystemExit):
        study.main(argv)
    beside.stop = None
    study.main(argv)

    # of 3 epochs 1/8 and 1/4 are the first, 1/2 the second
    found, log = study.measured(tmp_path / "s"), runs.read_log(tmp_path / "s/aligned-seed1/log.jsonl")
    assert found.keys() == {("random", 0), ("start", 2), ("aligned", 2), ("aligned", 4), ("aligned", 6)}
    gaps = {r["step"]: r["held_out_gap"] for r in log if "held_out_gap" in r}
    for (name, step), seeds in found.items():
        results = [r for r in runs.read_log(tmp_path / f"s/heads/32px-step{step}/results.jsonl")
                   if r["backbone"].startswith(name)]
        assert len(results) == 1 and results[0]["pretraining"]["step"] == (step or None)  # measured once, where it was
        assert list(seeds) == [1] and seeds[1][32] == 100 * results[0]["mDS"]
        assert name != "aligned" or seeds[1]["held_out_gap"] == gaps[step]
    config = json.loads((tmp_path / "s/aligned-seed1/config.json").read_text())  # one run of one horizon
    assert config["epochs"] == 3 and config["init"] == "start-seed1" and config["geometric"] and config["local"]
    stops = [argv[argv.index("--steps") + 1] for argv in done if "--steps" in argv]
    assert stops == ["2", "4", "4", "6"]  # what stopped is asked for again, what it had left behind is not

    # --table alone, without data
    number = len(done)
    capsys.readouterr()
    study.main(["--out", str(tmp_path / "s"), "--table"])
    out = capsys.readouterr().out
    assert len(done) == number and "| aligned | 1 | 6 |" in out.replace(" (**did not train**)", "")  # and finished


def test_all_rows_come_to_a_share_before_one_goes_on(tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr(study, "beside", lambda chains, jobs, log: planned.append([list(chain) for chain in chains]))
    monkeypatch.setattr(study.datasets, "prepare", lambda *_, **__: Slices())
    monkeypatch.setattr(study, "PRETRAINING", SMALL)
    with pytest.raises(SystemExit):  # nothing was measured
        study.main([str(a) for a in ("--ssl", tmp_path, "--seg", tmp_path, "--out", tmp_path / "s", "--seeds", 0, 4,
                                     "--steps", 20, 190, "--rows", "moco", "author-zca", "moco-every4")])
    starts, *shares = planned
    assert len(shares) == 4

    def told(argv: list[str], flag: str) -> str:
        return argv[argv.index(flag) + 1]

    def heads(chain: list[list[str]]) -> list[tuple[str, str, str]]:
        return [(Path(told(a, "--out")).name, Path(told(a, "--backbone")).name, told(a, "--crop-size")) for a in chain]

    assert [told(chain[0], "--name") for chain in starts] == ["start", "author-start", "start-seed4",
                                                              "author-start-seed4"]
    for chain in starts:
        author = "author-" * ("--window" in chain[0])
        assert told(chain[0], "--name").startswith("author") == bool(author)
        assert heads(chain[1:3]) == [(f"{author}{side}px-step0", "random", str(side)) for side in (64, 128)]
        assert all(("--window" in argv) == bool(author) for argv in chain)  # nothing is measured at another window
    # 12 steps an epoch, and 16 epochs; of each fourth slice 3 steps, and 64 epochs
    for chains, step in zip(shares, (24, 48, 96, 192), strict=True):
        names = ["moco", "author-zca", "moco-every4"]
        assert [told(chain[0], "--name") for chain in chains] == names + [f"{name}-seed4" for name in names]
        for chain in chains:
            name = told(chain[0], "--name")
            author = "author-" * name.startswith("author")
            assert told(chain[0], "--steps") == str(step)
            assert told(chain[0], "--epochs") == ("64" if "every4" in name else "16")
            assert told(chain[0], "--init") == f"{author}start" + "-seed4" * name.endswith("4" if author else "seed4")
            assert heads(chain[1:]) == [(f"{author}{side}px-step{step}", name, str(side)) for side in (64, 128)]
            assert all(argv[argv.index("--window"):][1:3] == ["-1024", "3071"] if author else "--window" not in argv
                       for argv in chain)


class Slices:
    """A store of slices of which 96 and 24 are trained on, where an eighth is held out: with each one and each fourth.
    """

    def __len__(self):
        return 110

    def of(self, every: int):
        return range(0, 110, every)


def test_what_to_study_is_named_once(tmp_path, refusal):
    for given in ([], ["--ssl", tmp_path], ["--ssl", tmp_path, "--seg", tmp_path, "--phantom", 1]):
        assert "give --ssl and --seg, or --phantom" in refusal(study.main, ["--out", tmp_path, *given])


def write_results(out: Path, values: dict) -> None:
    """values: {(run, step): {seed: (Dice at 64 px, Dice at 128 px, similarity margin)}}; of 20 steps, or the only ones.
    """
    for (name, step), seeds in values.items():
        made = {"step": step or None, "horizon": {0: None, 9: 9}.get(step, 20)}
        for seed, (*dice, gap) in seeds.items():
            run = name + f"-seed{seed}" * (seed > 0)
            for side, value in zip((64, 128), dice, strict=True):
                folder = out / "heads" / f"{side}px-step{step}"
                folder.mkdir(parents=True, exist_ok=True)
                runs.append(folder / "results.jsonl", [{"backbone": run, "seed": seed, "mDS": value, "crop_size": side,
                                                        "pretraining": made}])
            if gap is not None:
                (out / run).mkdir(exist_ok=True)
                runs.append(out / run / "log.jsonl", [{"step": step - 1}, {
                    "step": step, "held_out_gap": gap, "instance_accuracy": 0.25, "effective_rank": 10.0 + seed}])


MADE = {("random", 0): {0: (0.3, 0.4, None), 2: (0.2, 0.2, None)}, ("start", 9): {0: (0.31, 0.3, 0.5)},
        ("moco", 10): {0: (0.35, 0.41, 0.2), 2: (0.37, 0.42, 0.3)},
        ("moco", 20): {0: (0.41, 0.45, 0.25), 2: (0.44, 0.47, 0.31), 1: (0.4, 0.4, 0.4)},
        ("moco-zca", 10): {0: (0.33, 0.4, 0.001)}}


def test_tables_hold_means_and_deviations_of_what_is_there(tmp_path):
    write_results(tmp_path, MADE)
    found = study.measured(tmp_path)
    lines = study.tables(found).splitlines()
    assert lines[0].startswith("| method | seeds | steps | similarity margin | instance-discrimination accuracy | effe")
    first = {line.split(" | ")[0].strip("| "): line for line in lines[2:6]}
    assert list(first) == ["Random weights", "Initial checkpoint", "MoCo v2",
                           "MoCo v2 + ZCA (**did not train**; **unfinished: step 10 of 20**)"]
    at_64, at_128, gap = zip(*MADE["moco", 20].values(), strict=True)
    at_64, at_128 = ([100 * v for v in values] for values in (at_64, at_128))

    def cell(values, digits):
        return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

    assert first["MoCo v2"] == (f"| MoCo v2 | 3 | 20 | {cell(gap, 2)} | 0.25 ± 0.00 | 11.0 ± 1.0 | {cell(at_64, 1)} | "
                             f"{cell(at_128, 1)} |")
    assert first["Initial checkpoint"] == "| Initial checkpoint | 1 | 9 | 0.50 | 0.25 | 10.0 | 31.0 | 30.0 |"
    assert first["Random weights"] == (f"| Random weights | 2 | - | - | - | - | {cell([30, 20], 1)} | "
                                       f"{cell([40, 20], 1)} |")
    assert lines[7] == "| steps: Dice at 64 / 128 px |  |  |"
    assert lines[9] == (f"| MoCo v2 | 10: {cell([35, 37], 1)} / {cell([41, 42], 1)} | 20: {cell(at_64, 1)} / "
                        f"{cell(at_128, 1)} |")
    assert lines[10] == "| MoCo v2 + ZCA | 10: 33.0 / 40.0 |  |"

    written = study.write(tmp_path, found)
    with open(tmp_path / "study.csv", newline="") as f:
        rows = {(r["row"], int(r["step"]), int(r["seed"])): r for r in csv.DictReader(f)}
    assert len(rows) == sum(map(len, MADE.values())) and rows["moco", 20, 2]["dice_128px"] == "47.0000"
    assert rows["random", 0, 0]["held_out_gap"] == "" and "MoCo v2" in (tmp_path / "study.md").read_text()
    remarks = {key: row["remarks"] for key, row in rows.items()}  # as the tables have it, of each measurement
    assert remarks["moco-zca", 10, 0] == "did not train; unfinished: step 10 of 20"
    assert remarks["moco", 10, 2] == "unfinished: step 10 of 20"
    assert remarks["moco", 20, 2] == remarks["start", 9, 0] == remarks["random", 0, 2] == ""
    assert [p.name for p in written] == ["study.md", "study.csv"]  # and no picture in tests


def test_a_run_that_was_measured_again_counts_once_and_what_is_no_result_is_told(tmp_path, capsys, refusal):
    write_results(tmp_path, {("moco", 10): {0: (0.1, 0.1, 0.2), 2: (0.2, 0.2, 0.2)}})
    write_results(tmp_path, {("moco", 10): {0: (0.3, 0.3, 0.2)}})
    path = tmp_path / "heads/64px-step10/results.jsonl"
    runs.append(path, [{}])
    found = study.measured(tmp_path)
    assert study.over_seeds(found["moco", 10], 64) == pytest.approx((25, 50**0.5))  # of 30 and 20
    assert capsys.readouterr().err.count("\n") == 1
    path.write_text("{}\n")
    assert "results.jsonl: lines that are no results" in refusal(study.main, ["--out", tmp_path, "--table"])


@pytest.mark.pictures
def test_the_picture_has_a_curve_a_row_and_a_level_for_random_weights(tmp_path, monkeypatch):
    write_results(tmp_path, MADE)
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda plt, figure, path: (drawn.append(figure), plt.close(figure)))
    study.write(tmp_path, study.measured(tmp_path))
    for axes, dice in zip(drawn[0].axes, (0, 1), strict=True):
        assert [c.get_label() for c in axes.containers] == [
            "MoCo v2", "MoCo v2 + ZCA\ndid not train\nunfinished: step 10 of 20"]
        moco = axes.containers[0]
        means = [statistics.mean(100 * v[dice] for v in MADE["moco", s].values()) for s in (10, 20)]
        bars = [statistics.stdev(100 * v[dice] for v in MADE["moco", s].values()) for s in (10, 20)]
        assert list(moco[0].get_ydata()) == pytest.approx(means)
        ends = [segment[:, 1] for segment in moco[2][0].get_segments()]
        assert [(high - low) / 2 for low, high in ends] == pytest.approx(bars)
        levels = {line.get_label(): line.get_ydata() for line in axes.lines}
        random = statistics.mean(100 * v[dice] for v in MADE["random", 0].values())
        assert list(levels["Random weights"]) == pytest.approx([random, random])
        assert list(levels["Initial checkpoint"]) == pytest.approx([100 * MADE["start", 9][0][dice]] * 2)
        assert [t.get_text() for t in axes.get_xticklabels()] == ["10", "20"]


def test_of_several_seeds_it_is_said_how_many_did_not_train():
    seeds = {seed: {"held_out_gap": margin, "horizon": 9} for seed, margin in enumerate((0.3, 0.0, 0.019))}
    assert study.doubts(9, seeds) == ["2 of 3 seeds did not train"] and study.doubts(9, {0: seeds[0]}) == []
    assert study.doubts(0, {0: {"horizon": 0}}) == []  # random weights


def python(code: str, *argv: object) -> list[str]:
    return [sys.executable, "-S", "-c", f"import os, sys, time, signal\n{code}", *map(str, argv)]


WAIT = """own, other = sys.argv[1:]
open(own, 'w').write(os.environ['OMP_NUM_THREADS'])
while not os.path.exists(other): time.sleep(0.01)"""
SAVES = """def save(*_):
    open(sys.argv[1], 'w').close()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
open(sys.argv[2], 'w').close()
time.sleep(60)"""


def test_chains_run_beside_each_other_each_in_its_order(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(study, "cores", lambda: 4)
    a, b, c = (tmp_path / name for name in "abc")

    def chain():
        yield python(WAIT, a, b)
        assert a.exists()  # asked for after the first has ended
        yield python("print('second')\nopen(sys.argv[1], 'w').close()", c)

    study.beside([chain(), iter([python(WAIT, b, a)]), iter([])], 2, tmp_path / "log")  # neither ends without the other
    assert c.exists() and a.read_text() == b.read_text() == "2"
    assert (tmp_path / "log").read_text() == "second\n"


def test_a_failure_ends_all_that_run_after_they_saved(tmp_path):
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    failing = python("while not os.path.exists(sys.argv[1]): time.sleep(0.01)\nsys.exit(3)", ready)
    with pytest.raises(BadInput, match="ended with 3"):
        study.beside([iter([python(SAVES, saved, ready)]), iter([failing])], 2, tmp_path / "log")
    assert saved.exists()


def test_a_signal_ends_all_that_run_after_they_saved(tmp_path):
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    signals = python("while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
                     f"os.kill({os.getpid()}, signal.SIGTERM)\ntime.sleep(60)", ready)
    started = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        study.beside([iter([python(SAVES, saved, ready)]), iter([signals])], 2, tmp_path / "log")
    assert ended.value.code == 143 and saved.exists() and signal.getsignal(signal.SIGTERM) is started


def test_the_rows_flags_are_flags():
    assert {name: study.every(name) for name in study.ROWS} == dict.fromkeys(study.ROWS, 1) | {"moco-every4": 4}
    for name, flags in study.ROWS.items():
        args = train_ssl.parse(flags)
        train_ssl.resolve_defaults(args, phantom=False)
        assert args.name == name  # as the project names such a run
