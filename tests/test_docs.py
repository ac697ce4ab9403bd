"""README.md, CONTRIBUTING.md, docs/ and records/ against the source: what they name exists, commands run as printed.

The source is parsed, not imported, but for the commands: a shell takes the code blocks apart, each script's own parser
reads what it is given there, and RUNS says which test runs it, or CANNOT why none does.
"""

import argparse
import ast
import csv
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.run import get_args_parser
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import metrics
from ct import phantom, tasks
from engine.report import DRAWS, PRINTED, ROWS
from segment import PROTOCOLS, Segmenter

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md",
         *(p for folder in ("docs", "records") for p in sorted((ROOT / folder).glob("*.md")))]
DOCS = {str(p.relative_to(ROOT)): re.sub(r"^#SBATCH .*", "", p.read_text(), flags=re.M) for p in PAGES}  # Slurm's flags
README, ALL = DOCS["README.md"], "\n".join(DOCS.values())
MODULES = {str(p.relative_to(ROOT).with_suffix("")): p for folder in (".", "views", "ct", "engine", "tools")
           for p in (ROOT / folder).glob("*.py")} | {"tests/stress": ROOT / "tests/stress.py"}
# flags of torchrun, Slurm and TensorBoard, checked against nothing here
OTHERS = {"--max-restarts", "--standalone", "--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint",
          "--rdzv-id", "--logdir", "--cpus-per-task", "--signal", "--signals-to-handle"}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def find(module: str, name: str) -> ast.AST | None:
    """The definition of `function`, `Class` or `Class.method` in a module, or None."""
    node: ast.AST | None = tree(module)
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        node = next((n for n in getattr(node, "body", ()) if isinstance(n, kinds) and n.name == part), None)
    return node


def constants(module: str) -> set[str]:
    return {n.id for s in tree(module).body if isinstance(s, ast.Assign) for n in ast.walk(s)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def paper_to_code() -> list[tuple[str, list[tuple[str, str]]]]:
    """The rows of README's table: (the paper's part, [(module, definition)])."""
    table = re.search(r"^\| paper \| code \|\n(.*?)^$", README, re.M | re.S)
    assert table, "README has no table of the paper's parts in the code"
    rows = [re.fullmatch(r"\| (.+?) \| (.+?) \|", line) for line in table[0].splitlines() if line.startswith("| ")]
    return [(row[1], re.findall(r"`([\w/]+)\.py: ([\w.]+)`", row[2])) for row in rows[1:]]  # the first is the head


def flags(module: str) -> set[str]:
    """The long flags of a script's parser, with those that launch.Parser.common and ct/prepare.py give it."""
    found = flags_in(tree(module))
    used = {n.attr for n in ast.walk(tree(module)) if isinstance(n, ast.Attribute)}
    if module == "datasets":  # forwards the commands
        found |= flags("ct/prepare")
    for shared in {"task_flags", "images_flag"} & used:
        found |= flags_in(find("ct/prepare", shared))
    return found | flags("engine/launch") if "common" in used and module != "engine/launch" else found


def flags_in(node: ast.AST) -> set[str]:
    found = set()
    for call in ast.walk(node):
        if not (isinstance(call, ast.Call) and getattr(call.func, "id", getattr(call.func, "attr", "")) in
                ("add", "add_argument")):
            continue
        for argument in call.args:
            if isinstance(argument, ast.Constant) and str(argument.value).startswith("--"):
                found.add(argument.value)
                if any(k.arg == "action" and "BooleanOptionalAction" in ast.unparse(k.value) for k in call.keywords):
                    found.add(argument.value.replace("--", "--no-", 1))
    return found


def mentioned(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text))


# ---------------------------------------------------------------------------------------------------------- what exists


@pytest.mark.parametrize("paper,code", paper_to_code(), ids=lambda x: x if isinstance(x, str) else "")
def test_each_part_of_the_paper_is_where_readme_says(paper, code):
    assert code, f"README, {paper!r}: names no `file.py: function`"
    for module, name in code:
        assert module in MODULES, f"README, {paper!r}: there is no {module}.py"
        node = find(module, name)
        assert node is not None, f"README, {paper!r}: {module}.py has no {name}"
        lines = MODULES[module].read_text().splitlines()[node.lineno - 1 : node.end_lineno]  # with their comments
        for equation in re.findall(r"Eq\. \d", paper):
            assert re.search(re.escape(equation) + r"(?!\d)", "\n".join(lines)), \
                f"{module}.py: {equation!r} does not stand in {name}, where README says it is computed"


def test_no_equation_figure_or_table_is_left_out():
    parts = " ".join(paper for paper, _ in paper_to_code())
    for part in ("Eq. 1", "Eq. 2", "Eq. 3", "Eq. 4", "Eq. 5", "Fig. 1", "Fig. 2", "Table 1", "Table 2"):
        assert part in parts, part


