"""Views: the styles that rationales of one question are written in, and what a prompt says to ask for one (MinT,
multi-view fine-tuning): one table. `--views FILE.yaml` adds rows or replaces them; a run's table is saved with its
checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qcrd_fast.errors import InputError
from qcrd_fast.utils.config_files import read_yaml

# view: what stands between `explain: ` (or `reason: `) and the question
VIEWS = {
    "steps": "Step by step. ",
    "short": "In one short sentence. ",
    "equations": "With equations alone. ",
    "program": "As a program. ",
    "analogy": "By a similar problem. ",
}


def view_text(view: str | None, own: Mapping[str, str]) -> str:
    """What a prompt says of a view; empty for None. Raises `InputError` for one that is in no table."""
    if view is None:
        return ""
    found = own.get(view, VIEWS.get(view))
    if found is None:
        raise InputError(
            f"view {view!r} is in no table (there: {', '.join({**VIEWS, **own})}); --views FILE.yaml of train, "
            "active, select and score-teacher, and RationaleCollator(views=...), say what its prompt is"
        )
    return found


def read_views(path: str | None) -> dict[str, str]:
    """The table of `--views`: view: text. Raises `InputError` for a file that is none."""
    if path is None:
        return {}
    return view_table(read_yaml(Path(path)), f"--views: {path}")


def view_table(table: Mapping[str, str], where: str) -> dict[str, str]:
    """The table with a space behind each text, which the question follows. Raises `InputError` naming `where` for what
    is no table of texts, or an empty one."""
    bad: list[object] = [table]
    if isinstance(table, Mapping) and table:
        bad = [key for key, text in table.items() if not isinstance(key, str) or not isinstance(text, str)]
    if bad:
        raise InputError(f"{where}: expected view: text, got {bad[0]!r}")
    return {view: text if text[-1:].isspace() or not text else f"{text} " for view, text in table.items()}
