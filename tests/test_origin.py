"""origin.py and the tables of report.py: a row is what its settings make it, a cell averages what agrees."""

import copy
import csv
import io
import json
import re

import pytest
from test_train_seg import made, result

import train_seg
import train_ssl
from ct.volumes import BadInput
from engine import backbones, origin, report, runs
from segment import PROTOCOLS

ROWS = {"moco": [], "moco-local": ["--local"], "moco-zca": ["--zca"], "moco-local-zca": ["--local", "--zca"],
        "moco-nogeo": ["--no-geometric"], "moco-zca-nogeo": ["--zca", "--no-geometric"], "moco-every4": ["--every", 4],
        "moco-local-aligned": ["--local", "--geometric"], "author-moco": ["--recipe", "author"]}


def lines(results):
    """{(table, split, method): [mDS of the draws and seeds of a cell of its lines, ...]} of the fine-tuned head."""
    found: dict[tuple, list] = {}
    for c in report.cells(json.loads(json.dumps(results)), PROTOCOLS):
        if c["values"] and c["protocol"] == "linear-finetune":
            found.setdefault((c["table"], c["split"], c["method"]), []).append([round(v, 6) for v in c["values"]])
    return found


def printed(results):
    return report.markdown(report.cells(json.loads(json.dumps(results)), PROTOCOLS))


def cut(markdown: str) -> list[list[str]]:
    """The lines of all tables, cut into cells at the bars that are not escaped."""
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("phantom", [False, True])
def test_settings_of_the_paper_make_a_row_of_the_paper(phantom):
    for name, flags in ROWS.items():
        config = made(*flags, phantom=phantom)
        told = result("100", 0, 0.5, "phantom-" * phantom + name, "phantom" if phantom else "BTCV", config=config,
                      **{"window": [-1024, 3071]} if name.startswith("author") else {})
        assert origin.unlike_pretraining(told) == origin.unlike_segmentation(told) == {}, name
        *_, (table, _, method) = lines([told])  # MoCo v2 and the full method stand in Table 1, too
        beyond = name.endswith(("nogeo", "4", "aligned")) or name.startswith("author")
        assert table == ("Beyond the paper" if beyond else "The paper's rows" if phantom else "Table 2"), name
        assert method == (report.ROWS | report.BEYOND)[name]


def test_every_setting_of_a_run_is_one_that_the_tables_know(small_phantom, tmp_path, capsys):
    """Of a real run, so that a new flag of train_ssl.py is given its value of the paper, or named as one without."""
    common = ["--data", small_phantom / "AbdomenCT-1K", "--store", small_phantom.parent / "store", "--out", tmp_path,
              "--image-size", 64, "--amp", "off", "--batch-size", 8, "--bn-group", 4, "--queue", 32, "--steps", 1]
    train_ssl.main([str(a) for a in (*common, "--init", "random", "--no-geometric", "--name", "start")])
    train_ssl.main([str(a) for a in (*common, "--init", tmp_path / "start", "--local")])
    config = origin.made_with("phantom-moco-local", tmp_path)
    assert config.keys() - {"start"} == made().keys()
    assert config["start"].keys() == made().keys() | {"step", "horizon"} and config["start"]["step"] == 1
    assert str(tmp_path) not in json.dumps(config)  # no path of a machine
    told = result("100", 0, 0.5, "phantom-moco-local", "phantom", config=config)
    assert [*origin.unlike_pretraining(told).values()] == [
        "batch 8 instead of 64", "groups of 4 instead of 32", "queue 32 instead of 256", "from start",
        "on phantom of 6 volumes"]
    # and its segmentation holds all of that
    capsys.readouterr()
    train_seg.main([str(a) for a in (
        "--data", small_phantom / "BTCV", "--store", small_phantom.parent / "seg", "--out", tmp_path, "--amp", "off",
        "--crop-size", 64, "--batch-size", 2, "--split", 25, "--draw", 0, "--protocol", "linear-frozen",
        "--iterations", 1, "--backbone", "moco-local")])
    out = (tmp_path / "report.md").read_text()
    [told] = runs.read_log(tmp_path / "results.jsonl")
    assert told["pretraining"]["config"] == config
    assert "| MoCo v2 + local (**unfinished: step 1 of " in out and not re.search("^The paper's rows", out, re.M)
    assert re.search(r"^- linear-frozen: .*; 1 iterations instead of 300, crops of 64 px instead of 96, batch 2 "
                     "instead of 16$", out, re.M)


