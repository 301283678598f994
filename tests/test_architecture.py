"""The import table of ARCHITECTURE.md holds, and the page names files that are there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT, modules

PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
EVERYWHERE = {"errors", "version"}


MODULES = modules()


def imports(name: str) -> set[str]:
    """Our own modules that a module imports, anywhere in it."""
    path, found = MODULES[name], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = (name if path.name == "__init__.py" else name.rpartition(".")[0]).split(".")
            around = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*around, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    found = {re.sub(r"^qcrd_fast\.(bench|cli)\b", r"\1", each) for each in found}
    return found & set(MODULES)


def room(name: str) -> str:
    """A module's row of the table: its folder, or a file at the top of `qcrd_fast`."""
    parts = name.split(".")
    return (
        parts[1] if parts[0] == "qcrd_fast" and len(parts) > 1 else "__init__" if parts == ["qcrd_fast"] else parts[0]
    )


def table() -> dict[str, set[str] | None]:
    """{room: what it may import}, None where anything."""
    found: dict[str, set[str] | None] = {}
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = re.findall(r"`([^`]+)`", cells[0]) if len(cells) == 3 else []
        if not names:
            continue
        rooms = [Path(name).stem for name in names]
        words = {word.strip() for word in cells[2].partition(";")[0].split(",")}
        allowed: set[str] | None
        if "anything" in words:
            allowed = None
        elif cells[2].startswith("nothing"):
            allowed = set()
        elif cells[2].startswith("all above"):
            spared = {word.strip() for word in cells[2].partition("except")[2].split(",")}
            allowed = {*found, *rooms} - spared
        else:
            allowed = words
        found |= dict.fromkeys(rooms, allowed)
    return found


TABLE = table()


def test_every_module_has_a_row_and_every_row_modules():
    assert {room(name) for name in MODULES} - EVERYWHERE == set(TABLE)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_what_the_table_allows(name):
    mine = room(name)
    allowed = TABLE.get(mine, set())
    if allowed is None:
        return
    known = {*allowed, *EVERYWHERE, mine}
    bad = {o for o in imports(name) if room(o) not in known and o.removeprefix("qcrd_fast.") not in allowed}
    assert not bad, f"{name} imports {sorted(bad)}; {mine} may import {sorted(allowed)}"


def test_names_in_the_table_are_rooms():
    listed = {word for allowed in TABLE.values() for word in allowed or ()}
    assert {word.split(".")[0] for word in listed} <= set(TABLE)


def test_no_module_imports_itself_through_others():
    graph = {name: imports(name) for name in MODULES}
    graph["qcrd_fast"] = {"qcrd_fast.version"}  # its other names load on first use
    graph["qcrd_fast.train"] = set()  # so does its name
    for name in MODULES:
        reached, todo = set(), [name]
        while todo:
            for other in graph[todo.pop()] - reached:
                reached.add(other)
                todo.append(other)
        assert name not in reached, f"{name} imports itself, through {sorted(reached)}"


def test_nobody_imports_the_commands_or_the_benchmarks():
    for name in MODULES:
        if room(name) not in ("bench", "cli", "__main__"):
            assert not {other for other in imports(name) if room(other) in ("bench", "cli")}, name


def test_kernels_import_torch_and_triton_alone():
    for name, path in MODULES.items():
        if room(name) == "csrc_triton":
            tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            found = {a.name for n in tree if isinstance(n, ast.Import) for a in n.names}
            found |= {
                str(n.module) for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.ImportFrom)
            }
            allowed = {"torch", "triton", "csrc_triton", *sys.stdlib_module_names}
            assert {each.split(".")[0] for each in found} <= allowed, name


def test_the_top_of_the_package_stays_small():
    assert len(list((ROOT / "qcrd_fast").glob("*.py"))) <= 14


def test_packages_are_empty_but_for_the_public_names():
    doors = (ROOT / "qcrd_fast", ROOT / "qcrd_fast" / "train")
    inits = [path for path in (ROOT / "qcrd_fast").rglob("__init__.py") if path.parent not in doors]
    assert inits and all(not path.read_text(encoding="utf-8") for path in inits)


def test_files_that_the_page_names_are_there():
    count = 0
    for line in PAGE.splitlines():
        start = re.match(r"\| `([\w/]+)`", line)  # in a row names are those of its room
        places = (ROOT, ROOT / "qcrd_fast", *([ROOT / start[1]] if start else []))
        for name in re.findall(r"`([\w/]+\.py|[\w/]+/)`", line):
            assert any((place / name).exists() for place in places), name
            count += 1
    assert count > 40
    assert len(PAGE.splitlines()) <= 48


@pytest.mark.parametrize(
    "code",
    ["import qcrd_fast", "import qcrd_fast.cli.main", "import qcrd_fast.data.load", "import qcrd_fast.train.methods"],
)
def test_without_torch(code):
    code += "; import sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_help_loads_no_torch():
    code = (
        "import sys; from qcrd_fast.cli.main import entry; entry(['train', '--help']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_files_are_locked_in_one_place():
    """`utils.files` reads JSONL, replaces files and locks them; a module that needs `fcntl` has written it again."""
    lockers = {name for name, path in MODULES.items() if re.search(r"^\s*import fcntl", path.read_text(), re.MULTILINE)}
    assert lockers == {"qcrd_fast.utils.files"}
    readers = {name for name, path in MODULES.items() if re.search(r"json\.loads\(line\b", path.read_text())}
    # the ledger repairs as it reads; the others read values that are no objects
    assert readers <= {"qcrd_fast.utils.files", "qcrd_fast.collect.ledger", "qcrd_fast.data.mathforms"}
