"""Hidden states and heads of a student and a teacher, and the divergences written from their formulas over dense
logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BETAS = (0.0, 0.1, 0.5, 1.0)
OPTIONS: list[dict[str, Any]] = [
    dict(),
    dict(scale=0.5, teacher_scale=-1.3, temperature=0.7),
    dict(with_bias=True, temperature=2.0),
    dict(with_bias=True, scale=0.4, softcap=2.0, teacher_softcap=5.0),
]
BUDGET = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of gradients


class Pair:
    """A student of hidden size H and a teacher of G; every seventh token is ignored, every third has no gradient."""

    def __init__(self, T: int = 37, H: int = 24, G: int = 40, V: int = 1003):
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden, self.weight, self.bias = draw(T, H), 0.3 * draw(V, H), draw(V)
        self.teacher_hidden, self.teacher_weight, self.teacher_bias = draw(T, G), 0.3 * draw(V, G), draw(V)
        self.target = torch.zeros(T, dtype=torch.int64)
        self.target[::7] = -100
        self.coefficient = draw(T)
        self.coefficient[1::3] = 0

    def to(self, dtype: torch.dtype) -> Pair:
        """Rounded."""
        for name, x in vars(self).items():
            if x.is_floating_point() and name != "coefficient":
                setattr(self, name, x.to(dtype))
        return self

    def run(
        self, function: Any, beta: float, dtype: torch.dtype, with_bias: bool = False, **options: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(divergences, gradients of a weighted sum of them) of the operands in this type."""
        leaves = [x.to(dtype).requires_grad_() for x in (self.hidden, self.weight, self.bias)]
        teacher = [x.to(dtype) for x in (self.teacher_hidden, self.teacher_weight, self.teacher_bias)]
        biases = dict(bias=leaves[2], teacher_bias=teacher[2]) if with_bias else {}
        out = function(*leaves[:2], *teacher[:2], self.target, beta=beta, **biases, **options)
        return out, torch.autograd.grad((out.double() * self.coefficient).sum(), leaves[: 2 + with_bias])


def dense_kl(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, target: Tensor, *, beta: float,
    bias: Any = 0.0, teacher_bias: Any = 0.0, scale: float = 1.0, teacher_scale: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """From probabilities, not their logs: p log(p / q) and so on."""

    def distribution(hidden: Tensor, weight: Tensor, bias: Any, scale: float, softcap: float | None) -> Tensor:
        logits = scale * hidden @ weight.T + bias
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        return torch.softmax(logits / temperature, -1)

    p = distribution(hidden, weight, bias, scale, softcap)
    q = distribution(teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
    m = (1 - beta) * p + beta * q
    if beta == 0:
        kl = (q * (q / p).log()).sum(-1)
    elif beta == 1:
        kl = (p * (p / q).log()).sum(-1)
    else:
        kl = beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)
    return kl * (target >= 0)
