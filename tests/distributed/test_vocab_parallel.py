"""The loss over a head whose vocabulary is split over ranks."""

import json

import pytest


@pytest.mark.parametrize("ranks", [2, 3])
def test_slices_of_different_sizes_equal_the_whole_head(ranks, warm):
    """Values and gradients of every rank in float64, and the same refusal on every rank, so that none waits for
    another."""
    for found in json.loads(warm.call("tests.support.vocab_ranks:main", ranks).splitlines()[-1]):
        for impl in ("torch", "eager"):
            assert set(found[impl]) == {"plain", "softcap", "workspace", "rows", "loss"}
            assert all(e < 1e-12 for e in found[impl].values()), found
        for name in ("gap", "overlap"):
            assert "exactly one rank's slice; check vocab_start" in found["refused"][name]
        assert "return_top1" in found["refused"]["top1"]
