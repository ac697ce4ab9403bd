"""Tables 1 and 2 from results.jsonl, the paper's numbers beside those that were measured."""

import csv
import io
import json
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from ct.command import printable
from ct.prepare import WINDOW
from ct.tasks import ORGANS
from ct.volumes import BadInput
from engine import figures, leaks, origin, runs
from engine.methods import BEYOND, NAMES, ROWS, file_of, method_of
from metrics import LEAST_GAP, mean_std, nan_mean
from segment import PROTOCOLS

TABLE_1 = ("No SSL", "MoCo v2", "MoCo v2 + local + ZCA")
DRAWS = {"12.5": 3, "25": 3, "100": 1}  # random subsets of the training volumes of each split
BTCV = 3779  # slices of its 30 volumes: a data set that counts another number is not the paper's
# mean Dice in %, as printed in the paper: (split, row) -> linear frozen, linear fine-tuned, DeepLabv3+
PRINTED = {
    ("12.5", "No SSL"): ("", "42.55 ± 2.41", "53.17 ± 3.86"),
    ("12.5", "MoCo v2"): ("", "46.04 ± 4.37", "54.55 ± 6.33"),
    ("12.5", "MoCo v2 + local + ZCA"): ("", "52.32 ± 4.75", "56.47 ± 4.41"),
    ("25", "No SSL"): ("", "62.95 ± 7.17", "67.78 ± 6.00"),
    ("25", "MoCo v2"): ("", "66.17 ± 6.16", "68.56 ± 6.5"),
    ("25", "MoCo v2 + local + ZCA"): ("", "67.72 ± 5.39", "68.82 ± 4.67"),
    ("100", "No SSL"): ("32.61", "63.31", "78.79"),
    ("100", "MoCo v2"): ("44.30", "78.21", "81.09"),
    ("100", "MoCo v2 + local"): ("44.17", "78.98", "79.67"),
    ("100", "MoCo v2 + ZCA"): ("45.27", "74.36", "81.02"),
    ("100", "MoCo v2 + local + ZCA"): ("51.86", "79.38", "81.22"),
}


def cells(results: Sequence[dict], protocols: Sequence[str]) -> list[dict]:
    """Results (a dict a run, see `origin.read`) -> every cell of the tables that have one.

    Of the paper's own data Tables 1 and 2, whole; of other data one table of the paper's rows, those that were run;
    after them "Beyond the paper": all made with the paper's settings, on the phantom with its preset. What was made
    with others, is a file or has a name of its own stands in "Others". Another validation set or other classes of the
    same data are another table. What a row holds differs in random subsets and seeds only.

    A cell: table, data, split, method, protocol, `row` (the number of its line), `paper` (as printed; "" where it has
    none), `values` (mDS in % of the random subsets and seeds) and their `deviation`, `organs` (the mean Dice of each
    class), their `deviations` in % and `names`, `backbones`, `settings`, `remarks` on its pre-training, `pretrained`
    (here), `unlike`: the segmentation the paper's, `label`: its method in pictures. A standard deviation (n - 1) of
    fewer than two values is NaN.
    """
    tables: dict[str, list[dict]] = {}
    results = origin.newest(results)
    sets = {(data_of(r), organs_of(r), origin.validation(r)) for r in results}
    for r in results:
        alike = [s for s in sets if s[0] == data_of(r)]
        name = data_of(r) + f", {_listed(organs_of(r))}" * (len({s[1] for s in alike}) > 1)
        several = sum(s[1] == organs_of(r) for s in alike) > 1
        tables.setdefault(name + f", validation set {origin.validation(r) or 'unknown'}" * several, []).append(r)
    out: list[dict] = []
    for data, own in sorted(tables.items(), key=lambda item: (data_of(item[1][0]) != "BTCV", item[0])):
        rows, paper, number = _rows(own), data_of(own[0]) == "BTCV", len(out)
        for table, split, method in _order(rows, paper):
            kind = "Table" if table.startswith("Table") else table
            printed = PRINTED.get((split, method), ("",) * 3) if kind == "Table" else ("",) * 3
            for line in _in_words(rows.get((kind, split, method), [{}])):
                number += 1
                out += [_cell(line, protocol) | {"table": table, "data": data, "split": split, "method": method,
                                                 "protocol": protocol, "row": number, "paper": as_printed}
                        for protocol, as_printed in zip(protocols, printed, strict=True)]
    filled = {(c["table"], c["data"]) for c in out if c["values"]}
    out = [c for c in out if (c["table"], c["data"]) in filled]
    for c in out:  # lines of one method are told apart by what not all of them are
        alike = {d["row"]: {*d["remarks"], *d["unlike"]} for d in out if d["values"] and (
            d["data"], d["split"], d["method"]) == (c["data"], c["split"], c["method"])}
        apart = [w for w in (*c["remarks"], *c["unlike"])
                 if w.startswith("**") or any(w not in words for words in alike.values())]
        c["label"] = c["method"] + f" ({'; '.join(apart).replace('**', '')})" * bool(apart)
    return out


