"""The loss as a repository of the `kernels` library: whole, apart from this package, and beside it in one process."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import qcrd_fast
from bench import hub_kernel
from tests.support.loss_oracle import BETA, DELTA, random_batch


@pytest.fixture(scope="module")
def kernel_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    hub_kernel.build(folder)
    return folder


def load(folder: Path, name: str):
    """As `kernels` does it: from the file, under a name of its own."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "build" / "torch-universal" / "qcrd_fast" / "__init__.py"
    )
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradients(package, batch):
    out = package.QCRDLoss(BETA, DELTA, impl="torch")(*batch.call, bias=batch.bias)
    return [out.loss, *torch.autograd.grad(out.loss, (batch.hidden, batch.weight, batch.bias))]


def test_the_same_bits_beside_the_package(kernel_folder):
    module = load(kernel_folder, "a_kernel_0123")
    assert sorted(module.__all__) == sorted(hub_kernel.EXPORTED)
    batch = random_batch().to(torch.float32)
    for a, b in zip(gradients(module, batch), gradients(qcrd_fast, batch), strict=True):
        assert torch.equal(a, b)
    assert module.linear_logprob is not qcrd_fast.linear_logprob


def test_nothing_of_the_project_is_imported(kernel_folder):
    """In a process in which this package cannot be found."""
    code = f"""
import importlib.util, sys
sys.modules["qcrd_fast"] = sys.modules["csrc_triton"] = None
file = {str(kernel_folder / "build/torch-universal/qcrd_fast/__init__.py")!r}
spec = importlib.util.spec_from_file_location("apart", file)
module = sys.modules["apart"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import torch
print(module.linear_logprob(torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([1])).item())
assert "transformers" not in sys.modules
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd="/")
    assert told.returncode == 0 and told.stdout.strip() == "-1.3862943649291992", told.stderr


def test_loaded_by_the_library(kernel_folder):
    kernels = pytest.importorskip("kernels", reason="the `kernels` library is not installed")
    module = kernels.get_local_kernel(kernel_folder)
    batch = random_batch().to(torch.float32)
    assert torch.equal(gradients(module, batch)[0], gradients(qcrd_fast, batch)[0])


def test_the_command_keeps_what_is_there(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    result = CliRunner().invoke(hub_kernel.main, [str(tmp_path)])
    assert result.exit_code == 2 and "no empty folder" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
