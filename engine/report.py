"""Tables 1 and 2 from results.jsonl, the paper's figures beside those of here."""

import csv
import io
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ct.prepare import WINDOW
from ct.tasks import ORGANS
from ct.volumes import BadInput
from engine import figures, leaks, runs
from metrics import LEAST_GAP, mean_std, nan_mean
from segment import PROTOCOLS

# Backbones and the rows they are: first what the paper has, in its order; the stand-ins for its ImageNet weights
# (random ones, and the run that all rows of small data start from) come before it.
ROWS = {"imagenet": "No SSL", "random": "Random weights", "start": "The start", "moco": "MoCo v2",
        "moco-local": "MoCo v2 + local", "moco-zca": "MoCo v2 + ZCA", "moco-local-zca": "MoCo v2 + local + ZCA"}
BEYOND = {"moco-every4": "MoCo v2, each 4th slice",
          "moco-nogeo": "MoCo v2, no geometry", "moco-zca-nogeo": "MoCo v2 + ZCA, no geometry",
          "moco-local-aligned": "MoCo v2 + aligned local", "moco-local-zca-aligned": "MoCo v2 + aligned local + ZCA",
          "author-moco": "MoCo v2, first author's settings", "author-zca": "MoCo v2 + ZCA, first author's settings"}
TABLE_1 = ("No SSL", "MoCo v2", "MoCo v2 + local + ZCA")
DRAWS = {"12.5": 3, "25": 3, "100": 1}  # random choices of training volumes of each split
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
    """Results (a dict a run, oldest first) -> every cell of the tables that have one, a table for each data set.

    Of the paper's own data Tables 1 and 2, whole; of other data one table of the paper's rows, those that were run.
    Rows that the paper lacks come after them: "Beyond the paper", "Others". A cell: table, data, split, method,
    protocol, `paper` (as printed; "" where it has none), `values` (mDS in % of the draws and seeds run; of equal runs
    the newest), `organs` (their mean Dice of each organ) and their `names`, `settings`, `remarks` on its pre-training.
    """
    kinds: dict[str, set] = {}
    for r in results:
        kinds.setdefault(data_of(r), set()).add(organs_of(r))

    def table_of(r: dict) -> str:  # other organs of the same data are another table
        return data_of(r) + f", {_listed(organs_of(r))}" * (len(kinds[data_of(r)]) > 1)

    newest = {(table_of(r), r["split"], method_of(r), r["protocol"], r["draw"], r.get("seed")): r for r in results}
    contents: dict[tuple, set[str]] = {}
    for (data, _, method, *_), r in newest.items():
        contents.setdefault((data, method), set()).add(file_of(r))
    groups: dict[tuple, list[dict]] = {}
    for (data, split, method, protocol, *_), r in newest.items():
        apart = f" [{file_of(r)[:8]}]" * (file_of(r) != "" and len(contents[data, method]) > 1)
        groups.setdefault((data, split, method + apart, protocol), []).append(r)
    out = []
    for data in sorted({k[0] for k in groups}, key=lambda d: (d != "BTCV", d)):
        run, known = {k[1:3] for k in groups if k[0] == data}, [*ROWS.values()]
        if data == "BTCV":
            rows = [("Table 1", *k) for k in PRINTED if k[1] in TABLE_1]
            rows += [("Table 2", *k) for k in PRINTED if k[0] == "100"]
            known = ["No SSL", *known[3:]]
        else:
            rows = [("The paper's rows", split, m) for split in DRAWS for m in known if (split, m) in run]
        rows += [("Beyond the paper", split, m) for split in DRAWS for m in BEYOND.values() if (split, m) in run]
        rows += [("Others", *k) for k in sorted(run) if k[1] not in (*known, *BEYOND.values())]
        for table, split, method in rows:
            printed = PRINTED.get((split, method), ("",) * 3) if data == "BTCV" else ("",) * 3
            for protocol, paper in zip(protocols, printed, strict=True):
                found = groups.get((data, split, method, protocol), [])
                organs = nan_mean(np.array([r["organs"] for r in found], float), 0).tolist() if found else []
                names = organs_of(found[0]) if found else ()
                out.append({"table": table, "data": data, "split": split, "method": method, "protocol": protocol,
                            "paper": paper, "values": [100 * r["mDS"] for r in found],
                            "organs": organs, "names": names,
                            "settings": " / ".join(sorted({settings_of(r) for r in found})),
                            "remarks": sorted({remark for r in found for remark in remarks_on(r)})})
    filled = {(c["table"], c["data"]) for c in out if c["values"]}
    return [c for c in out if (c["table"], c["data"]) in filled]


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


def label(name: str, phantom: bool) -> str:
    """The row that a run's name stands for, its seed behind it; names that are no row stay as they are."""
    bare = name.removeprefix("phantom-") if phantom else name
    run, seed = re.fullmatch(r"(.*?)(?:-seed(\d+))?", bare, re.DOTALL).groups()
    row = (ROWS | BEYOND).get(run)
    return name if row is None else row + f", seed {seed}" * bool(seed)


def method_of(result: dict) -> str:
    """The row that a result belongs to, whatever its seed; a file, or a run of another name, is its own."""
    name = result["backbone"]
    row = label(name, result["data"] == "phantom").split(", seed ")[0]
    taken = row != name or name in (ROWS | BEYOND).values()
    return f"{name} (a file)" if taken and file_of(result) else row