def _rows(results: Sequence[dict]) -> dict[tuple[str, str, str], list[dict]]:
    """{(kind of table, split, method): lines}, a line {protocol: the results of one cell}.

    Lines of one method have backbones that were made in another way; or, of one backbone, are of other segmentations.
    """
    checksums: dict[str, set[str]] = {}
    for r in results:
        checksums.setdefault(method_of(r), set()).add(file_of(r))
    backbones: dict[tuple, dict[str, list[list[dict]]]] = {}
    for r in results:
        method = method_of(r)
        apart = f" [{file_of(r)[:8]}]" * (file_of(r) != "" and len(checksums[method]) > 1)
        made = (kind_of(r), r["split"], method + apart, json.dumps(origin.backbone_key(r), sort_keys=True))
        found = backbones.setdefault(made, {}).setdefault(r["protocol"], [])
        cell = next((cell for cell in found if all(_agree(r, other) for other in cell)), None)
        if cell is None:
            found.append(cell := [])
        cell.append(r)
    rows: dict[tuple[str, str, str], list[dict]] = {}
    for (*place, _), found in backbones.items():
        lines = [{p: found[p][i] for p in found if i < len(found[p])} for i in range(max(map(len, found.values())))]
        rows.setdefault(tuple(place), []).extend(lines)
    others = {split for kind, split, _ in rows if kind == "Others"}
    for (_, split, method), lines in [*rows.items()]:  # what any row is compared with stands in every table
        if split in others and method in (ROWS["imagenet"], ROWS["random"]):
            rows.setdefault(("Others", split, method), lines)
    return rows


def _agree(one: dict, other: dict) -> bool:
    """Whether two results of one backbone and protocol may be averaged."""
    a, b = origin.contents(one), origin.contents(other)
    return origin.head_key(one) == origin.head_key(other) and all(a[k] == b[k] for k in a.keys() & b.keys())


def _order(rows: dict, paper: bool) -> list[tuple[str, str, str]]:
    """(table, split, method) of all lines in their order; of the paper's own data also those that were not run."""
    methods = [*ROWS.values(), *BEYOND.values()]
    known = sorted(rows, key=lambda k: ([*DRAWS, k[1]].index(k[1]), [*methods, k[2]].index(k[2]), k[2]))
    order = [("Table 1", *k) for k in PRINTED if k[1] in TABLE_1] + [("Table 2", *k) for k in PRINTED if k[0] == "100"]
    kinds = ("The paper's rows", "Beyond the paper", "Others")
    return order * paper + [k for kind in kinds for k in known if k[0] == kind]


def _in_words(lines: list[dict]) -> list[dict]:
    """Lines of one method, each with what is to be said of it: {"cells": {protocol: results}, "remarks": words}."""
    remarks, said = [], set()
    for line in lines:
        found = [r for cell in line.values() for r in cell]
        remarks.append([*dict.fromkeys(w for r in found for w in remarks_on(r))])
        said.add(str((remarks[-1], *dict.fromkeys(w for r in found for w in origin.unlike_segmentation(r).values()))))
    if len(said) < len(lines):  # they differ in what has no words
        remarks = [words + more[:3] for words, more in zip(remarks, _raw(lines), strict=True)]
    return [{"cells": line, "remarks": words} for line, words in zip(lines, remarks, strict=True)]


def _raw(lines: list[dict]) -> list[list[str]]:
    """Of each line the settings and contents in which it differs from others, as they stand in the results."""
    flat: list[dict[tuple, object]] = []
    for line in lines:
        flat.append({("", k): v for cell in line.values() for k, v in origin.backbone_key(cell[0]).items()})
        flat[-1] |= {(p, k): v for p, cell in line.items() for k, v in origin.head_key(cell[0]).items()}
        flat[-1] |= {("holds", k): v for cell in line.values() for r in cell for k, v in origin.contents(r).items()}
    keys = dict.fromkeys(k for f in flat for k in f)  # a setting may be missing, of a volume only what both have counts
    values = {k: {str(f.get(k, "not recorded")) for f, line in zip(flat, lines, strict=True)
                  if k in f or k[0] in ("", *line)} for k in keys}
    return [[f"{' '.join(k).strip()}: {f.get(k, 'not recorded')}" for k in keys if len(values[k]) > 1] for f in flat]


