"""Two gloo ranks take one step with the loss inside and outside of wrapped modules; `test_losses.py` runs
`main`."""

import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from qcrd_fast import QCRDLoss
from tests.support.fork_ranks import fork_ranks, in_group


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Embedding(51, 16), torch.nn.Linear(16, 16), torch.nn.Tanh())
        self.loss_fn = QCRDLoss(0.2, 4.0, impl="torch")

    def forward(self, rank):
        ids = torch.randint(0, 50, (12,), generator=torch.Generator().manual_seed(rank))
        rationale = torch.tensor([0] * 3 + [1] * 4 + [2] + [3] * 4)
        rest = (ids.roll(-1), rationale, torch.tensor([0, 0, 1, 1]), torch.tensor([True, False, False, True]))
        return self.loss_fn(self.body(ids), self.body[0].weight, *rest, num_questions=4).loss


def step(rank):
    torch.set_default_dtype(torch.float64)
    whole = Tiny()
    (sum(whole(r) for r in range(2)) / 2).backward()

    replicated = DistributedDataParallel(Tiny())
    replicated(rank).backward()
    for a, b in zip(whole.parameters(), replicated.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)

    inside, outside = Tiny(), Tiny()
    fully_shard(inside)
    inside(rank).backward()
    for a, b in zip(whole.parameters(), inside.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad.full_tensor())
    fully_shard(outside.body[0])  # the head that the loss gets is then a shard
    fully_shard(outside.body)
    try:
        outside(rank)
        raise AssertionError("a sharded head was taken for a whole one")
    except ValueError as error:
        assert "weight is a DTensor" in str(error) and "qcrd_fast.attach" in str(error)


def main():
    fork_ranks(in_group(step), 2)
