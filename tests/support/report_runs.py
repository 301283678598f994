"""Run folders with made-up figures, for reports."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path

import numpy as np
import yaml

from qcrd_fast.config import TrainConfig

HOSTILE = "</p></svg><script>alert(1)</script><img src=x onerror=alert(2)>\" onload='x' &lt; $\\frac{ \x00\x1b \u202e"


def make_run(folder: Path, *, steps: int = 40, seed: int = 0, text: str = "3 + 4 = 7.", **options: object) -> Path:
    """A run folder as `train` and `score` leave it, with numbers of a known shape."""
    folder.mkdir()
    config = TrainConfig(**{"data": "rows.jsonl", "student": "s", "output_dir": str(folder), "seed": seed, **options})
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump(config.to_dict()))
    lines = [
        {"step": s, "iteration": 0, "loss": 2 / s, "loss_pred": 1 / s, "loss_cl": 1.0, "loss_d": None,
        "quality_positive": 0.9,
         "quality_negative": 0.2, "active_hinge_lagged": 0.5, "active_hinge_minority": None, "tokens_per_s": 1e3 + s}
        for s in range(1, steps + 1)
    ]  # fmt: skip
    lines += [{"step": s, "eval_accuracy": s / steps} for s in range(10, steps + 1, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {
        "accuracy": 0.25,
        "accuracy_validation": 0.5,
        "accuracy_untrained": 0.0,
        "n": 200,
        "evaluated_on": "test",
    }
    (folder / "eval_results.json").write_text(json.dumps(results))
    rng = np.random.default_rng(0)
    scores = [
        {"kind": kind, "id": f"q{i}", "question": f"Question {i} {text}", "text": f"{kind} says {text}", "score": score}
        for kind, low in (
            ("teacher positive", 0.6),
            ("teacher minority", 0.3),
            ("student at 1.5", 0.2),
            ("student at 2", 0.0),
        )
        for i, score in enumerate((low + 0.4 * rng.random(30)).tolist())
    ]
    (folder / "quality_scores.jsonl").write_text("".join(json.dumps(s) + "\n" for s in scores))
    said = [
        {"id": f"q{i}", "question": text, "gold": "7", "output": text, "prediction": text, "correct": i % 2 == 0}
        for i in range(9)
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in said))
    return folder


class Page(html.parser.HTMLParser):
    """Tags in order, and whether they nest."""

    VOID = frozenset({"meta", "br", "img", "link", "use", "path", "rect"})

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check(text: str) -> Page:
    """The page parses, asks nothing of any network, runs nothing, and its ids are unique."""
    page = Page(text)
    known = """html head meta title style body main header section article figure figcaption div p h1 h2 h3 h4 table
        thead tbody tr th td b i br span small code svg g path defs use text clippath rect"""
    assert {tag for tag, _ in page.tags} <= set(known.split())
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:
        assert not any(name.startswith("on") or name in ("src", "srcset", "action") for name in attrs)
        for name in ("href", "xlink:href", "clip-path"):
            assert re.fullmatch(r"#[\w-]+|url\(#[\w-]+\)", attrs.get(name, "#x")), attrs
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "@import" not in style and "url(" not in style
    return page