def _cell(line: dict, protocol: str) -> dict:
    """What a cell has of its line and of its results."""
    found = line["cells"].get(protocol, [])
    dice = np.array([r["organs"] for r in found], float)  # (results, classes), NaN for a class that does not occur
    values = [100 * r["mDS"] for r in found]
    return {"values": values, "deviation": _deviation(values), "names": organs_of(found[0]) if found else (),
            "organs": nan_mean(dice, 0).tolist() if found else [],
            "deviations": [_deviation(100 * column[~np.isnan(column)]) for column in dice.T],
            "backbones": {r["backbone"] for r in found}, "remarks": line["remarks"],
            "settings": " / ".join(sorted({settings_of(r) for r in found})),
            "pretrained": any(not file_of(r) and r["backbone"] not in origin.BUILT_IN for r in found),
            "unlike": [*origin.unlike_segmentation(found[0]).values()] if found else []}


def _deviation(values: Sequence[float]) -> float:
    return np.std(values, ddof=1).item() if len(values) > 1 else np.nan


def kind_of(result: dict) -> str:
    """The kind of table that a result belongs to: "Table" of the paper's own data, "The paper's rows" of others,
    "Beyond the paper"; or, where settings or data are not the paper's or its name is none of theirs, "Others".
    """
    method, data = method_of(result), data_of(result)
    unlike = {*origin.unlike_pretraining(result), *origin.unlike_segmentation(result)}
    if data not in ("BTCV", "phantom"):
        unlike.discard("data")  # there are no numbers of the paper beside it
    if unlike or method not in NAMES:
        return "Others"
    if method in BEYOND.values():
        return "Beyond the paper"
    if data == "BTCV":
        return "Table" if (result["split"], method) in PRINTED else "Others"
    return "The paper's rows"


def data_of(result: dict) -> str:
    """The data set in words: "BTCV" only with all the slices of the paper's, whatever its folder is called."""
    if result["data"] == "phantom":
        return "phantom"
    return "BTCV" if result["slices"] == BTCV else f"{result['data']} of {result['slices']:,} slices"


def organs_of(result: dict) -> tuple[str, ...]:
    """The names of what was segmented; results on BTCV do not say them."""
    return tuple(result["labels"].values())[1:] if "labels" in result else ORGANS[1:]


def _listed(organs: tuple[str, ...]) -> str:
    """Some names, or of many the ends and a number that other ones do not have."""
    if len(organs) <= 6:
        return ", ".join(organs)
    return f"{organs[0]} ... {organs[-1]} ({len(organs)}, {zlib.crc32(str(organs).encode()):08x})"


def settings_of(result: dict) -> str:
    """What runs of one table must have in common to be compared: the side of what is looked at (the probe) included."""
    arch, iterations, batch, crop, lr = (result.get(k, "?") for k in (
        "arch", "iterations", "batch_size", "crop_size", "lr"))
    folded = ", whitening folded" * (result.get("whitening") == "fold" and result["protocol"] != "linear-frozen")
    shown = "whole slices" if result.get("whole_slices") else "crops"
    return f"{arch}, {iterations} iterations of {batch} {shown} of {crop} px, lr {lr}{folded}, evaluated at {crop} px"


def remarks_on(result: dict) -> list[str]:
    """What stands beside a result, of the pre-training that it measures; what makes it doubtful in bold."""
    known, window = origin.known(result), result.get("window", WINDOW)
    config, unlike = known.get("config") or {}, origin.unlike_pretraining(result)
    remarks = leaks.marks(result)
    if known.get("horizon") and known["step"] < known["horizon"]:
        remarks.append(f"**unfinished: step {known['step']} of {known['horizon']}**")
    if known.get("gap") is not None and known["gap"] < LEAST_GAP:
        remarks.append("**did not train**: it does not tell slices apart")
    if other := origin.window_of(config, window):
        here = f"{window[0]:g} to {window[1]:g}"
        remarks.append(f"**pre-trained at HU {other.replace(' ', ' to ')}, measured at {here}**")
    made = origin.of_this(result)
    if made and method_of(result) not in NAMES:
        remarks.append(f"made as {(ROWS | BEYOND).get(made, made)}")
    remarks += unlike.values()
    if known.get("view_px") and not {"image_size", "size"} & unlike.keys():
        remarks.append(f"views of {known['view_px']} px of slices of {known['slice_px']} px")
    if tuple(window) != WINDOW and not origin.window_of(config, window):
        remarks.append(f"HU {window[0]:g} to {window[1]:g}")
    return remarks