def test_readme_is_a_door():
    """A picture, what it is for and the first command before a reader has to scroll."""
    lines = README.splitlines()
    assert len(lines) <= 150
    assert next(i for i, line in enumerate(lines) if line.startswith("![")) < 15
    assert next(i for i, line in enumerate(lines) if line.startswith("```bash")) < 40


def test_the_papers_numbers_are_those_of_the_report():
    """As printed in the paper; a cell that the paper leaves blank is blank."""
    rows = dict(re.findall(r"^\| ([\d.]+ % \| (?:No SSL|MoCo)[^|]*) \| (.*) \|$", README, re.M))
    assert len(rows) == len(PRINTED)
    for (split, method), cells in PRINTED.items():
        row = rows[f"{split} % | {method}" + " (ImageNet)" * (method == "No SSL")].split("|")
        assert [c.strip() for c in row] == list(cells), (split, method)


@pytest.mark.parametrize("page", DOCS)
def test_every_flag_exists(page):
    scripts = [m for m in MODULES if flags(m) and m != "engine/launch"]
    known = set().union(*(flags(m) for m in scripts))
    assert {"--local", "--no-geometric", "--data", "--split", "--positions", "--skip-bad"} <= known  # the search works
    unknown = mentioned(DOCS[page]) - known - OTHERS - {"--help"}
    assert not unknown, f"{page} names flags that no script has: {sorted(unknown)}"


def test_every_constant_exists():
    found = re.findall(rf"`({'|'.join(m.replace('/', '.') for m in MODULES)})\.([A-Z][A-Z_]+)`", ALL)
    assert len(found) > 10
    for module, name in found:
        assert name in constants(module.replace(".", "/")), f"{module}.{name}: {module}.py does not define it"


@pytest.mark.parametrize("page", DOCS)
def test_every_definition_and_file_between_backticks_exists(page):
    text = FENCE.sub("", DOCS[page])
    quoted = set(re.findall(r"`([\w./-]+)`", text))
    for name in quoted:
        if re.fullmatch(r"(\w+/)*\w+\.(py|sh)|splits/[\w.]+|tests/\w+\.py|requirements\S*\.txt", name):
            assert (ROOT / name).is_file(), f"{page} names {name}, which does not exist"
        parts = name.split(".")
        for i in (1, 2):  # moco.MoCo, engine.backbones.IMAGENET
            module, rest = "/".join(parts[:i]), ".".join(parts[i:])
            if module in MODULES and rest and rest not in ("py", "md"):
                assert find(module, rest) or rest in constants(module), f"{page} names {name}, which does not exist"
    for module, name in re.findall(r"`([\w/]+)\.py: ([\w.]+)`", text):
        assert module in MODULES and find(module, name), f"{page} names {module}.py: {name}, which does not exist"
    classes = {n.name for m in MODULES for n in tree(m).body if isinstance(n, ast.ClassDef)}
    for name in quoted:
        if name.partition(".")[0] in classes:
            assert any(find(m, name) for m in MODULES), f"{page} names {name}, which does not exist"
    for name in ("Encoder.forward", "ZCAWhitening", "whiten_last_norm", "fold", "draw_crops", "pooled_dice"):
        assert name not in quoted or any(find(m, name) for m in MODULES), name


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", DOCS)
def test_linked_files_pictures_and_headings_exist(page):
    """Links are relative to the page."""
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", DOCS[page]))
    assert links or page != "README.md"
    for link in links:
        if re.match(r"https?:|../../actions/", link):  # the latter: of the repository's own page
            continue
        file, _, anchor = link.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert path.is_file(), f"{page} links {link}, which does not exist"
        assert not anchor or anchor in anchors(path.read_text()), f"{page} links {link}: no such heading there"


def test_the_pages_are_reached_from_readme():
    """The records from the pages that quote them."""
    for page in DOCS:
        if page.startswith("records/"):
            assert f"(../{page}" in ALL, f"no page of docs/ links {page}"
        else:
            assert page == "README.md" or f"({page})" in README, f"README does not link {page}"


def test_a_sentence_of_measurements_has_no_commit_and_each_table_a_record():
    page = DOCS["docs/measurements.md"]
    assert not re.findall(r"\b(?=\w*\d)(?=\w*[a-f])[0-9a-f]{7,40}\b", page)
    for section in page.split("\n## ")[1:]:
        assert "\n|" not in section or "(../records/" in section, f"no source: {section.splitlines()[0]}"
    for record, text in DOCS.items():
        if record.startswith("records/") and record != "records/README.md":
            assert re.search(r"\b[0-9a-f]{7}\b", text) and re.search(r"\b20\d\d-\d\d-\d\d\b|source lost", text), record


# ------------------------------------------------------------------------------------------------------------- commands

# Programs of others that the documents call; `RECORD` notes the call of each, and nothing is done.
PROGRAMS = ("python", "torchrun", "make", "curl", "md5sum", "unzip", "mkdir", "rm", "pip", "git", "sbatch", "scontrol",
            "head", "tensorboard", "grep", "cat", "bash")
