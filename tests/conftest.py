"""Small students and rows that the tests build themselves; nothing is downloaded."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.support.students import make_llama, make_t5, narrow_discriminators, sampled_rows

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are tiny, and threads that wait for a busy core cost most
os.environ["HF_HUB_OFFLINE"] = "1"


COMPARES = re.compile(r"assert_close|allclose|torch\.float64|\.double\(\)|support.(?:doubles|loss_oracle) import")

LONGEST = ("distributed", "ops", "train")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What compares floats is numeric, in files that do so or by the fixture: `make test-machines` runs it as
    elsewhere. The rooms of the longest files come first: at the end a worker would be alone with them."""
    items.sort(key=lambda item: item.path.parent.name not in LONGEST)
    sources = {path: path.read_text(encoding="utf-8") for path in {item.path for item in items}}
    for item in items:
        if "float64" in getattr(item, "fixturenames", ()) or COMPARES.search(sources[item.path]):
            item.add_marker("numeric")


@pytest.fixture(scope="session", autouse=True)
def narrow():
    """Of a decoder's short run, most of the time went into a discriminator of the usual width."""
    if "torch" not in sys.modules:  # nothing of what was collected trains
        yield
        return
    with narrow_discriminators() as real:
        yield real


@pytest.fixture
def wide(narrow, monkeypatch):
    """Discriminators of their usual width."""
    from qcrd_fast.discriminator.encoders import SmallEncoder

    if narrow:
        monkeypatch.setattr(SmallEncoder.__init__, "__defaults__", narrow)


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """24 sampled questions."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sampled_rows(24)), encoding="utf-8")
    return path


@pytest.fixture
def float64(t5_folder, llama_folder):
    """Every number of the test is float64, those of the library and of its models too; the folders hold fp32 all the
    same."""
    from tests.support.doubles import doubles

    with doubles():
        yield


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory) -> Path:
    return make_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="session")
def warm():
    """A process that has imported everything: torch and transformers take seconds in each new one."""
    from tests.support.warm import Warm

    with Warm() as warm:
        yield warm


@pytest.fixture(scope="session")
def crashes(warm, tmp_path_factory):
    """Short runs of a T5 and a decoder in processes of their own, and the unbroken ones to compare with."""
    from tests.support.crash_run import Crashes

    return Crashes(warm, tmp_path_factory.mktemp("crashes"), device="cpu")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))