def doubts(remarks: Sequence[str]) -> list[str]:
    """The marks among remarks, as words: `did not train`, `unfinished: step 9 of 184` ..."""
    return [w.split("**")[1] for w in remarks if w.startswith("**")]


def markdown(report: Sequence[dict]) -> str:
    """Cells as Markdown: the paper's numbers and yours in columns of their own, mean ± standard deviation (n).

    Columns of the paper's own data are all there; of others those in which something was run. What holds for all rows
    that were pre-trained here, or for a whole column, stands above, all else beside the row that it is about.
    """
    text = []
    for table, data in dict.fromkeys((c["table"], c["data"]) for c in report):
        own = [c for c in report if (c["table"], c["data"]) == (table, data)]
        beside = table.startswith("Table")
        protocols = list(dict.fromkeys(c["protocol"] for c in own if beside or c["values"]))
        own = [c for c in own if c["protocol"] in protocols]
        lines = {row: [c for c in own if c["row"] == row] for row in dict.fromkeys(c["row"] for c in own)}
        above, common = _above(own, lines, protocols)
        text += [_heading(table, data, own), *above, ""]
        columns = [f"{p}, paper | {p}, here" if beside else p for p in protocols]
        text.append(f"| split | method | {' | '.join(columns)} |")
        text.append("|---" * (text[-1].count("|") - 1) + "|")
        for line in lines.values():
            remarks = [w for w in line[0]["remarks"] if w not in common] + _of_segmentation(line, common)
            method = line[0]["method"] + f" ({'; '.join(remarks)})" * bool(remarks)
            shown = [f"{line[0]['split']} %", _escaped(method)]
            for c in line:
                shown += [c["paper"], _mean(c["values"])] if beside else [_mean(c["values"])]
            text.append("| " + " | ".join(shown) + " |")
        text.append("")
    return "\n".join(text)


def _heading(table: str, data: str, own: list[dict]) -> str:
    """What a table shows, on what."""
    where = data.replace("phantom", "the generated phantom (these are no BTCV results)", 1) if (
        data.split(", ")[0] == "phantom") else data
    what = " (other settings, names or files than the paper's rows)" * (table == "Others")
    counts = sorted({int(np.isfinite(np.array(c["organs"], float)).sum()) for c in own if c["values"]})
    number = " or ".join(map(str, counts or [len(ORGANS) - 1]))
    one, several = ("organ", "organs") if {c["names"] for c in own} <= {(), ORGANS[1:]} else ("class", "classes")
    return _escaped(f"{table}{what}, on {where}. Mean Dice over {number} {one if number == '1' else several} in %, "
                    "pooled over the validation set; ± standard deviation over random subsets and seeds (n - 1), n "
                    "their number.")


def _above(own: list[dict], lines: dict[int, list[dict]], protocols: list[str]) -> tuple[list[str], set[str]]:
    """What is said above a table: a list item of each protocol's settings, and one of what holds for all rows that were
    pre-trained here, where there are several. Also all words that need not stand beside a row any more.
    """
    text, common = [], set()
    for protocol in protocols:
        column = [c for c in own if c["protocol"] == protocol and c["values"]]
        settings = sorted({c["settings"] for c in column})
        differ = "**the settings differ:** " if len(settings) > 1 or " / " in "".join(settings) else ""
        shared = [w for w in column[0]["unlike"] if all(w in c["unlike"] for c in column)] if column else []
        common |= {f"{protocol}: {w}" for w in shared}
        if settings:
            text.append(f"- {protocol}: {differ}{' / '.join(settings)}" + f"; {', '.join(shared)}" * bool(shared))
    pretrained = [line[0]["remarks"] for line in lines.values() if any(c["pretrained"] for c in line)]
    if len(pretrained) > 1:
        shared = [w for w in pretrained[0] if not w.startswith("**") and all(w in words for words in pretrained)]
        text += [f"- all rows that were pre-trained here: {'; '.join(shared)}"] * bool(shared)
        common |= {*shared}
    return text, common