RECORD = "".join(f"{p}() {{ record {p} \"$@\"; }}\n" for p in PROGRAMS) + r"""
record() { local call; call=$(printf '%s\037' "$@"); printf '%s\036' "$call" >> "$CALLS"; }  # one write: whole
srun() { shift 2; "$@"; }  # its --cpus-per-task and the number
cd() { :; }
"""
SLURM = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "1", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "32"}


def calls(text: str, folder: Path) -> list[list[str]]:
    """What a piece of shell would call, as argument lists: loops, lines that go on and variables are the shell's."""
    (folder / ".venv/bin").mkdir(parents=True, exist_ok=True)
    (folder / ".venv/bin/activate").touch()
    (log := folder / "calls").write_text("")
    environment = {"PATH": "/nowhere", "CALLS": str(log), "HOME": str(folder), **SLURM}
    done = subprocess.run(["/bin/bash", "-uc", RECORD + text + "\nwait"], cwd=folder, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, f"{text}\n{done.stderr}"
    return [record.split("\x1f")[:-1] for record in log.read_text().split("\x1e")[:-1]]


def pieces(page: str) -> list[str]:
    """Every piece of shell of a page: code blocks, and commands between backticks."""
    blocks, rest = FENCE.findall(DOCS[page]), FENCE.sub("", DOCS[page])
    found = [dedent(code) for _, language, code in blocks if language in ("bash", "sh")]
    for span in re.findall(r"`([^`\n]+)`", rest):
        if re.match(r"([A-Z_]+=\S+ )*(python|torchrun|make|pip|sbatch|tensorboard|bash) \S", span):
            found.append(span)
        elif re.match(r"(\w+/)*\w+\.py --?\w", span):
            found.append(f"python {span}")
    return found


def taken_apart(call: list[str]) -> list[tuple[str, list[str]]]:
    """A call and what it calls in turn, as (script or program, its arguments)."""
    program, *arguments = call
    if program == "python" and arguments[:1] == ["-m"]:
        return [(arguments[1].replace(".", "/"), arguments[2:])]
    if program == "python":
        return [(arguments[0].removesuffix(".py"), arguments[1:])]
    if program == "torchrun":
        parser = get_args_parser()
        parser.allow_abbrev = False
        told = parser.parse_args(arguments)
        own = arguments[: arguments.index(told.training_script)]
        return [("torchrun", own), (told.training_script.removesuffix(".py"), told.training_script_args)]
    if program == "make":
        given = dict(a.split("=", 1) for a in arguments if "=" in a)
        scripts = {"ARGS": "train_ssl", "SEG_ARGS": "train_seg"}
        inner = [(script, shlex.split(given[name])) for name, script in scripts.items() if name in given]
        run = [("torchrun", shlex.split(given["RUN"])[1:])] if given.get("RUN", "").startswith("torchrun") else []
        return [("make", [a for a in arguments if "=" not in a] + [f"{k}=" for k in given]), *inner, *run]
    return [(program, arguments)]


def key(script: str, arguments: list[str]) -> str:
    """A command without its values: `train_ssl --local --zca`, `datasets audit --data`, `make paper`."""
    if script in ("make", "tensorboard") or script in PROGRAMS and script != "torchrun":
        return f"make {arguments[0]}" if script == "make" else script
    said = [a for a in arguments[:1] if script in ("datasets", "ct/prepare")]
    return " ".join([script, *said, *sorted({a.split("=")[0] for a in arguments if re.match(r"--\w", a)})])


def collected() -> tuple[list[tuple[str, str, list[str]]], list[str]]:
    """([(page, script or program, its arguments)] of everything that the documents call, what is wrong with them)."""
    found, wrong = [], []
    with tempfile.TemporaryDirectory() as folder:
        for page in DOCS:
            for piece in pieces(page):
                try:
                    found += [(page, *part) for call in calls(piece, Path(folder)) for part in taken_apart(call)]
                except (AssertionError, SystemExit) as e:
                    wrong.append(f"{page}: {piece}: {e or 'torchrun refuses it'}")
    return found, wrong


COMMANDS, WRONG = collected()
USED = {key(script, arguments): (script, arguments, page) for page, script, arguments in reversed(COMMANDS)}  # first


HERE = "tests/test_docs.py::test_a_command_of_the_documents_runs"
# Each command of the documents, without its values, and the test that runs it.
RUNS = {
    "train_ssl": "tests/test_train_ssl.py::test_rows_start_from_a_run_of_out",
    "train_ssl --init": "tests/test_train_ssl.py::test_rows_start_from_a_run_of_out",
    "train_ssl --no-geometric": "tests/test_train_ssl.py::test_rows_start_from_a_run_of_out",
    "train_ssl --local --zca": "tests/test_train_ssl.py::test_a_run_leaves_its_files_and_a_torchvision_backbone",
    "train_ssl --geometric --local --zca": "tests/test_train_ssl.py::test_stopped_and_continued_is_never_stopped",
    "train_ssl --local --probe --zca": "tests/test_probe.py::test_a_run_with_it_is_the_run_without",
    "train_ssl --seed": "tests/test_train_ssl.py::test_the_phantoms_start_is_trained_first_and_once",
    "train_ssl --recipe": HERE,
    "train_ssl --recipe --zca": "tests/test_train_ssl.py::test_a_run_with_the_first_authors_settings",
    "train_ssl --zca": "tests/test_train_ssl.py::test_the_phantoms_start_is_trained_first_and_once",
    "train_ssl --arch --batch-size --data --ema --epochs --geometric --image-size --init --local --lr --queue --size "
    "--zca": HERE,
    "train_ssl --arch --batch-size --data --ema --epochs --image-size --init --lr --name --no-geometric --queue --size":
        HERE,
    "train_ssl --arch --batch-size --data --ema --epochs --image-size --init --lr --queue --size": HERE,
    "train_ssl --arch --batch-size --ema --epochs --image-size --lr --queue --size": HERE,
    "train_ssl --arch --image-size --local --name --zca": HERE,
    "train_ssl --data --geometric --local --name --queue --zca": HERE,
    "train_ssl --data --geometric --local --name --zca": HERE,
    "train_ssl --data --local --name --zca": HERE,
    "train_ssl --data --epochs --every --geometric --local --name --size --zca": HERE,
    "train_ssl --batch-size --local --name --zca": HERE,
    "train_ssl --init --local --name --zca": HERE,
    "train_ssl --geometric --local": HERE,
    "train_ssl --local": HERE,
    "train_ssl --local --seed --zca": HERE,
    "train_ssl --no-geometric --zca": HERE,
    "train_seg --compile": "tests/test_train_seg.py::test_compiling_changes_no_number_and_no_setting",
    "train_seg --backbone --iterations --no-whole-slices --protocol --split":
        "tests/test_train_seg.py::test_runs_without_flips_are_others",
    "train_seg --backbone --iterations --no-flip --no-whole-slices --out --protocol --split":
        "tests/test_train_seg.py::test_runs_without_flips_are_others",
    "train_seg --split": "tests/test_train_seg.py::test_three_protocols_leave_results_and_are_skipped_when_done",
    "train_seg --report": "tests/test_train_seg.py::test_report_states_mean_deviation_and_what_was_not_run",
    "train_seg --draw --save-predictions --split":
        "tests/test_predict.py::test_a_prediction_is_the_evaluations_own_voxel_for_voxel",
    "train_seg --predict --run": "tests/test_predict.py::test_no_prediction_is_overwritten_by_another_volumes",
    "train_seg --predict --predict-out --run":
        "tests/test_predict.py::test_no_prediction_is_overwritten_by_another_volumes",
    "train_seg --backbone --row --split":
        "tests/test_backbones.py::test_a_file_has_its_row_in_both_tables_of_a_phantom",
    "train_seg --backbone --protocol --split":
        "tests/test_backbones.py::test_a_file_has_its_row_in_both_tables_of_a_phantom",
    "train_seg --backbone --split": "tests/test_train_seg.py::test_a_run_that_counts_as_done_is_in_the_tables",
    "train_seg --backbone --split --window":
        "tests/test_edges.py::test_a_run_on_another_window_is_left_out_of_all_and_noted_alone",
    "train_seg --data --split": "tests/test_labelled.py::test_a_layout_changes_no_number",
    "train_seg --backbone --data --split":
        "tests/test_labelled.py::test_ids_are_those_of_the_files_again_in_predictions",
    "train_seg --data --labels --split":
        "tests/test_labelled.py::test_without_names_ids_are_found_and_other_choices_are_other_tables",
    "train_seg --backbone --data --labels --split":
        "tests/test_labelled.py::test_ids_are_those_of_the_files_again_in_predictions",
    "train_seg --arch --backbone --crop-size --split": "tests/test_labelled.py::test_a_layout_changes_no_number",
    "train_seg --arch --crop-size --iterations": HERE,
    "train_seg --backbone --crop-size --split": HERE,
    "train_seg --backbone --row": HERE,
    "train_seg --data --labels --split --val-cases --window": HERE,
    "train_seg --data --organs --split": HERE,
    "train_seg --protocol --seed --split": HERE,
    "svd_spectrum": "tests/test_train_seg.py::test_spectrum_command",
    "svd_spectrum --backbone": "tests/test_backbones.py::test_a_file_has_its_row_in_both_tables_of_a_phantom",
    "svd_spectrum --data": "tests/test_labelled.py::test_its_own_splits_tables_pictures_and_spectrum",
    "svd_spectrum --backbone --data --labels": HERE,
    "svd_spectrum --positions": HERE,
    "datasets audit --data": "tests/test_datasets.py::test_audit_names_duplicates_and_odd_volumes",
    "datasets audit --data --images": "tests/test_intake.py::test_a_flag_says_which_files_are_the_images",
    "datasets audit --data --labels": "tests/test_layouts.py::test_names_come_from_a_file",
    "datasets audit --data --verify": "tests/test_datasets.py::test_verify_finds_a_flipped_bit_and_what_was_deleted",
    "datasets prepare --data": "tests/test_datasets.py::test_both_commands_end_with_what_was_skipped_or_odd",
    "ct/phantom --layout --out": "tests/test_phantom.py::test_command",
    "torchrun": "tests/test_passes.py::test_two_processes_in_passes_equal_one",
    "torchrun --nproc-per-node": "tests/test_reliability.py::test_short_forms",
    "torchrun --nnodes --nproc-per-node --rdzv-backend --rdzv-endpoint": "tests/test_reliability.py::test_short_forms",
    "torchrun --nnodes --nproc-per-node --rdzv-backend --rdzv-endpoint --rdzv-id":
        "tests/test_reliability.py::test_short_forms",
    "bash": "tests/test_gpu_script.py::test_all_parts_run_to_their_end_on_a_cpu",
    "make paper": "tests/test_edges.py::test_make_paper_plans_or_says_in_one_line_what_is_wrong",
}
# Those that no test can run, and why.
DOWNLOADS, MINUTES, THIS = "downloads", "takes minutes to hours", "is, or holds, this suite"
CLUSTER, GPU, TOOL = "needs a cluster", "was measured on a GPU", "a tool of others"
CANNOT = {
    "make setup": DOWNLOADS, "make test-lowest": DOWNLOADS, "pip": DOWNLOADS, "curl": DOWNLOADS, "git": DOWNLOADS,
    "make demo": MINUTES, "make stress": MINUTES, "tests/stress --files --kills --minutes": MINUTES,
    "tools/against --pairs": MINUTES, "tools/mutants": MINUTES, "tools/mutants --jobs": MINUTES,
    "tools/bench": MINUTES, "tools/bench --peers": MINUTES,
    "tools/study --jobs --rows --seg --ssl --steps": MINUTES, "tools/study --seg --ssl --steps": MINUTES,
    "tools/study --jobs --phantom --rows --steps": MINUTES,
    "train_ssl --arch --epochs --init --no-geometric --zca-group": MINUTES,
    "make test": THIS, "make lint": THIS, "pytest": THIS,
    "train_ssl --arch --batch-size --bn-group --image-size --init --local --queue --size --steps --zca": GPU,
    "train_ssl --compile --init --local --name --steps --zca": GPU, "tools/overview": "needs the runs of make demo",
    "sbatch": CLUSTER, "scontrol": CLUSTER,
    "head": TOOL, "md5sum": TOOL, "mkdir": TOOL, "unzip": TOOL, "tensorboard": TOOL, "grep": TOOL, "cat": TOOL,
}
SCRIPTS = {"datasets", "train_ssl", "train_seg", "svd_spectrum", "ct/phantom", "tools/against", "tools/bench",
           "tools/mutants", "tools/overview", "tools/study", "tests/stress"}


@pytest.mark.parametrize("page", DOCS)
def test_code_is_fenced_and_says_its_language(page):
    assert all(language for _, language, _ in FENCE.findall(DOCS[page])), page
    assert "```" not in FENCE.sub("", DOCS[page]), f"{page}: a fence without its other end"
    assert not re.findall(r"^\n {4,}\S", FENCE.sub("", DOCS[page]), re.M), f"{page}: indented code; fence it"


def test_every_command_is_one_to_the_shell_and_to_torchrun():
    assert not WRONG, "\n".join(WRONG)


def test_every_command_is_run_by_a_test_or_has_a_reason():
    assert {"train_ssl", "train_seg", "svd_spectrum", "datasets"} <= {script for script, _, _ in USED.values()}
    for name, (_, _, page) in USED.items():
        assert (name in RUNS) != (name in CANNOT), f"{page}: {name}: name the test that runs it in RUNS, or CANNOT"
    unused = {*RUNS, *CANNOT} - {*USED}
    assert not unused, f"no document has {sorted(unused)}"


def without_other_tests(file: Path, name: str) -> str:
    """The source of a test and of what it may use of its file: all but the other tests."""
    kept = [n for n in ast.parse(file.read_text()).body
            if not (isinstance(n, ast.FunctionDef) and n.name.startswith("test_") and n.name != name)]
    assert any(isinstance(n, ast.FunctionDef) and n.name == name for n in kept), f"{file.name} has no {name}"
    return "\n".join(map(ast.unparse, kept))


@pytest.mark.parametrize("name", [name for name, test in RUNS.items() if test != HERE])
def test_the_test_that_runs_a_command_gives_its_flags(name):
    file, _, test = RUNS[name].partition("::")
    source = without_other_tests(ROOT / file, test)
    if "stress_table" in source:  # the table of stress.py's short forms, which the suite runs
        source += (ROOT / "tests/stress.py").read_text()
    for flag in re.findall(r"--[\w-]+", name):
        assert f"'{flag}'" in source or f'"{flag}"' in source, f"{RUNS[name]} does not give {flag} of {name}"


class Parsed(BaseException):
    """A script has read its arguments: enough."""


def parsed(script: str, arguments: list[str], monkeypatch) -> argparse.Namespace:
    """What a script's own parser makes of arguments; SystemExit where it refuses them."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *more):
        raise Parsed(original(self, *more))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(Parsed) as caught:
            importlib.import_module(script.replace("/", ".")).main()
    return caught.value.args[0]


@pytest.mark.parametrize("page", DOCS)
def test_every_command_is_read_by_its_own_parser(page, monkeypatch):
    """Each with its values, as it stands there; of stress.py, which changes what it imports, the flags alone."""
    for script, arguments in [part for where, *part in COMMANDS if where == page]:
        if script in PROGRAMS or script in ("pytest", "make"):
            continue
        assert script in SCRIPTS, f"{page} runs {script}.py, which is no command"
        unknown = mentioned(" ".join(arguments)) - flags(script)
        assert not unknown, f"{page}: {script}.py {arguments}: it has no {sorted(unknown)}"
        if script != "tests/stress":
            parsed(script, arguments, monkeypatch)


def test_the_search_for_commands_sees_loops_lines_that_go_on_and_what_is_wrong(tmp_path, monkeypatch):
    told = calls("for x in 1 2; do\n  python train_seg.py \\\n --split $x  # so\ndone\nsrun -c 4 torchrun -- "
                 "train_ssl.py --local &", tmp_path)
    assert told == [["python", "train_seg.py", "--split", "1"], ["python", "train_seg.py", "--split", "2"],
                    ["torchrun", "--", "train_ssl.py", "--local"]]
    assert taken_apart(told[2])[1] == ("train_ssl", ["--local"])
    for wrong in ("pythn train_ssl.py", "python $missing", "for x in 1; do"):
        with pytest.raises(AssertionError):
            calls(wrong, tmp_path)
    for wrong in (["--locl"], ["--epochs", "many"], ["--geometry"]):
        with pytest.raises(SystemExit):
            parsed("train_ssl", wrong, monkeypatch)


def test_the_three_commands_and_the_two_targets_stand_as_they_are_run():
    for command in ("torchrun train_ssl.py --local --zca", "python train_seg.py --split 12.5",
                    "python svd_spectrum.py", "torchrun -- train_ssl.py --local --zca"):
        assert command in README, command
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    named = {arguments[0] for page, script, arguments in COMMANDS if (page, script) == ("README.md", "make")}
    assert {"demo", "test", "setup"} <= named <= set(targets)
    assert {arguments[0] for _, script, arguments in COMMANDS if script == "make"} <= set(targets)


def test_the_jumps_of_reading_land():
    """The block of shell at the top of the walk through the code, run: each equation has one line."""
    [block] = [code for _, language, code in FENCE.findall(DOCS["docs/reading.md"]) if language == "bash"]
    lines = subprocess.run(["/bin/bash", "-c", block], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for equation, file in (("1", "moco"), ("2", "local_loss"), ("5", "whitening")):
        assert re.findall(rf"^(\w+)\.py:\d+:.*# Eq\. {equation}\b", lines, re.M) == [file], equation
    assert set(re.findall(r"^(\w+)\.py:\d+:.*# Eq\. 3\b", lines, re.M)) == {"moco", "train_ssl"}
    assert "_foreach_lerp_" in lines and lines.endswith("".join(f"{c}\n" for c in tasks.BTCV.cases("12.5", 0)))


def test_the_planned_runs_are_those_of_the_commands():
    """Of the paper's tables: as many as the text says, and a run for each printed cell, of each draw."""
    page = re.sub(r"(?<!\n)\n(?=\w)", " ", DOCS["docs/training.md"])  # lines of a paragraph as one
    text = page[page.index("Exactly the printed cells") :]
    block = FENCE.search(DOCS["docs/training.md"], DOCS["docs/training.md"].index("Exactly the printed cells"))[3]
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for program, script, *arguments in calls(block, Path(folder)):
            assert (program, script) == ("python", "train_seg.py")
            given = dict(zip(arguments[::2], arguments[1::2], strict=False))
            if "--split" in given:
                rows = [r for r in ROWS if r.startswith("moco")] + ["imagenet"]
                started += [(given["--split"], ROWS[backbone], protocol, draw)
                            for backbone in (rows if given["--backbone"] == "all" else [given["--backbone"]])
                            for protocol in ([given["--protocol"]] if "--protocol" in given else PROTOCOLS)
                            for draw in range(DRAWS[given["--split"]])]
    printed = [(split, method, protocol, draw) for (split, method), cells in PRINTED.items()
               for protocol, cell in zip(PROTOCOLS, cells, strict=True) if cell for draw in range(DRAWS[split])]
    assert sorted(started) == sorted(printed)
    assert int(re.search(r"(\d+) segmentation runs", text)[1]) == len(started)
    hours = {p: [float(h) for h in re.findall(r"([\d.]+) h", re.search(rf"\| iteration, {p} \|.*", page)[0])]
             for p in PROTOCOLS}
    for low, high, runs in ((28, 64, [p for _, _, p, _ in started]), (40, 88, PROTOCOLS * 29),
                            (32, 70, [p for _, _, p, _ in started] + ["linear-frozen"] * 18)):
        assert f"{low} to {high} GPU-hours" in page
        assert [round(sum(hours[p][i] for p in runs)) for i in (0, 1)] == pytest.approx([low, high], abs=1)


class Work(TorchDispatchMode):
    """Floating point operations of convolutions, and bytes that all operations read and write."""

    def __init__(self):
        super().__init__()
        self.flop = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        read, written = ([x for x in tree_leaves(y) if isinstance(x, torch.Tensor)] for y in ((args, kwargs), out))
        if not (func.is_view or name.startswith(("empty", "new_empty", "detach", "device", "_unsafe_view"))):
            self.bytes += sum(x.numel() * x.element_size() for x in read + written)
        if name == "convolution":
            self.flop += 2 * out.numel() * args[1][0].numel()
        elif name == "convolution_backward":  # of its input, its weights, or both
            self.flop += 2 * args[0].numel() * args[2][0].numel() * sum(args[-1][:2])
        return out


def test_the_costs_are_those_of_what_a_step_computes_and_moves(fakes_of_today):
    """The table of training.md, counted with tensors without content, and its times by the step's own rates."""
    rows = dict(re.findall(r"^\| (?:iteration, )?(step|[\w-]+)[^|]* (\|(?: [\d.]+ \|){2}.*)$", DOCS["docs/training.md"],
                           re.M))
    # seconds on one H200, records/h200.md: our step, and the plain network's forward and backward
    step, plain = 0.090 * 4.8 / 3.35, 0.052 * 4.8 / 3.35
    hours = {"step": 168_000 / 3600} | dict.fromkeys(PROTOCOLS, 40_000 / 3600)
    work = {name: Work() for name in hours}
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16):
        net, views = torchvision.models.resnet50(), torch.empty(256, 3, 224, 224)
        with work["step"]:
            with torch.no_grad():
                net(views)
            net(views).float().mean().backward()
        crops, labels = torch.empty(16, 3, 512, 512), torch.empty(16, 512, 512, dtype=torch.int64)
        for protocol in PROTOCOLS:
            model = Segmenter(torchvision.models.resnet50(), protocol)
            with work[protocol]:
                model.loss(crops, labels).backward()
    for name, seen in work.items():
        flop, moved, *times = (float(x) for x in re.findall(r" ([\d.]+)", rows[name]))
        assert (seen.flop / 1e12, seen.bytes / 1e9) == (pytest.approx(flop, abs=0.05), pytest.approx(moved, abs=0.5))
        known = step if name == "step" else plain
        by_bytes, by_flop = (known * getattr(seen, x) / getattr(work["step"], x) for x in ("bytes", "flop"))
        expected = [1000 * by_bytes, hours[name] * by_bytes, 1000 * by_flop, hours[name] * by_flop]
        assert times == pytest.approx(expected, rel=0.02)


