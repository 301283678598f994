"""What the sections of a report share: the template environment, colours, numbers as text."""

from __future__ import annotations

from typing import Any
from unicodedata import category

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qcrd_fast.report.charts import PALETTE
from qcrd_fast.utils.config_files import number

LONGEST = 1200  # characters shown of a text
KEPT = "\n\t\u200c\u200d"  # and the joiners that Persian, Indic scripts and emoji need


def render_template(name: str, **context: Any) -> str:
    """Render a template of this folder. Every expression in it is `cleaned`, then escaped."""
    environment = Environment(
        loader=PackageLoader("qcrd_fast.report", "."),
        autoescape=True,
        finalize=cleaned,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(context) + "\n"


def cleaned(value: Any) -> Any:
    """A value as printable text of bounded length; `Markup`, which is our own, stays as it is."""
    if isinstance(value, Markup):
        return value
    text = "" if value is None else str(value)
    text = text if len(text) <= LONGEST else text[:LONGEST] + " …"
    return "".join(c if c.isprintable() or c in KEPT or category(c) == "Zs" else "\ufffd" for c in text)


def entry(color: str, text: str) -> dict[str, str]:
    """An entry of a chart's legend."""
    return {"color": color, "text": text}


def color_of(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def share_text(*values: Any) -> str:
    """The first that is a number, with three digits; empty if none is."""
    return next((f"{value:.3f}" for value in map(number, values) if value is not None), "")
