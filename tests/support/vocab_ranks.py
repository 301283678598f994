"""A head split over forked gloo ranks against the whole head; `distributed/test_vocab_parallel.py` runs `main`.

Prints {case: largest relative error in float64 of any rank, over values and gradients}, and what each refusal says.
"""

import json

import torch
import torch.distributed as dist

from qcrd_fast import QCRDLoss, linear_logprob
from tests.support.fork_ranks import fork_ranks, in_group
from tests.support.loss_oracle import BETA, error, random_batch

V = 53
OPTIONS = {
    "plain": dict(),
    "softcap": dict(scale=0.4, softcap=2.0, temperature=0.7),
    "workspace": dict(workspace_bytes=2**20),
    "rows": dict(max_rows=1000),
}
EXTRAS = dict(return_lse=True, return_entropy=True, return_sum_p2=True)


def split(x, rank, bounds):
    return x[bounds[rank] : bounds[rank + 1]].detach().clone().requires_grad_()


def compare(rank, ranks, impl):
    bounds = [0, *(V * r // ranks + r for r in range(1, ranks)), V]  # slices of different sizes
    slices = dict(process_group=dist.group.WORLD, vocab_start=bounds[rank])
    found = {}
    for name, options in OPTIONS.items():
        batch = random_batch(V=V).to(torch.float64)
        hidden = batch.hidden.detach().clone().requires_grad_()
        weight, bias = split(batch.weight, rank, bounds), split(batch.bias, rank, bounds)
        weights = torch.rand(4, len(batch.target), generator=torch.Generator().manual_seed(3), dtype=torch.float64)

        def loss_of(out, weights=weights):
            return sum((w * x).sum() for w, x in zip(weights, out[:3], strict=False))

        got = linear_logprob(hidden, weight, batch.target, bias=bias, impl=impl, **EXTRAS, **slices, **options)
        want = linear_logprob(
            batch.hidden, batch.weight, batch.target, bias=batch.bias, impl="eager", **EXTRAS, **options
        )
        grads = torch.autograd.grad(loss_of(got), (hidden, weight, bias))
        whole = torch.autograd.grad(loss_of(want), (batch.hidden, batch.weight, batch.bias))
        whole = (whole[0], *(x[bounds[rank] : bounds[rank + 1]] for x in whole[1:]))
        found[name] = max(error(a, b) for a, b in zip((*got, *grads), (*want, *whole), strict=True))
    batch = random_batch(V=V).to(torch.float64)
    hidden, weight = batch.hidden.detach().clone().requires_grad_(), split(batch.weight, rank, bounds)
    rest = batch.call[2:]
    got, want = (
        QCRDLoss(BETA, 3.0, impl=impl, **slices)(hidden, weight, *rest),
        QCRDLoss(BETA, 3.0, impl="eager")(*batch.call),
    )
    grads = torch.autograd.grad(got.loss, (hidden, weight))
    whole = torch.autograd.grad(want.loss, (batch.hidden, batch.weight))
    pairs = [(got.loss, want.loss), (grads[0], whole[0]), (grads[1], whole[1][bounds[rank] : bounds[rank + 1]])]
    found["loss"] = max(error(a, b) for a, b in pairs)
    return found


def refusals(rank):
    hidden, weight = torch.randn(4, 3), torch.randn(5 + rank, 3)
    said = {}
    for name, target, options in (
        ("gap", torch.tensor([0, 1, 2, 5]), dict()),  # a row that no rank has
        ("overlap", torch.tensor([0, 1, 2, 3]), dict(vocab_start=0)),
        ("top1", torch.tensor([0, 1, 2, 3]), dict(return_top1=True)),
    ):
        try:
            linear_logprob(hidden, weight, target, process_group=dist.group.WORLD, **options)
            said[name] = "accepted"
        except ValueError as refusal:
            said[name] = str(refusal)
    return said


def main(ranks):
    def run(rank):
        return {impl: compare(rank, ranks, impl) for impl in ("torch", "eager")} | {"refused": refusals(rank)}

    print(json.dumps(fork_ranks(in_group(run), ranks)))
