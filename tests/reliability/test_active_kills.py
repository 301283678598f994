"""An active run that is killed, at a random moment or within an operation on a file, ends as the one that was left
alone."""

from __future__ import annotations

import pytest

from tests.support.crash_active import ActiveCrashes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def active_crashes(warm, tmp_path_factory):
    return ActiveCrashes(warm, tmp_path_factory.mktemp("active"))


@pytest.mark.parametrize("number", range(4))
def test_a_killed_active_run_ends_bit_for_bit(active_crashes, number):
    assert active_crashes.trial(1, number) is None