def _of_segmentation(line: list[dict], common: set[str]) -> list[str]:
    """What is unlike the paper in the segmentation of a line, and not of its columns: in all protocols, or in which."""
    unlike = {c["protocol"]: [w for w in c["unlike"] if f"{c['protocol']}: {w}" not in common]
              for c in line if c["values"]}
    if len({str(words) for words in unlike.values()}) == 1:
        unlike = {"segmentation": next(iter(unlike.values()))}
    return [f"{protocol}: {', '.join(words)}" for protocol, words in unlike.items() if words]


def _escaped(text: str) -> str:
    """Text that cuts no table: names of runs, files and folders may hold anything."""
    kept = (c if c.isprintable() or "\ud800" <= c <= "\udfff" else c.encode("unicode_escape").decode() for c in text)
    return "".join(kept).replace("|", "\\|")


def _mean(values: list[float]) -> str:
    if not values:
        return "not run"
    mean, std = mean_std(values)
    return f"{mean:.2f}" + (f" ± {std:.2f}" if std is not None else "") + f" (n = {len(values)})"


def write_csv(path: Path, rows: Sequence[Sequence]) -> None:
    """Rows as a .csv, whole or not at all. Raises BadInput where it cannot be written."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    runs.write_text(path, text.getvalue())


def csv_rows(report: Sequence[dict]) -> list[list]:
    """Cells as rows under a header; a cell that was not run is empty."""
    rows = [["table", "data", "split", "method", "protocol", "paper mDS", "paper sd", "mDS", "sd", "n", "settings",
             "remarks"]]
    for c in report:
        mean, _, std = c["paper"].partition(" ± ")
        here = mean_std(c["values"]) if c["values"] else (None, None)
        rows.append([c["table"], c["data"], c["split"], c["method"], c["protocol"], mean, std,
                     *("" if x is None else f"{x:.2f}" for x in here), len(c["values"]) or "", c["settings"],
                     "; ".join((*c["remarks"], *c["unlike"])).replace("**", "")])
    return rows


def cells_of(out: Path) -> list[dict]:
    """The cells of all tables of the results in `out`. Raises BadInput when there are none."""
    path = out / "results.jsonl"
    if not path.exists():
        raise BadInput(f"{path}: no results yet; run python train_seg.py --split 12.5 first")
    return cells(origin.read(path, data=str, slices=int, split=str, draw=int, backbone=str, protocol=str,
                             mDS=(int, float), organs=list), PROTOCOLS)


def of_command(report: Sequence[dict], split: str, backbones: Collection[str], here: dict) -> list[dict]:
    """The lines of a report that hold results of one command: of these backbones, on a store ({"data", "slices"})."""
    data = data_of(here)
    own = [c for c in report if c["split"] == split and (c["data"] + ",").startswith(f"{data},")]
    rows = {c["row"] for c in own if c["backbones"].intersection(backbones)}
    return [c for c in own if c["row"] in rows]


def conclude(out: Path, split: str, backbones: Collection[str], here: dict) -> None:
    """End a command: print what it measured, a line a method, and write the tables of all results; see `of_command`."""
    cells = cells_of(out)
    own = [c for c in of_command(cells, split, backbones, here) if c["values"]]
    where = "the generated phantom" if here["data"] == "phantom" else data_of(here)
    lines = []
    for row in dict.fromkeys(c["row"] for c in own):
        line = [c for c in own if c["row"] == row]
        marks = doubts(line[0]["remarks"])
        lines.append(f"  {line[0]['method']}" + f" ({'; '.join(marks)})" * bool(marks) + ": "
                     + ", ".join(f"{c['protocol']} {_mean(c['values'])}" for c in line))
    print(f"\nmean Dice in % on {where}, {split} % of the training volumes:")
    for line in dict.fromkeys(lines):  # random weights stand in several tables
        print(printable(line))
    _write(out, cells)
    print(f"all results: {out / 'report.md'}, {out / 'report.csv'}; python train_seg.py --report --out {out} prints "
          "them and draws report.png")


def _write(out: Path, cells: Sequence[dict]) -> str:
    """report.md and report.csv; returns the former."""
    runs.write_text(out / "report.md", text := markdown(cells))
    write_csv(out / "report.csv", csv_rows(cells))
    return text


def write_report(out: Path) -> None:
    """report.md, report.csv and report.png of all results in `out`, printed too. Raises BadInput when there are none.
    """
    cells = cells_of(out)
    text = _write(out, cells)
    drawn = figures.attempt(figures.report, out / "report.png", cells)
    kinds = ("md", "csv", "png") if drawn else ("md", "csv")
    print(text + f"written: {', '.join(str(out / f'report.{kind}') for kind in kinds)}")