def test_a_name_alone_makes_no_row():
    few = made("--local", "--batch-size", 8, "--bn-group", 4, "--init", "random", data="my_ct", volumes=78)
    own = made("--local", data="my_ct", volumes=78)
    swapped = made("--local", "--name", "moco")
    found = [result("100", 0, 0.1, "moco-local", config=few), result("100", 0, 0.2, "moco-zca", config=made("--zca")),
             result("100", 0, 0.3, "moco", config=swapped)]
    assert lines(found) == {("Table 2", "100", "MoCo v2 + ZCA"): [[20]], ("Others", "100", "MoCo v2 + local"): [[10]],
                            ("Others", "100", "moco (a run)"): [[30]]}
    text = printed(found)
    assert ("| MoCo v2 + local (batch 8 instead of 256; groups of 4 instead of 32; from random weights; on my_ct of 78 "
            "volumes) |") in text
    assert "moco (a run) (made as MoCo v2 + local)" in text
    assert lines([result("100", 0, 0.1, "moco-local", config=own)]) == {("Others", "100", "MoCo v2 + local"): [[10]]}
    # on anyone's labels there is no figure of the paper beside it: its data are said, and it is a row of its settings
    elsewhere = [result("100", 0, 0.1, "moco-local", "mine", 99, config=own)]
    assert lines(elsewhere) == {("The paper's rows", "100", "MoCo v2 + local"): [[10]]}
    assert "on my_ct of 78 volumes" in printed(elsewhere)
    # a start that saw other grey values
    begun = made("--init", "random", "--window", -1000, 1000) | {"step": 9, "horizon": 9}
    assert "MoCo v2 (from wide, which saw HU -1000 to 1000" in printed(
        [result("100", 0, 0.1, config=made("--init", "wide", start=begun))])
    # a run that has the name of a row in words, and one of which nothing is told
    assert lines([result("100", 0, 0.1, "MoCo v2", config=made())]) == {("Others", "100", "MoCo v2 (a run)"): [[10]]}
    old = result("100", 0, 0.1, "moco")
    del old["pretraining"]["config"]
    assert lines([old]) == {("Others", "100", "MoCo v2"): [[10]]} and "not recorded" in printed([old])


def test_few_slices_give_one_table_with_what_all_rows_share_above():
    """As docs/training.md, "Few slices", has it: one start, two rows from it, and what they are compared with."""
    small = ["--arch", "resnet18", "--image-size", 64, "--batch-size", 64, "--queue", 256, "--ema", 0.99, "--lr", 0.01]
    ct = dict(data="my_ct", volumes=78)
    start = made(*small, "--epochs", 6, "--init", "random", "--no-geometric", **ct)
    rows = {"start": start, **{name: made(*small, "--epochs", 8, "--init", "start", *ROWS[name], **ct,
                                          start=start | {"step": 184, "horizon": 184})
                               for name in ("moco", "moco-local-zca")}, "random": None}
    head = dict(arch="resnet18", crop_size=96, iterations=2000)
    found = [result("100", 0, i / 10, name, "my_btcv", 231, protocol=p, config=config, **head)
             for i, (name, config) in enumerate(rows.items()) for p in ("linear-frozen", "deeplabv3plus")]
    text = printed(found)
    assert text.count("\nOthers") + text.startswith("Others") == text.count("Mean Dice over") == 1
    above, table = text.split("\n\n")[0].splitlines(), cut(text)
    assert [row[1].strip() for row in table[1:]] == [
        "Random weights", "Initial checkpoint (6 epochs instead of 200; from random weights)",
        "MoCo v2 (8 epochs instead of 200; from start)", "MoCo v2 + local + ZCA (8 epochs instead of 200; from start)"]
    assert [line for line in above if "pre-trained here" in line] == [
        "- all rows that were pre-trained here: views of 64 px instead of 224; batch 64 instead of 256; learning rate "
        "0.01 instead of 0.03; queue 256 instead of 65,536; EMA 0.99 instead of 0.999; on my_ct of 78 volumes"]
    assert all(line.endswith("; resnet18 instead of resnet50, 2,000 iterations instead of 40,000, crops of 96 px "
                             "instead of 512") for line in above if line.startswith(("- linear", "- deep")))