def file_of(result: dict) -> str:
    """The checksum of the weights that a file held; nothing of a run, ImageNet's or random weights.

    Files of one name and different content are rows of their own.
    """
    known = result.get("pretraining") or {"step": 0}
    named = result["backbone"] in ("imagenet", "random")
    return known["checksum"] if known["step"] is None and not named else ""


def settings_of(result: dict) -> str:
    """What runs of one table must have in common to be compared: the side of what is looked at (the probe) included."""
    arch, iterations, batch, crop, lr = (result.get(k, "?") for k in (
        "arch", "iterations", "batch_size", "crop_size", "lr"))
    folded = ", whitening folded" * (result.get("whitening") == "fold" and result["protocol"] != "linear-frozen")
    shown = "whole slices" if result.get("whole_slices") else "crops"
    return f"{arch}, {iterations} iterations of {batch} {shown} of {crop} px, lr {lr}{folded}, evaluated at {crop} px"


def remarks_on(result: dict) -> list[str]:
    """What stands beside a result, of the pre-training that it measures."""
    known, remarks = result.get("pretraining", {}), leaks.marks(result)
    if known.get("horizon") is None:  # no run of train_ssl.py
        return remarks
    remarks += [f"views of {known['view_px']} px of slices of {known['slice_px']} px"]
    window = result.get("window", WINDOW)
    if tuple(window) != WINDOW:
        remarks.append(f"HU {window[0]:g} to {window[1]:g}")
    if known["step"] < known["horizon"]:
        remarks.append(f"**unfinished: step {known['step']} of {known['horizon']}**")
    if known["gap"] is not None and known["gap"] < LEAST_GAP:
        remarks.append("**did not train**: it does not tell slices apart")
    return remarks


def markdown(report: Sequence[dict]) -> str:
    """Cells as Markdown: the paper's figures and those of here in columns of their own, mean ± standard deviation (n).

    Columns of the paper's own data are all there; of others those in which something was run.
    """
    text = []
    for table, data in dict.fromkeys((c["table"], c["data"]) for c in report):
        own = [c for c in report if (c["table"], c["data"]) == (table, data)]
        protocols = list(dict.fromkeys(c["protocol"] for c in own if data == "BTCV" or c["values"]))
        own = [c for c in own if c["protocol"] in protocols]
        protocols = list(dict.fromkeys(c["protocol"] for c in own))
        beside = data == "BTCV" and table.startswith("Table")
        where = "the generated phantom (these are no BTCV results)" if data == "phantom" else data
        columns = [f"{p}, paper | {p}, here" if beside else p for p in protocols]
        counts = sorted({int(np.isfinite(np.array(c["organs"], float)).sum()) for c in own if c["values"]})
        number = " or ".join(map(str, counts or [len(ORGANS) - 1]))
        text.append(f"{table}, on {where}. Mean Dice over {number} organ{'s' * (number != '1')} in %, pooled over the "
                    "validation set; ± standard deviation over draws and seeds (n - 1), n their number.")
        for protocol in protocols:
            settings = sorted({c["settings"] for c in own if c["protocol"] == protocol} - {""})
            differ = "**the settings differ:** " if len(settings) > 1 or " / " in "".join(settings) else ""
            if settings:
                text.append(f"- {protocol}: {differ}{' / '.join(settings)}")
        views = {r for c in own for r in c["remarks"] if r.startswith("views")}
        if views:
            text.append(f"- pre-training: {' / '.join(sorted(views))}")
        text += ["", f"| split | method | {' | '.join(columns)} |"]
        text.append("|---" * (text[-1].count("|") - 1) + "|")
        for split, method in dict.fromkeys((c["split"], c["method"]) for c in own):
            line = [c for c in own if (c["split"], c["method"]) == (split, method)]
            remarks = sorted({r for c in line for r in c["remarks"]} - (views if len(views) == 1 else set()))
            shown = [f"{split} %", f"{method} ({'; '.join(remarks)})" if remarks else method]
            for c in line:
                shown += [c["paper"], _mean(c["values"])] if beside else [_mean(c["values"])]
            text.append("| " + " | ".join(shown) + " |")
        text.append("")
    return "\n".join(text)


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
    rows = [["table", "data", "split", "method", "protocol", "paper mDS", "paper sd", "mDS", "sd", "n", "settings"]]
    for c in report:
        mean, _, std = c["paper"].partition(" ± ")
        here = mean_std(c["values"]) if c["values"] else (None, None)
        rows.append([c["table"], c["data"], c["split"], c["method"], c["protocol"], mean, std,
                     *("" if x is None else f"{x:.2f}" for x in here), len(c["values"]) or "", c["settings"]])
    return rows


def cells_of(out: Path) -> list[dict]:
    """The cells of Tables 1 and 2 of all results in `out`. Raises BadInput when there are none."""
    path = out / "results.jsonl"
    if not path.exists():
        raise BadInput(f"{path}: no results yet; run python train_seg.py --split 12.5 first")
    return cells(runs.read_log(path), PROTOCOLS)


def write_report(out: Path) -> None:
    """report.md, report.csv and report.png of all results in `out`, printed too. Raises BadInput when there are none.
    """
    cells = cells_of(out)
    text = markdown(cells)
    runs.write_text(out / "report.md", text)
    write_csv(out / "report.csv", csv_rows(cells))
    drawn = figures.attempt(figures.report, out / "report.png", cells)
    kinds = ("md", "csv", "png") if drawn else ("md", "csv")
    print(text + f"written: {', '.join(str(out / f'report.{kind}') for kind in kinds)}")
