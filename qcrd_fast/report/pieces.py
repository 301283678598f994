"""Pieces of a report's page: every text that comes from a run is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any
from unicodedata import category

from qcrd_fast.report.charts import PALETTE
from qcrd_fast.utils.config_files import number

LONGEST = 1200  # characters shown of a text
KEPT = "\n\t\u200c\u200d"  # and the joiners that Persian, Indic scripts and emoji need


def section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def card(title: str, chart: str, caption: str) -> str:
    return f'<figure class="card"><h3>{escaped(title)}</h3>{chart}<figcaption>{escaped(caption)}</figcaption></figure>'


def switch_spans(switches: Sequence[str]) -> str:
    return " ".join(f"<span>{escaped(switch)}</span>" for switch in switches)


def chip(color: str) -> str:
    return f'<i class="chip" style="background:{color}"></i>'


def color_of(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def share_text(*values: Any) -> str:
    """The first that is a number."""
    return next((f"{value:.3f}" for value in map(number, values) if value is not None), "")


def escaped(value: Any) -> str:
    """A value as text of the page, of bounded length; nothing in it can be markup."""
    text = "" if value is None else str(value)
    text = text if len(text) <= LONGEST else text[:LONGEST] + " …"
    return escape("".join(c if c.isprintable() or c in KEPT or category(c) == "Zs" else "\ufffd" for c in text))
