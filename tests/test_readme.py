"""README.md against the source: what it names exists. The source is parsed, not imported."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = re.sub(r"^#SBATCH .*", "", (ROOT / "README.md").read_text(), flags=re.M)  # Slurm's own flags
MODULES = {str(p.relative_to(ROOT).with_suffix("")): p for folder in (".", "ct", "engine", "tools")
           for p in (ROOT / folder).glob("*.py")}
# torchrun's own flags, checked against nothing
TORCHRUN = {"--max-restarts", "--standalone", "--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint",
            "--rdzv-id"}


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


def paper_to_code() -> list[tuple[str, list[tuple[str, str]]]]:
    """The rows of README's table: (the paper's part, [(module, definition)])."""
    section = re.search(r"^## The paper in the code\n(.*?)^## ", README, re.M | re.S)
    assert section, "README has no section 'The paper in the code'"
    rows = [re.fullmatch(r"\| (.+?) \| (.+?) \|", line) for line in section[1].splitlines() if line.startswith("| ")]
    return [(row[1], re.findall(r"`([\w/]+)\.py: ([\w.]+)`", row[2])) for row in rows[1:]]  # the first is the head


def flags(module: str) -> set[str]:
    """The long flags of a script's parser, with those that processes.Parser.common and prepare.task_flags give it."""
    found = flags_in(tree(module))
    used = {n.attr for n in ast.walk(tree(module)) if isinstance(n, ast.Attribute)}
    if module == "datasets":  # forwards the commands
        found |= flags("ct/prepare")
    if "task_flags" in used:
        found |= flags_in(find("ct/prepare", "task_flags"))
    return found | flags("engine/processes") if "common" in used and module != "engine/processes" else found


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


def commands() -> list[tuple[str, str]]:
    """(script, its arguments) of every command of a script in a code block or between backticks."""
    text = re.sub(r"\s+#.*", "", "\n".join(line for line in README.splitlines() if line.startswith("    ")))
    text += "\n" + "\n".join(re.findall(r"`([^`]+)`", README.replace("```", "")))
    text = re.sub(r"python -m (\w+)\.(\w+)", r"python \1/\2.py", text)
    return re.findall(r"(?<![\w/])((?:(?:ct|engine|tools)/)?\w+)\.py((?: [^\n]*)?)$", text, re.M)


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


def test_every_flag_exists():
    scripts = [m for m in MODULES if flags(m) and m != "engine/processes"]
    known = set().union(*(flags(m) for m in scripts))
    assert {"--local", "--no-geometric", "--data", "--split", "--positions", "--skip-bad"} <= known  # the search works
    unknown = mentioned(README) - known - TORCHRUN - {"--help"}
    assert not unknown, f"README names flags that no script has: {sorted(unknown)}"


def test_every_command_has_the_flags_it_uses():
    found = commands()
    assert {"train_ssl", "train_seg", "svd_spectrum", "datasets"} <= {script for script, _ in found}
    for script, arguments in found:
        assert script in MODULES, f"README runs {script}.py, which does not exist"
        unknown = mentioned(arguments) - flags(script)
        assert not unknown, f"README: {script}.py{arguments}: it has no {sorted(unknown)}"


def test_every_constant_exists():
    found = re.findall(rf"`({'|'.join(m.replace('/', '.') for m in MODULES)})\.([A-Z][A-Z_]+)`", README)
    assert len(found) > 10
    for module, name in found:
        names = {n.id for s in tree(module.replace(".", "/")).body if isinstance(s, ast.Assign) for n in ast.walk(s)
                 if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        assert name in names, f"README names {module}.{name}, which {module}.py does not define"


def test_every_definition_and_file_between_backticks_exists():
    quoted = set(re.findall(r"`([\w./-]+)`", README))
    for name in quoted:
        if re.fullmatch(r"\w+\.py|splits/[\w.]+|tests/\w+\.py|requirements\S*\.txt", name):
            assert (ROOT / name).is_file(), f"README names {name}, which does not exist"
    for name in ("Encoder.forward", "ZCAWhitening", "whiten_last_norm", "fold", "draw_crops", "pooled_dice"):
        assert name not in quoted or any(find(m, name) for m in MODULES), name


def test_linked_files_and_pictures_exist():
    links = re.findall(r"\]\(([^)#\s]+)\)", README)
    assert links
    for link in links:
        assert re.match(r"https?:", link) or (ROOT / link).is_file(), f"README links {link}, which does not exist"


def test_the_three_commands_and_the_two_targets_stand_as_they_are_run():
    for command in ("torchrun train_ssl.py --local --zca", "python train_seg.py --split 12.5",
                    "python svd_spectrum.py", "torchrun -- train_ssl.py --local --zca"):
        assert command in README, command
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    named = set(re.findall(r"(?:`|    )make ([a-z]+)", README))
    assert {"demo", "test", "setup"} <= named <= set(targets)
