"""Accuracy by domain and by view, as a table of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcrd_fast.utils.intervals import wilson

FIELDS = ("domain", "view")


def group_rows(results: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """A row a domain and a view of `eval_results.json`; none if the questions have one of each.

    A row is (domain or view, its name, accuracy, Wilson's 95% interval, n, the domain's weight at the end).
    """
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
            rows.append((name, value, f"{share:.3f}", span, n, f"{weight:.3f}" if isinstance(weight, float) else ""))
    return rows