STORE = {"0001": "aa bb 5 1 1", "0002": "cc dd 5 1 1", "0035": "ee ff 5 1 1"}
OTHER = {  # what two seeds may not differ in: how the second one is made other than the first
    "a setting of the pre-training": lambda r, c: c.update(temperature=0.05),
    "its schedule": lambda r, c: c.update(epochs=9),
    "its HU window": lambda r, c: c.update(window=[-1000, 1000]),
    "its slices": lambda r, c: c.update(store="other"),
    "its start": lambda r, c: c["start"].update(lr=9.0),
    "its start's length": lambda r, c: c["start"].update(step=1),
    "its length": lambda r, c: r["pretraining"].update(step=9),
    "a setting that is not there yet": lambda r, c: c.update(flavour="new"),
    "one of the segmentation": lambda r, c: r.update(flavour="new"),
    "its learning rate": lambda r, c: r.update(lr=0.5),
    "its HU window, too": lambda r, c: r.update(window=[-1000, 1000]),
    "a label of a training case": lambda r, c: r["store"].update({"0002": "cc d2 5 1 1"}),
    "a slice of a validation case": lambda r, c: r["store"].update({"0035": "e2 ff 5 1 1"}),
    "the volumes of the draw": lambda r, c: r.update(split_sha256="other"),
    "a label of a validation case": lambda r, c: r["store"].update({"0035": "ee f2 5 1 1"}),
    "the validation cases": lambda r, c: r["store"].update({"0036": "gg hh 5 1 1"}),
}
SAME = {  # and what they may
    "nothing": lambda r, c: None,
    "where, when and by what": lambda r, c: r.update(dict.fromkeys(("hardware", "commit", "date", "wall_s", "amp",
                                                                    "processes"), "other")),
    "what was measured": lambda r, c: r.update(per_volume_monai=0.5, hd95_mm=3.0, backbone_after="x"),
    "checksum and gap": lambda r, c: r["pretraining"].update(checksum="x", gap=0.2),
    "a setting without effect": lambda r, c: c.update(lambda_local=0.5),
    "another draw of other cases": lambda r, c: r.update(
        draw=1, cases=["0003"], store={"0003": "gg hh 5 1 1", "0035": STORE["0035"]}, split_sha256="other"),
    "a flag that older configs lack": lambda r, c: c.pop("every"),
}


def pair(change):
    """Two seeds of one row, each from its start of that seed; the second is changed."""
    found = []
    for seed in (0, 1):
        suffix = f"-seed{seed}" * (seed > 0)
        config = made("--seed", seed, phantom=True)
        config["start"] |= {"seed": seed, "init_checksum": f"random {seed}"}
        config |= {"init": f"phantom-start{suffix}", "init_checksum": f"start {seed}"}
        found.append(result("12.5", 0, 0.2 + seed / 10, f"phantom-moco{suffix}", "phantom", 1193, config=config,
                            seed=seed, cases=["0001", "0002"], store=copy.deepcopy(STORE), split_sha256="s"))
    change(found[1], found[1]["pretraining"]["config"])
    return found


@pytest.mark.parametrize("what", OTHER)
def test_what_differs_is_not_averaged_and_is_said(what):
    found = pair(OTHER[what])
    cells = [c for c in report.cells(found, PROTOCOLS) if c["values"]]
    assert sorted(v for c in cells for v in c["values"]) == pytest.approx([20, 30])
    assert len(cells) == 2 and len({(c["table"], c["data"], c["row"]) for c in cells}) == 2
    # two lines of one table do not read alike, and two tables of one data set do not either
    said = {(c["table"], c["data"], *c["remarks"], *c["unlike"], c["label"]) for c in cells}
    assert len(said) == 2 and len({line for line in printed(found).splitlines() if "MoCo v2" in line}) == 2
    assert printed(found) == printed(found[::-1]) or len({c["data"] for c in cells}) == 1


@pytest.mark.parametrize("what", SAME)
def test_what_seeds_and_draws_change_is_averaged(what):
    assert lines(pair(SAME[what])) == {("The paper's rows", "12.5", "MoCo v2"): [[20, 30]]}


def test_a_protocols_settings_keep_a_backbone_on_one_line():
    """Each protocol has its own; a line more only where one of them has several."""
    found = [result("25", 0, m, protocol=p, iterations=n) for p, n, m in (
        ("linear-frozen", 300, 0.1), ("deeplabv3plus", 9000, 0.2), ("deeplabv3plus", 100, 0.3))]
    found[2]["draw"] = 1
    rows = [[x.strip() for x in row] for row in cut(printed(found))]
    assert rows == [["split", "method", "linear-frozen", "deeplabv3plus"],
                    ["25 %", rows[1][1], "10.00 (n = 1)", "20.00 (n = 1)"],
                    ["25 %", rows[2][1], "not run", "30.00 (n = 1)"]]
    assert "9,000 iterations instead of 40,000" in rows[1][1] and "100 iterations instead" in rows[2][1]


