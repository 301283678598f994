"""One token from hidden states: the distribution, the random numbers, and what is refused. The kernels:
test_kernels.py."""

import math

import pytest
import torch

from qcrd_fast.ops.chunked import largest, pick_tokens
from qcrd_fast.ops.linear_sample import linear_sample
from qcrd_fast.ops.philox import gumbel
from tests.support.draws import chi_square, draws


@pytest.mark.parametrize("top_k", [0, 50])
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_100k_draws_follow_the_softmax(temperature, top_k):
    """Within 4 standard deviations; a generator with a flaw in its use is off by hundreds."""
    V, count = 120, 100_000
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(1, 8, generator=generator), torch.randn(V, 8, generator=generator)
    key, counter = draws(count)
    tokens = linear_sample(hidden.expand(count, 8), weight, key, counter, temperature=temperature, top_k=top_k)
    logits_V = (hidden.double() @ weight.double().T)[0] / temperature
    if top_k:
        logits_V[logits_V < logits_V.topk(top_k).values.min()] = -math.inf
    assert abs(chi_square(tokens, logits_V.softmax(0))) < 4
    warmer_V = (logits_V / 1.1).softmax(0)
    assert chi_square(tokens, warmer_V) > 20  # the test can fail


def test_noise_belongs_to_the_row_alone():
    """Bitwise the same in any batch, in any order, for all entries or for some."""
    key, counter = draws(12)
    whole = gumbel(key, counter, size=1003)
    assert whole.shape == (12, 1003) and len(whole.unique()) > 12_000
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gumbel(key[order], counter[order], size=1003), whole[order])
    vocab = torch.tensor([[5, 1002, 0, 6]]).expand(12, 4)
    assert torch.equal(gumbel(key, counter, vocab), whole.gather(1, vocab))
    for column in range(3):  # each part of the counter matters
        other = counter.clone()
        other[:, column] += 1
        assert (gumbel(key, other, size=1003) != whole).float().mean() > 0.99


def test_largest_takes_ties_from_the_front():
    logits = torch.tensor([[1.0, 3.0, -0.0, 3.0, 0.0, 1.0, -2.0]])
    values, entries = largest(logits, 5)
    assert entries.tolist() == [[1, 3, 0, 5, 2]] and values.tolist() == [[3.0, 3.0, 1.0, 1.0, 0.0]]


def test_greedy_ignores_the_noise():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    key, counter = draws(6)
    assert torch.equal(pick_tokens(logits, key, counter, 5, noisy=False), logits.argmax(1))
    assert torch.equal(linear_sample(logits, torch.eye(40), key, counter, temperature=0.0, top_k=7), logits.argmax(1))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weight=torch.zeros(5, 3)), r"weight must be \[V, 4\]"),
        (dict(key=torch.zeros(3, 2).long()), r"key must be \[2, 2\]"),
        (dict(counter=torch.zeros(2, 2).long()), r"counter must be \[2, 3\]"),
        (dict(key=torch.zeros(2, 2)), "key must be int64"),
        (dict(hidden=torch.zeros(2, 1, 4)), r"hidden must be \[B, H\], got \[2, 1, 4\]"),
        (dict(bias=torch.zeros(4)), r"bias must be \[5\], got \[4\]"),
        (dict(weight=torch.zeros(5, 4, device="meta")), "must be on cpu with hidden"),
        (dict(scale=float("inf")), "scale must be finite, got inf"),
        (dict(temperature=-1.0), "temperature must be at least 0"),
        (dict(softcap=0.0), "softcap must be above 0"),
        (dict(top_k=-1), "top_k must be at least 0"),
    ],
)
def test_bad_arguments(change, message):
    arguments = dict(
        hidden=torch.zeros(2, 4),
        weight=torch.zeros(5, 4),
        key=torch.zeros(2, 2).long(),
        counter=torch.zeros(2, 3).long(),
    )
    with pytest.raises(ValueError, match=message):
        linear_sample(**{**arguments, **change})
