"""Accuracy by domain and view in the report."""

from __future__ import annotations

from qcrd_fast.report.groups import group_rows


def test_a_row_a_domain_and_a_view():
    results = {
        "accuracy_by_domain": {"<add>": {"accuracy": 0.5, "n": 4}, "sub": {"accuracy": 1.0, "n": 2}},
        "accuracy_by_view": {"steps": {"accuracy": 0.75, "n": 4}},
        "domain_weights": {"<add>": 0.25, "sub": 0.75},
    }
    add, sub, steps = group_rows(results)
    assert add == ("domain", "<add>", "0.500", "0.150 to 0.850", 4, "0.250")
    assert sub[1:3] == ("sub", "1.000") and steps[:3] == ("view", "steps", "0.750") and steps[-1] == ""


def test_no_groups_or_damaged_ones_make_no_rows():
    assert group_rows({}) == []
    assert group_rows({"accuracy_by_domain": {"a": {"accuracy": "x", "n": 1}}, "domain_weights": 3}) == []


def test_what_is_damaged_has_no_row():
    for found in ([1], {"a": 3}, {"a": {"accuracy": "x", "n": 1}}, {"a": {"accuracy": 0.5, "n": -1}}, {"a": None}):
        assert group_rows({"accuracy_by_view": found, "domain_weights": [2]}) == []