# ------------------------------------------------------------------------------------------- what no other test runs


@pytest.fixture(scope="module")
def world(small_phantom, small_networks, tmp_path_factory):
    """A folder in which the documents' files and folders are: the phantom's, small, with runs of one step."""
    import train_seg
    import train_ssl

    root = tmp_path_factory.mktemp("world")
    common = ("--out", root / "runs", "--amp", "off", "--arch", "resnet_basic")
    ssl = ("--data", small_phantom / "AbdomenCT-1K", "--store", small_phantom.parent / "store", *common, "--init",
           "random", "--image-size", 64, "--batch-size", 8, "--bn-group", 4, "--queue", 32, "--zca-group", 16,
           "--steps", 1)
    seg = ("--data", small_phantom / "BTCV", "--store", small_phantom.parent / "seg", *common, "--crop-size", 64,
           "--batch-size", 2, "--iterations", 1)
    for more in (["--local", "--zca"], ["--no-geometric", "--name", "start"],
                 ["--local", "--zca", "--name", "r101-280"]):  # a small one, which no command can tell
        train_ssl.main([str(a) for a in (*ssl, *more)])
    train_seg.main([str(a) for a in (*seg, "--split", 100, "--protocol", "linear-frozen")])
    for file in ("my.ckpt", "FILE"):
        shutil.copy(root / "runs/start/backbone.pth", root / file)
    (root / "data").mkdir()
    (root / "data/BTCV").symlink_to(small_phantom / "BTCV")
    few = dict(labelled=5, unlabelled=0, shape=(4, 64, 64))
    phantom.write(root / "data/TotalSegmentator", **few, layout="totalsegmentator")
    for script in BLOCKS["docs/questions.md"]:
        if "BTCV8" in script:
            for _ in range(2):  # who runs it again finds its folders there
                subprocess.run([sys.executable, "-c", script], cwd=root, check=True)
    shutil.copytree(root / "data/BTCV8", root / "my_data", symlinks=True)
    (root / "names.txt").write_text("".join(f"{i} {name}\n" for i, name in tasks.BTCV.labels.items()))
    for line in DOCS["docs/questions.md"].splitlines():
        if line.startswith("printf"):
            subprocess.run(["/bin/bash", "-c", line], cwd=root, check=True)
    return root, {"train_ssl": ssl, "train_seg": seg}


