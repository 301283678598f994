"""Yes and no in nine languages: as an answer, and as a determiner, a negation or one of both."""

from __future__ import annotations

import pytest

from qcrd_fast.data.replies import read_reply


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes, if it freezes, the lake can be crossed.", "yes"), ("No, it never does.", "no"),
        ("No it does not.", "no"),
        ("No question, yes.", "yes"), ("True or false: True", "yes"), ("Yes or no? No.", "no"),
        ("Most likely yes, it does.", "yes"),
        ("Ja, denn es schwimmt.", "yes"), ("Nein, weil es sinkt.", "no"), ("Oui, car il nage.", "yes"),
        ("Non, il coule.", "no"),
        ("Sí, porque nada.", "yes"), ("No, porque se hunde.", "no"), ("Sì, perché nuota.", "yes"),
        ("No, affonda.", "no"),
        ("Sim, porque nada.", "yes"), ("Não, porque afunda.", "no"), ("Да, плавает.", "yes"), ("Нет, тонет.", "no"),
        ("是的，因为会游。", "yes"), ("不对。", "no"), ("はい。", "yes"), ("答えは「いいえ」です。", "no"),
        ("正解ははいです。", "yes"),
        ("La respuesta es sí.", "yes"), ("La réponse est non.", "no"), ("Ответ: нет", "no"),
        ("A resposta é não.", "no"),
    ],
)  # fmt: skip
def test_an_answer(text, answer):
    assert read_reply(text, "yes-no").answer == answer


@pytest.mark.parametrize(
    "text",
    [
        "No clue.", "No data exist.", "No solution.", "No reason is given.", "No hay respuesta.", "No sé.",
        "No es posible saberlo.",
        "Non so.", "Non si può dire.", "Não há dados.", "Não sabemos.", "Нет сведений.", "Keine Ahnung.", "Je ne sais "
        "pas.",
        "不知道。", "わかりません。", "无法判断。",
        "Yes in winter and no in summer.", "Yes for ducks, no for hens.", "Yes if it rains, else no.",
        "Yes unless it rains.",
        "Ja oder nein.", "Ja für Enten, nein für Hühner.", "Oui ou non.", "Sí o no.", "Sì e no.", "Sim ou não.",
        "Да и нет.",
        "是也不是。", "はいでもいいえでもない。", "Ja, wenn es regnet.", "Oui, si elle est chaude.",
        "Да, если холодно.",
        "It might be true.", "It is only partially true.", "I cannot say no.", "One would not answer yes.",
        "It is false that it is true.", "It could be false.", "No es no.", "Non è vero.", "Es ist nicht wahr: ja.",
    ],
)  # fmt: skip
def test_no_answer(text):
    assert read_reply(text, "yes-no").answer is None
