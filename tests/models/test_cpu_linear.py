"""Linear layers whose products another library takes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qcrd_fast.models import cpu_linear
from qcrd_fast.models.cpu_linear import CPULinear, use_fast_products
from tests.support.loss_oracle import error


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Whatever processor this is, and however small the layers are."""
    monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(cpu_linear, "LEAST_PRODUCT", 0)


@pytest.fixture
def layers():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16, bias=False))
    fast = copy.deepcopy(plain)
    use_fast_products(fast)
    assert [type(m) for m in fast] == [CPULinear, nn.GELU, CPULinear]
    return plain, fast


@pytest.mark.parametrize("shape", [(24,), (7, 24), (3, 5, 24), (0, 24)], ids=str)
def test_values_and_gradients_are_those_of_linear(layers, shape):
    exact = copy.deepcopy(layers[0]).double()
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    results = []
    for model, dtype in ((layers[1], torch.float32), (exact, torch.float64)):
        x = inputs[0].to(dtype).requires_grad_()
        out = model(x)
        results.append([out, *torch.autograd.grad((out * out.detach()).sum(), [x, *model.parameters()])])
        assert out.shape == (*shape[:-1], 16)
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape and error(a, b) < 1e-5 if b.numel() else True


def test_what_is_frozen_gets_no_gradient(layers):
    _, fast = layers
    fast[0].requires_grad_(False)
    fast(torch.randn(3, 24)).sum().backward()
    assert fast[0].weight.grad is None and fast[2].weight.grad is not None
    with torch.no_grad():
        assert not fast(torch.randn(3, 24)).requires_grad


def test_other_types_are_torchs(layers, monkeypatch):
    """bf16, float64, autocast, and products too small to gain."""
    plain, fast = layers
    monkeypatch.setattr(cpu_linear, "product", None)
    for dtype in (torch.float64, torch.bfloat16):
        x = torch.randn(3, 24, dtype=dtype)
        assert torch.equal(copy.deepcopy(fast).to(dtype)(x), copy.deepcopy(plain).to(dtype)(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(torch.randn(3, 24)).dtype == torch.bfloat16
    monkeypatch.setattr(cpu_linear, "LEAST_PRODUCT", 10**9)
    assert torch.equal(fast(torch.ones(3, 24)), plain(torch.ones(3, 24)))


def test_copies_state_and_compiled_forwards(layers):
    plain, fast = layers
    assert list(fast.state_dict()) == list(plain.state_dict())
    x = torch.randn(3, 24)
    for other in (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.compile(fast, backend="eager", fullgraph=True),
    ):
        assert error(other(x), plain(x).double()) < 1e-5


def test_layers_of_another_class_are_left_alone():
    class Own(nn.Linear):
        pass

    model = nn.ModuleList([Own(4, 4)])
    use_fast_products(model)
    assert type(model[0]) is Own
