"""Write the loss as a repository of the Hugging Face `kernels` library.

`python -m qcrd_fast.bench.hub_kernel DIR`

Writes DIR/build/torch-universal/qcrd_fast with the kernels, their torch twins and `QCRDLoss`, and nothing else of this
project:

    from kernels import get_local_kernel
    qcrd_fast = get_local_kernel(Path("DIR"))
    loss_fn = qcrd_fast.QCRDLoss(beta=0.2, delta=3.0)

Such a kernel is loaded under a name of its own, beside other versions of itself, so that its imports become relative
and its operators get a namespace that names its content.
"""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path

import click

from qcrd_fast.errors import InputError
from qcrd_fast.version import __version__

ROOT = Path(__file__).resolve().parents[1]
EXPORTED = {  # what the kernel offers: name, module
    "ContrastiveOutput": "qcrd_fast.losses",
    "LogProbOutput": "qcrd_fast.ops.linear_logprob",
    "QCRDLoss": "qcrd_fast.losses",
    "contrastive_loss": "qcrd_fast.losses",
    "linear_kl": "qcrd_fast.ops.linear_kl",
    "linear_logprob": "qcrd_fast.ops.linear_logprob",
    "linear_rationale_loss": "qcrd_fast.ops.rationale_loss",
    "linear_sample": "qcrd_fast.ops.linear_sample",
}
VARIANT = Path("build") / "torch-universal"


def build(folder: Path) -> list[Path]:
    """Write the repository and return its files. Raises `InputError` if `folder` is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already and is no empty folder")
    sources = closure(sorted(set(EXPORTED.values())))
    digest = hashlib.sha256("".join(text for _, text in sorted(sources.items())).encode()).hexdigest()[:12]
    name = f"qcrd_fast_{digest}"
    package, written = folder / VARIANT / "qcrd_fast", {}
    for module, text in sources.items():
        place = location(module)
        written[package / place] = relative(text, place, sources).replace("qcrd_fast::", f"{name}::")
        for parent in place.parents[:-1]:
            written.setdefault(package / parent / "__init__.py", "")
    written[package / "__init__.py"] = _entry(sources)
    metadata = {
        "id": name,
        "name": "qcrd-fast",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    written[folder / VARIANT / "metadata.json"] = json.dumps(metadata, indent=2) + "\n"
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return sorted(written)


def closure(modules: list[str]) -> dict[str, str]:
    """Return {module: source} of these modules and everything of this project that they import anywhere."""
    found: dict[str, str] = {}
    while modules:
        module = modules.pop()
        if module in found:
            continue
        text = found[module] = _path(module).read_text(encoding="utf-8")
        modules += [target for node in _imports(text) for target in _targets(node)]
    return found


def location(module: str) -> Path:
    """Return a module's path in the package: ops/x.py of `qcrd_fast.ops.x`, csrc_triton/x.py of its own."""
    return Path(*module.removeprefix("qcrd_fast.").split(".")).with_suffix(".py")


def relative(text: str, place: Path, sources: dict[str, str]) -> str:
    """Return the source of a file at `place` of the package with relative imports of this project."""
    lines = text.splitlines(keepends=True)
    for node in _imports(text):
        assert node.module is not None
        inside = "" if node.module == "qcrd_fast" else node.module.removeprefix("qcrd_fast.")
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = line.replace(
            f"from {node.module} import", f"from {'.' * len(place.parts)}{inside} import", 1
        )
    return "".join(lines)


def _imports(text: str) -> list[ast.ImportFrom]:
    found = []
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(_ours(name) for name in names):
            raise InputError(f"import {', '.join(names)}: only `from module import name` can be made relative")
        if isinstance(node, ast.ImportFrom) and _ours(node.module or ""):
            found.append(node)
    return found


def _targets(node: ast.ImportFrom) -> list[str]:
    """Return the modules that an import reads: the named one, or those of a package."""
    assert node.module is not None
    if _path(node.module).is_file():
        return [node.module]
    return [f"{node.module}.{alias.name}" for alias in node.names]


def _ours(module: str) -> bool:
    return module.split(".")[0] in ("qcrd_fast", "csrc_triton")


def _path(module: str) -> Path:
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def _entry(sources: dict[str, str]) -> str:
    lines = [
        f'"""The fused contrastive loss of qcrd-fast {__version__}: the functions of its page on embedding."""',
        "",
    ]
    for name, module in sorted(EXPORTED.items(), key=lambda item: (item[1], item[0])):
        inside = ".".join(location(module).with_suffix("").parts)
        lines.append(f"from .{inside} import {name}")
    return "\n".join([*lines, "", f"__all__ = {sorted(EXPORTED)}", ""])


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Write the loss as a kernel repository into the empty or new folder FOLDER."""
    try:
        written = build(folder)
    except InputError as error:
        raise click.UsageError(str(error)) from error
    for path in written:
        click.echo(path)


if __name__ == "__main__":
    main()
