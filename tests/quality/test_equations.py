"""Equations and numbers in text, as teachers and students write them."""

from fractions import Fraction

import pytest

from qcrd_fast.quality.equations import find_equations, numbers_in


@pytest.mark.parametrize(
    "text, holds",
    [
        ("15 + 18 = 33 bottle caps", [True]),
        ("100 - 35 = 32 more", [False]),
        ("3 * 4 = 12 and 5 * 2 = 11.", [True, False]),
        ("3 bags x $2.50 = $7.50, and 10 apples - 4 apples = 5 apples.", [True, False]),
        ("$30,144 - $646 = $29,498", [True]),
        ("1,200 + 300 = 1500", [True]),
        ("21 \u00f7 7 = 3, 6 \u00d7 7 = 42, 9 \u2212 4 = 5", [True, True, True]),
        ("20% of 50 = 10; 50 * 20% = 10; 20 percent of 50 = 11", [True, True, False]),
        ("25% + 30% = 55%, and (5/20) * 100 = 25%", [True, True]),
        ("1/2 of 8 = 4", [True]),
        ("2 1/2 + 1 = 3 1/2", [True]),
        (r"\frac{1}{2} \times 8 = 4", [True]),
        ("5 + 3 = 8 - 2 = 6", [True, True]),  # written on, as one speaks
        ("20 = 4 * 5 = 21", [True, False]),
        ("(5 + 3) * 2 = 16", [True]),
        ("169 (initial cakes made) - 137 (cakes sold) = 32", [True]),
        ("25 inches (from the frog) + 18 inches = 43 inches", [True]),
        ("60 miles/hour * 3 hours = 180 miles", [True]),
        ("5 plus 3 equals 8, 15 divided by 3 is equal to 6", [True, False]),
        ("10 / 3 = 3.33, 10 / 3 = 3.34, 2 / 3 = 0.67, 2 / 3 = 0.66", [True, True, True, True]),
        ("10 / 3 = 3.4", [True]),
        ("10 / 3 = 3.5", [False]),
        ("56 / 11 = 5, but 56 / 11 is \u2248 5 and 56 / 11 \u2248 5", [False, True]),
        ("- 15 + 18 = 33\n- 4 * 5 = 20", [True, True]),  # a list
        ("4 + 4\n= 9", [False]),
        ("So 12.5 / 5 = 2.5. 4 + 4 = 9", [True, False]),
        ("Mary has 5 apples and Tom has 3 + 4 = 7", [True]),
        ("2^3 = 8, 2**3 = 8, 2 *3 = 6, 2* 3 = 6", [True, True, True, True]),
        ("So **5 + 3 = 9**. *4 + 4* = **8**", [False, True]),
        ("48/2 = <<48/2=24>>24 clips", [True]),
        (r"$5 \times 3 = \boxed{15}$ and \(5 \times 3 = 16\)", [True, False]),
        ("1. 5 + 3 = 8\n2) 5 + 4 = 9\n* 2 + 2 = 4", [True, True, True]),
        ("", []),
    ],
)
def test_what_holds(text, holds):
    assert [equation.holds for equation in find_equations(text)] == holds


@pytest.mark.parametrize(
    "text",
    ["7x = 21", "2x + 3 = 7", "x + 2 - 7 = 10", "8 = 2 + x", "Eggs at the start - 5 = 3", "x = 5",
    "1 hour = 60 minutes", "= 4",
     "3 + 4 =", "a = b", "9**9**9**9 = 1", "1" * 200 + " + 1 = 2", "(" * 5000 + "1 = 1", "= " * 3000 + "1 + 1"],
)  # fmt: skip
def test_what_is_no_equation(text):
    assert find_equations(text) == []


def test_operands_and_results():
    first, second = find_equations("He had 3 eggs + 4 eggs = 7 eggs. 5 = 7 - 2.")
    assert (first.operands, first.result) == ((3, 4), 7) and (second.operands, second.result) == ((7, 2), 5)
    assert find_equations("3 - 5 = -2")[0].result == -2 and find_equations("- 5 + 3 = 8")[0].operands == (5, 3)
    chain = find_equations("3 + 4 = 7 - 2 = 5")
    assert [equation.result for equation in chain] == [7, 5]


def test_numbers_in_digits_and_words():
    assert numbers_in("Three friends paid $1,000.50 for twenty-five") == [3, Fraction(2001, 2), 20, 5]
    assert numbers_in("half of 1/2") == [2, 1, 2]