BLOCKS = {page: [dedent(code) for _, language, code in FENCE.findall(text) if language == "python"]
          for page, text in DOCS.items()}


@pytest.mark.parametrize("name", [name for name, test in RUNS.items() if test == HERE and name in USED])
def test_a_command_of_the_documents_runs(name, world, tmp_path, monkeypatch):
    """As it stands there; after it, what makes it small: it counts, being the last."""
    script, arguments, _ = USED[name]
    root, small = world
    monkeypatch.chdir(root)
    shutil.copytree(root / "runs", tmp_path / "runs", copy_function=os.link)
    own = "--data" in arguments and script != "train_ssl"  # data of the world, for which a store is made
    common = small["train_ssl" if script == "train_ssl" else "train_seg"]
    more = [str(a) for flag, value in zip(common[::2], common[1::2], strict=True) for a in (flag, value)
            if not (flag == "--init" and flag in arguments) and not (own and flag in ("--data", "--store"))
            and not (script == "svd_spectrum" and flag in ("--crop-size", "--batch-size", "--iterations"))]
    more += ["--out", str(tmp_path / "runs")]
    more += ["--store", str(tmp_path / "store")] * own
    more += ["--overwrite"] * (script != "svd_spectrum")
    if script == "train_seg":
        more += [a for flag, value in (("--draw", "0"), ("--protocol", "linear-frozen"), ("--split", "100"))
                 for a in (flag, value) if flag not in arguments]
    more += ["--arch", "resnet_basic"]
    if script == "svd_spectrum":
        more += ["--image-size", "64"]
    if "--seed" in arguments and script == "train_seg":  # of which the world has no run
        more += ["--backbone", "random"]
    started = time.time_ns()
    importlib.import_module(script).main([*arguments, *more])
    wanted = {"train_ssl": "backbone.pth", "train_seg": "result.json", "svd_spectrum": "spectrum*.csv"}[script]
    assert any(p.stat().st_mtime_ns > started for p in (tmp_path / "runs").rglob(wanted))


