"""Steps of an explanation: joined they are the explanation, whatever it is."""

from __future__ import annotations

import random

import pytest

from qcrd_fast.select.steps import split_reply, split_steps


@pytest.mark.parametrize(
    "text, steps",
    [
        ("Ann has 3.5 kg. She eats 2! So 1.5.", ["Ann has 3.5 kg.", " She eats 2!", " So 1.5."]),
        ("1. Add 3 + 4 = 7.\n2. Halve: 3.5.\n", ["1. Add 3 + 4 = 7.", "\n2. Halve: 3.5.\n"]),
        ("Mr. Smith, i.e. Ben, left. He did.", ["Mr. Smith, i.e. Ben, left.", " He did."]),
        ('He said "go." Then 5 + 3 = 8. 8 - 2 = 6.', ['He said "go."', " Then 5 + 3 = 8.", " 8 - 2 = 6."]),
        ("- 3 pens\n\n- 4 pens", ["- 3 pens", "\n\n- 4 pens"]),
        ("no end", ["no end"]),
        ("", []),
        (" \n ", []),
    ],
)
def test_sentences_and_lines_are_steps(text, steps):
    assert split_steps(text) == steps


def test_joined_steps_are_the_text():
    pieces = ["A b.", " ", "\n", "1.", "Dr.", "x = 2", "!", "?", '."', "- ", "3.5", "\t", "e.g.", "\u2022", "Answer:"]
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        steps = split_steps(text)
        assert "".join(steps) == (text if text.strip() else "")
        assert all(step for step in steps)


def test_a_reply_ends_in_its_last_answer():
    assert split_reply("2 + 2 = 4.\nAnswer: 4\nmore") == ("2 + 2 = 4.", "4")
    assert split_reply("Answer: 1. No. Answer:  5 ") == ("Answer: 1. No.", "5")
    assert split_reply("2 + 2 = 4. ") == ("2 + 2 = 4.", None)
    assert split_reply("It is.\nAnswer: ") == ("It is.", None)
