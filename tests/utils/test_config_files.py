"""Files of plain values: what a run wrote is read or left out, what a user wrote is refused by name."""

from pathlib import Path

import pytest

from qcrd_fast.errors import InputError
from qcrd_fast.sweep.runner import read_recipe
from qcrd_fast.utils.config_files import read_object, read_options, read_yaml


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a":', b"\xff\xfe", b"[" * 100_000, b"{"])
def test_what_a_run_wrote_is_an_object_or_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    assert read_object(tmp_path / "x") == {} == read_options(tmp_path / "x")
    assert read_object(tmp_path / "gone") == {} == read_options(tmp_path / "gone")


def test_mappings_are_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('{"a": 1, "b": [2]}')
    assert (
        read_object(tmp_path / "x") == read_options(tmp_path / "x") == read_yaml(tmp_path / "x") == {"a": 1, "b": [2]}
    )


@pytest.mark.parametrize("read", [read_yaml, read_recipe])
def test_a_users_file_is_checked(read, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text, why in (
        ("beta: 0.1\nbeta: 0.2", "x.yaml:2: duplicate key"),
        ("a: !!python/name:os.system", "x.yaml:1"),
        ("- 1", "mapping"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=why):
            read(path)
    with pytest.raises(InputError, match=r"cannot read .*gone\.yaml"):
        read(tmp_path / "gone.yaml")