def test_blocks_of_python_are_python():
    for page, blocks in BLOCKS.items():
        for block in blocks:
            compile(block, page, "exec")


@pytest.mark.parametrize("page, start", [("docs/training.md", "import pandas"), ("docs/training.md", "import json"),
                                         ("docs/questions.md", "import csv")])
def test_blocks_of_python_run(page, start, world, tmp_path, monkeypatch, capsys):
    """In a folder whose runs have the paper's names. (The block that makes BTCV8 is run for `world`.)"""
    [block] = [b for b in BLOCKS[page] if b.startswith(start)]
    for library in ("pandas", "tensorboard"):
        if library in block:
            pytest.importorskip(library, reason=f"{library} is not installed: pip install {library}")
    root, _ = world
    shutil.copytree(root / "runs/phantom-moco-local-zca", tmp_path / "runs/moco-local-zca", copy_function=os.link)
    run = "moco-local-zca-linear-frozen-100-0"
    shutil.copytree(root / f"runs/seg/phantom-{run}", tmp_path / f"runs/seg/{run}", copy_function=os.link)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    told = capsys.readouterr().out
    assert "tensorboard" in block and list(tmp_path.glob("tensorboard/*/events*")) or len(told.splitlines()) >= 2


def test_the_mean_over_eight_organs_is_transunets(world, tmp_path, monkeypatch, capsys):
    """Against metrics.transunet on the counts of the same eight."""
    [block] = [b for b in BLOCKS["docs/questions.md"] if b.startswith("import csv")]
    root, _ = world
    run = "moco-local-zca-linear-frozen-100-0"
    shutil.copytree(root / f"runs/seg/phantom-{run}", tmp_path / f"runs/seg/{run}", copy_function=os.link)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    told = [float(line.rsplit(" ", 1)[1]) for line in capsys.readouterr().out.splitlines()]
    with open(tmp_path / f"runs/seg/{run}/dice.csv", newline="") as f:
        rows = [r for r in csv.DictReader(f) if r["organ id"] in ("0", "1", "2", "3", "4", "6", "7", "8", "11")]
    cases = sorted({r["case"] for r in rows})
    table = np.array([[[int(r[k]) for k in ("intersection", "prediction", "truth")] for r in rows if r["case"] == case]
                      for case in cases])
    assert told[0] == pytest.approx(metrics.transunet(table, cases)[1], abs=1e-6)
    assert told[1] == pytest.approx(metrics.pooled_dice(table)[1:].mean())
