"""Files of log-probs: nothing is lost whenever a writer dies, other tokenizers are refused, texts are found and
aligned."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from qcrd_fast.errors import InputError
from qcrd_fast.teacher_signal import shards
from qcrd_fast.teacher_signal.shards import Entry, Writer, align, find_top, read_logprobs, text_digest
from qcrd_fast.teacher_signal.tokenizers import check_same_tokenizer, tokenizer_hash
from tests.support.toy_tokenizers import bytes_bpe

K = 3


def entry(i: int) -> Entry:
    tokens = [i, i + 1, 1]
    top = [[-0.5, -1.5, -2.5 - i], [-0.25], []]  # fewer than K where fewer are known
    return Entry(tokens, [-1.0, -2.0, -0.125], [[4, 5, 6], [7], []], top)


@pytest.fixture
def tokenizer(llama_folder):
    return AutoTokenizer.from_pretrained(llama_folder)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 3)


def writer(folder, own, **changes):
    return Writer(folder, **{"tokenizer": tokenizer_hash(own), "teacher": "t", "k": K} | changes)


def test_whatever_was_added_is_there_at_any_moment(tmp_path, tokenizer, small_shards):
    """A copy of the folder after each addition, with a cut line, a half-written shard and none of the memory, goes
    on."""
    folder = tmp_path / "lp"
    with writer(folder, tokenizer) as w:
        for i in range(8):
            w.add(f"k{i}", entry(i))
            left = tmp_path / f"left-{i}"
            shutil.copytree(folder, left)
            with open(left / "pending.jsonl", "ab") as file:
                file.write(b'{"key": "cut", "tok')
            (left / ".shard-00009.safetensors.gz.tmp").write_bytes(b"half")
            known = read_logprobs(left, tokenizer).texts
            assert list(known) == [f"k{j}" for j in range(i + 1)]
            with writer(left, tokenizer) as again:
                assert again.known == set(known)
                for j in range(8):
                    again.add(f"k{j}", entry(j))
                again.flush()
            whole = read_logprobs(left, tokenizer).texts
            assert {key: text.tokens for key, text in whole.items()} == {f"k{j}": entry(j).tokens for j in range(8)}
            assert sorted(p.name for p in left.iterdir() if p.name.startswith(".s")) == []
    assert len(shards.shard_paths(folder)) == 2  # of three texts each; two are pending
    found = read_logprobs(folder, tokenizer).texts["k7"].top
    assert found.ids_TK.tolist() == [[4, 5, 6], [7, -1, -1], [-1, -1, -1]]
    assert found.logprob_TK[0].tolist() == [-0.5, -1.5, -9.5] and found.logprob_TK[1, 1] == -torch.inf


def test_a_kill_between_a_shard_and_its_pending_texts(tmp_path, tokenizer, small_shards):
    folder = tmp_path / "lp"
    with writer(folder, tokenizer) as w:
        for i in range(2):
            w.add(f"k{i}", entry(i))
        before = (folder / "pending.jsonl").read_bytes()
        w.add("k2", entry(2))
    (folder / "pending.jsonl").write_bytes(before)  # both in the shard and pending
    with writer(folder, tokenizer) as w:
        assert w.known == {"k0", "k1", "k2"} and not w._pending
    assert len(read_logprobs(folder, tokenizer).texts) == 3


@pytest.mark.parametrize("changes", [{"teacher": "u"}, {"k": 4}, {"temperature": 2.0}, {"tokenizer": "0" * 64}])
def test_another_teacher_is_not_mixed_in(changes, tmp_path, tokenizer):
    with writer(tmp_path / "lp", tokenizer) as w:
        w.add("a", entry(0))
        with pytest.raises(InputError, match="in use by another process"), writer(tmp_path / "lp", tokenizer):
            pass
    with (
        pytest.raises(InputError, match=f"begun with {next(iter(changes))}"),
        writer(tmp_path / "lp", tokenizer, **changes),
    ):
        pass


def test_another_tokenizer_is_refused_by_content(tmp_path, tokenizer):
    with writer(tmp_path / "lp", tokenizer) as w:
        w.add("a", entry(0))
    other = bytes_bpe(bos=False, merging=False)
    with pytest.raises(InputError, match="another tokenizer than the student's"):
        read_logprobs(tmp_path / "lp", other)
    with pytest.raises(InputError, match=r"token \d+ is .* the student's"):
        check_same_tokenizer(tokenizer, other, "--teacher x")


def test_a_padded_vocabulary_of_one_family_is_accepted(tmp_path, llama_folder, tokenizer):
    bigger = AutoTokenizer.from_pretrained(llama_folder)
    bigger.add_tokens(["<tool>", "<call>"], special_tokens=True)
    assert tokenizer_hash(bigger) == tokenizer_hash(tokenizer)
    check_same_tokenizer(tokenizer, bigger, "--teacher")
    check_same_tokenizer(bigger, tokenizer, "--teacher")
    with writer(tmp_path / "lp", bigger) as w:
        w.add("a", entry(0))
    assert "a" in read_logprobs(tmp_path / "lp", tokenizer).texts


def test_a_damaged_shard_is_named(tmp_path, tokenizer):
    with writer(tmp_path / "lp", tokenizer) as w:
        w.add("a", entry(0))
        w.flush()
    (path,) = shards.shard_paths(tmp_path / "lp")
    whole = path.read_bytes()
    for broken in (whole[:-20], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], b""):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"shard-00000\.safetensors\.gz is damaged"):
            read_logprobs(tmp_path / "lp", tokenizer)
    path.write_bytes(whole)
    (tmp_path / "lp" / "meta.json").write_text(json.dumps({"version": 9}))
    with pytest.raises(InputError, match="holds no log-probs"):
        read_logprobs(tmp_path / "lp", tokenizer)


@pytest.mark.parametrize(
    "tokens, within, expected",
    [
        ([1, 2, 3], [1, 2, 3], (0, 0, 3)),
        ([1, 2, 3, 9], [7, 1, 2, 3, 8, 8], (0, 1, 3)),  # an end of its own
        ([5, 2, 3, 4, 1], [6, 2, 3, 4, 8], (1, 1, 3)),  # a first token that a space changed
        ([1, 2, 3, 4], [1, 9, 9, 4], (0, 0, 0)),  # nothing of half its length
        ([1, 2], [], (0, 0, 0)),
    ],
)
def test_tokens_are_found_within_a_reply(tokens, within, expected):
    assert align(tokens, within) == expected


def test_what_is_not_known_is_minus_infinity(tmp_path, tokenizer):
    with writer(tmp_path / "lp", tokenizer) as w:
        w.add(
            text_digest("Q?", "explain: ", "a  b\n"),
            Entry([4, 5, 6], [-1.0] * 3, [[4, 2], [5], [6]], [[-0.1, -3.0], [-0.2], [-0.3]]),
        )
    files = read_logprobs(tmp_path / "lp", tokenizer)
    found = find_top(files, "Q?", "explain: ", "a b", [4, 5, 1])
    assert found.ids_TK.tolist() == [[4, 2, 0], [5, 0, 0], [0, 0, 0]]
    assert found.logprob_TK.isfinite().tolist() == [[True, True, False], [True, False, False], [False] * 3]
    assert not find_top(files, "Q?", "predict: ", "a b", [4, 5, 1]).logprob_TK.isfinite().any()
    assert not find_top(files, "Q?", "explain: ", "a b", [4, 5, 1], "short").logprob_TK.isfinite().any()


@pytest.mark.parametrize(
    "damage", [{"logprob": ["a", 1, 1]}, {"ids": [[4.5], [7], []]}, {"top": [[-0.5], [-0.25], []]}, {"tokens": None}]
)
def test_a_pending_line_that_is_no_text_is_not_known(tmp_path, tokenizer, damage):
    with writer(tmp_path / "lp", tokenizer) as w:
        w.add("k0", entry(0))
    with open(tmp_path / "lp" / "pending.jsonl", "a") as file:
        file.write(json.dumps({"key": "k1", **entry(1)._asdict(), **damage}) + "\n")
    assert read_logprobs(tmp_path / "lp", tokenizer).texts.keys() == {"k0"}
    with writer(tmp_path / "lp", tokenizer) as w:
        assert w.known == {"k0"}
