"""Samples follow the softmax, and their random numbers belong to the question, not to the batch."""

import pytest
import torch

from qcrd_fast.generation.engine import SampleSettings
from qcrd_fast.generation.hf_generate import KeyedSampling
from qcrd_fast.generation.sample import sample
from qcrd_fast.models.prompts import EXPLAIN, PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.ops.philox import key_words, philox


def words(*values):
    return tuple(torch.tensor([v]) for v in values)


@pytest.mark.parametrize(
    "key, counter, expected",  # known answers of Random123
    [
        ((0, 0), (0, 0, 0, 0), 0x6627E8D5),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, 0x408F276D),
        ((0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0xD16CFE09),
    ],
)
def test_philox_known_answers(key, counter, expected):
    assert philox(words(*key), words(*counter))[0].item() == expected


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (3, 1.0), (0, 0.8)])
def test_draws_follow_the_truncated_softmax(top_k, top_p):
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1.5, 0.2])
    count, temperature = 20_000, 1.5
    keys = torch.stack([torch.tensor(key_words(0, str(i))) for i in range(count)])
    processor = KeyedSampling(keys, torch.zeros(count, dtype=torch.long), 0, 0, temperature, top_k, top_p)
    drawn = processor(torch.zeros(count, 0, dtype=torch.long), logits.expand(count, -1)).argmax(1)
    expected = (logits / temperature).softmax(0)
    if top_k:
        expected[expected < expected.topk(top_k).values.min()] = 0
    if top_p < 1:
        values, order = expected.sort(descending=True)
        expected[order[(values.cumsum(0) - values) >= top_p]] = 0
    expected = expected / expected.sum()
    observed = torch.bincount(drawn, minlength=7).double()
    assert observed[expected == 0].sum() == 0
    kept = expected > 0
    chi2 = ((observed - count * expected)[kept] ** 2 / (count * expected)[kept]).sum().item()
    assert chi2 < 22.5  # 99.9% of chi-square with 6 degrees of freedom


@pytest.fixture(params=["t5_folder", "llama_folder"])
def student(request):
    return Student.load(str(request.getfixturevalue(request.param)), PromptSettings())


QUESTIONS = [f"Ann has {n} apples. Ann finds {n + 1} apples, then loses 2 apples." for n in range(2, 9)] + [
    "Ben has 3 pens."
]


@pytest.mark.usefixtures("float64")
def test_a_sample_does_not_depend_on_its_batch(student):
    settings = SampleSettings(1.5, 50, 1.0, max_new_tokens=12, batch_size=64)
    sources = [student.source_ids(EXPLAIN, q) for q in QUESTIONS]
    keys = [key_words(5, q) for q in QUESTIONS]
    together = sample(student, sources, keys, settings, iteration=2)
    alone = [sample(student, [s], [k], settings, iteration=2)[0] for s, k in zip(sources, keys, strict=True)]
    assert together == alone
    backwards = sample(student, sources[::-1], keys[::-1], settings, iteration=2)
    assert backwards[::-1] == together


def test_seed_index_and_iteration_each_change_the_sample(student):
    settings = SampleSettings(1.5, 50, 1.0, max_new_tokens=12)
    source = student.source_ids(EXPLAIN, QUESTIONS[0])

    def draw(seed=0, index=0, iteration=0):
        return sample(student, [source], [key_words(seed, "q")], settings, indices=[index], iteration=iteration)[0]

    assert draw() == draw()
    assert len({tuple(d) for d in (draw(), draw(seed=1), draw(index=1), draw(iteration=1))}) == 4


@pytest.mark.usefixtures("float64")
def test_temperature_zero_is_greedy(student):
    sources = [student.source_ids(EXPLAIN, q) for q in QUESTIONS[:3]]
    ours = sample(student, sources, [(0, 0)] * 3, SampleSettings(max_new_tokens=6))
    for source, tokens in zip(sources, ours, strict=True):
        ids = torch.tensor([source])
        out = student.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)[0]
        theirs = out[1 if student.is_encoder_decoder else len(source) :].tolist()
        assert theirs[: len(tokens)] == tokens


def test_the_models_own_generation_settings_stay_out(student):
    """Penalties and beams of a student's generation_config.json would make other draws than the softmax's."""
    source = [student.source_ids(EXPLAIN, q) for q in QUESTIONS]
    keys = [key_words(0, q) for q in QUESTIONS]
    both = SampleSettings(max_new_tokens=8), SampleSettings(1.5, 50, 1.0, max_new_tokens=8)
    before = [sample(student, source, keys, settings) for settings in both]
    own = student.model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.num_beams = 50.0, 1, 4
    assert [sample(student, source, keys, settings) for settings in both] == before
    assert student.model.generation_config is own