def test_a_remark_stands_beside_the_row_that_it_is_about():
    odd = made("--image-size", 84, phantom=True)
    found = [result("100", 0, 0.1, "phantom-moco", "phantom", config=odd), result("100", 0, 0.2, "random", "phantom"),
             result("100", 0, 0.3, "mine", "phantom", gap=0.001, config=odd)]
    found[2] |= {"pretraining": dict.fromkeys(("step", "horizon", "gap", "view_px", "slice_px")) | {"checksum": "x"}}
    text = printed(found)
    assert text.count("views of 84 px") == 1 and "MoCo v2 (views of 84 px instead of 64)" in text
    assert "mine (a file, which does not tell" in text and "| Random weights |" in text


def test_marks_stand_in_the_table_the_csv_and_the_picture():
    found = [result("100", 0, 0.1, "phantom-moco", "phantom", gap=0.003),
             result("100", 0, 0.3, "phantom-moco-zca", "phantom", step=9, config=made("--zca", phantom=True)),
             result("100", 0, 0.4, "phantom-moco-local", "phantom", window=[-1024, 3071],
                    config=made("--local", phantom=True))]
    marks = ["did not train", "unfinished: step 9 of 184", "pre-trained at HU -175 to 250, measured at -1024 to 3071"]
    cells, text = report.cells(found, PROTOCOLS), printed(found)
    csv.writer(written := io.StringIO()).writerows(report.csv_rows(cells))
    for mark in marks:
        assert f"**{mark}**" in text and mark in written.getvalue() and "**" not in written.getvalue()
        assert sum(mark in c["label"] for c in cells if c["values"]) == 1


def test_lines_that_are_no_results_are_one_clear_line(tmp_path, refusal, capsys):
    path = tmp_path / "results.jsonl"
    report_of = ["--report", "--out", str(tmp_path)]
    for odd in ({}, {"backbone": "moco"}, result("25", 0, None), result("25", 0, 0.5) | {"organs": 3}, {"a": "é\n"}):
        path.write_text(json.dumps(odd) + "\n")
        line = refusal(train_seg.main, report_of)
        assert "results.jsonl" in line and "no results of train_seg.py: 1 (" in line and "delete" in line
        path.write_text("\n".join(json.dumps(r) for r in (odd, result("25", 0, 0.5), odd)) + "\n{half a li")
        capsys.readouterr()
        train_seg.main(report_of)
        told = capsys.readouterr()
        assert told.err.count("\n") == 1 and "no results of train_seg.py: 2 (" in told.err
        assert "50.00 (n = 1)" in told.out


def test_names_cut_no_table():
    names = ["a|b", "a\nb", "a`b", "x|y\r|", "\x1b[1m", "scan\udcff", "mäßig"]
    text = printed([result("25", 0, 0.5, name, config=made()) for name in names]
                   + [result("25", 0, 0.5, "moco", "c|t\n", 7, labels={"0": "background", "1": "a|b"})])
    rows = cut(text)
    assert len(rows) == len(names) + 1 + 2 and {len(row) for row in rows} == {3}
    assert "a\\|b" in text and "scan\udcff" in text and "mäßig" in text and "\x1b" not in text


def test_names_unfit_for_a_folder_or_a_table_are_refused(small_phantom, tmp_path, refusal):
    (tmp_path / "x.pth").write_bytes(b"")
    for name in ("a|b", "a\nb", "a/b", "a\\b", "a`b", "a<b", 'a"b', "a*b", "a?b", "a:b", " a", "a ", "..", "imagenet",
                 "random", "\x1b"):
        line = refusal(train_ssl.main, ["--data", small_phantom / "AbdomenCT-1K", "--out", tmp_path, f"--name={name}"])
        assert "--name" in line and "must be fit to name a folder and a row" in line
        with pytest.raises(BadInput, match="must be fit to name a folder"):
            backbones.title_of(str(tmp_path / "x.pth"), name)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]
    for name in ("mäßig", "lr=0.1, 2 epochs", "my method (ours)", "a_b-c.d"):
        assert backbones.title_of(str(tmp_path / "x.pth"), name) == name
