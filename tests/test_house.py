"""The house: which room may import which. The source is parsed, not imported."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (".", "views", "ct", "engine", "tools")
MATHEMATICS = {"moco", "group_norms", "local_loss", "whitening", "segment", "augment", "metrics", "views"}
COMMANDS = {"train_ssl", "train_seg", "svd_spectrum"}
ALLOWED = {"mathematics": {"mathematics"}, "ct": {"ct"}, "engine": {"engine", "ct", "mathematics"},
           "datasets": {"engine", "ct", "mathematics"}, "commands": {"datasets", "engine", "ct", "mathematics"},
           "tools": {"tools", "commands", "datasets", "engine", "ct", "mathematics"}}


def room(module: str) -> str | None:
    first = module.split(".")[0]
    if first in ("ct", "engine", "tools", "datasets"):
        return first
    return "mathematics" if first in MATHEMATICS else "commands" if first in COMMANDS else None


def rooms() -> dict[Path, str]:
    """{file: the room that it belongs to} of the whole house."""
    files = [p for folder in FOLDERS for p in (ROOT / folder).glob("*.py")]
    return {p: room(p.stem if p.parent == ROOT else p.parent.name) for p in files}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):  # also within functions
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found.add(node.module)
    return found


def test_arrows_run_one_way():
    assert len(rooms()) > 20
    for path, own in rooms().items():
        assert own, f"{path.name}: a room that the house does not have"
        for module in imported(path):
            if other := room(module):
                assert other in ALLOWED[own], f"{path.relative_to(ROOT)} imports {module}: {own} must not need {other}"


def test_the_mathematics_needs_torch_numpy_scipy_only():
    for path in (p for p, own in rooms().items() if own == "mathematics"):
        outside = {m.split(".")[0] for m in imported(path)} - MATHEMATICS
        assert not outside & {"nibabel", "tqdm", "PIL", "matplotlib"}, path.name


def test_the_project_installs_every_module():
    project = (ROOT / "pyproject.toml").read_text()
    modules, packages = (re.findall(r'"(\w+)"', re.search(rf"^{key} = \[(.*?)\]", project, re.M | re.S)[1])
                         for key in ("py-modules", "packages"))
    assert sorted(modules) == sorted(path.stem for path in ROOT.glob("*.py"))
    assert sorted(packages) == sorted(FOLDERS[1:])


@pytest.mark.parametrize("path", rooms(), ids=lambda path: path.stem)
def test_no_file_and_no_function_is_too_long_to_read(path):
    """400 lines a file, 200 of the mathematics, 60 a function."""
    text = path.read_text()
    assert len(text.splitlines()) < (200 if rooms()[path] == "mathematics" else 400)
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    assert not [n.name for n in functions if n.end_lineno - n.lineno >= 60]


@pytest.mark.parametrize("name", ["train_ssl", "train_seg"])
def test_a_step_and_the_loop_around_it_are_a_screen_each(name):
    """50 lines: what they do stands one under the other."""
    functions = [n for n in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())) if isinstance(n, ast.FunctionDef)]
    lines = {n.name: n.end_lineno - n.lineno + 1 for n in functions if n.name in ("step", "train")}
    assert lines.keys() == {"step", "train"} and max(lines.values()) <= 50, lines
