"""Accuracy by domain and view in the report."""

from __future__ import annotations

from html import escape

from qcrd_fast.report.groups import groups_table


def test_a_row_a_domain_and_a_view():
    results = {
        "accuracy_by_domain": {"<add>": {"accuracy": 0.5, "n": 4}, "sub": {"accuracy": 1.0, "n": 2}},
        "accuracy_by_view": {"steps": {"accuracy": 0.75, "n": 4}},
        "domain_weights": {"<add>": 0.25, "sub": 0.75},
    }
    table = groups_table(results, lambda value: escape(str(value)))
    assert table.count("<tr>") == 4
    assert "<td>domain</td><td>&lt;add&gt;</td><td>0.500</td><td>0.150 to 0.850</td><td>4</td><td>0.250</td>" in table
    assert "<td>view</td><td>steps</td><td>0.750</td>" in table


def test_no_groups_or_damaged_ones_make_no_table():
    assert groups_table({}, str) == ""
    assert groups_table({"accuracy_by_domain": {"a": {"accuracy": "x", "n": 1}}, "domain_weights": 3}, str) == ""


def test_what_is_damaged_has_no_row():
    for found in ([1], {"a": 3}, {"a": {"accuracy": "x", "n": 1}}, {"a": {"accuracy": 0.5, "n": -1}}, {"a": None}):
        assert groups_table({"accuracy_by_view": found, "domain_weights": [2]}, str) == ""
