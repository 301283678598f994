"""Accuracy by domain and by view, as a table of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qcrd_fast.utils.intervals import wilson

FIELDS = ("domain", "view")


def groups_table(results: Mapping[str, Any], text: Callable[[Any], str]) -> str:
    """A row a domain and a view of `eval_results.json`, with Wilson's 95% interval and the domain's weight at the end;
    empty where the questions have one of each. `text` makes a value text of the page."""
    rows = []
    last = results.get("domain_weights")
    weights = last if isinstance(last, dict) else {}
    for name in FIELDS:
        found = results.get(f"accuracy_by_{name}")
        for value, row in (found if isinstance(found, dict) else {}).items():
            share, n = (row.get(key) if isinstance(row, dict) else None for key in ("accuracy", "n"))
            if not isinstance(share, int | float) or not isinstance(n, int) or not 0 <= share <= 1 or n < 1:
                continue
            span = "{:.3f} to {:.3f}".format(*wilson(share, n))
            weight = weights.get(value) if name == "domain" else None
            cells = [name, value, f"{share:.3f}", span, n, f"{weight:.3f}" if isinstance(weight, float) else ""]
            rows.append("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in cells) + "</tr>")
    if not rows:
        return ""
    names = "".join(f"<th>{name}</th>" for name in ("", "", "accuracy", "95%", "n", "weight at the end"))
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
