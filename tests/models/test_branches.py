"""Branches on a trunk: packed they get the hidden states of each prefix by itself."""

from __future__ import annotations

import pytest
import torch

from qcrd_fast.models.branches import branch_hidden
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.models.student import Student

# ragged: a trunk without tokens, branches of one token, before the first step, behind the last, two at one depth
SOURCES = [[5, 6, 7], [8, 9, 10, 11, 12], [4]]
TRUNKS = [[20, 21, 22, 23, 24, 25], [], [30, 31, 32]]
BRANCHES = [[40, 41], [42], [43, 44, 45], [46, 47], [48], [49, 50], [51, 52]]
TRUNK_OF, DEPTHS = [0, 0, 0, 1, 2, 2, 0], [0, 2, 6, 0, 3, 1, 2]


@pytest.mark.parametrize("folder", ["t5_folder", "llama_folder"])
def test_packed_branches_get_the_states_of_each_prefix_by_itself(folder, request, float64):
    student = Student.load(str(request.getfixturevalue(folder)), PromptSettings())
    student.model.eval()
    with torch.no_grad():
        packed, plain = (
            branch_hidden(student, SOURCES, TRUNKS, BRANCHES, TRUNK_OF, DEPTHS, packed=packed)
            for packed in (True, False)
        )
        small = branch_hidden(student, SOURCES, TRUNKS, BRANCHES, TRUNK_OF, DEPTHS, max_tokens=8)  # a row at a time
    assert packed.hidden.dtype == torch.float64
    torch.testing.assert_close(packed.hidden, plain.hidden, rtol=0, atol=1e-12)
    torch.testing.assert_close(packed.hidden, small.hidden, rtol=0, atol=1e-12)
    assert packed.target.tolist() == [t for branch in BRANCHES for t in branch]
    assert packed.body_tokens < plain.body_tokens


def test_a_branch_sees_nothing_behind_its_prefix(llama_folder):
    student = Student.load(str(llama_folder), PromptSettings())
    student.model.eval()
    with torch.no_grad():
        a, b = (
            branch_hidden(student, [[5, 6]], [[20, 21, last]], [[40, 41], [42, 43]], [0, 0], [2, 2]).hidden
            for last in (22, 23)
        )
    assert torch.equal(a, b)


def test_the_distances_are_those_of_the_model_again_afterwards(t5_folder):
    student = Student.load(str(t5_folder), PromptSettings())
    student.model.eval()
    branch_hidden(student, SOURCES, TRUNKS, BRANCHES, TRUNK_OF, DEPTHS)
    assert not any("compute_bias" in module.__dict__ for module in student.model.modules())
