"""The documentation: what is generated is current, what is code runs as it stands, what is a link leads somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from tests.support.paths import ROOT

DOCS = ROOT / "docs"
BLOCK = re.compile(r"(?:<!-- (examples/\w+\.py) -->\n\n)?```python\n(.*?)```", re.DOTALL)
NEWCOMER = "## In your own trainer"


def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(path):
    """The Python blocks of a page that are not listings of an example."""
    return [code for example, code in BLOCK.findall(path.read_text(encoding="utf-8")) if not example]


@pytest.fixture
def desk(tmp_path, rows_file, t5_folder, llama_folder, monkeypatch):
    """A working folder with what the pages name: models under their hub ids, and rows as `qcrd-fast prepare` writes
    them."""
    from qcrd_fast.data.load import load_questions, write_prepared

    for name, folder in (("google-t5/t5-small", t5_folder), ("HuggingFaceTB/SmolLM2-135M", llama_folder)):
        shutil.copytree(folder, tmp_path / name)
    write_prepared(tmp_path / "train.jsonl", load_questions(rows_file).questions)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_generated_pages_are_current():
    stale = [
        str(path.relative_to(ROOT)) for path, page in generate().generated().items() if path.read_text("utf-8") != page
    ]
    assert not stale, f"{', '.join(stale)}: run python docs/generate.py"


def test_every_public_name_has_its_entry():
    import qcrd_fast

    page = (DOCS / "api.md").read_text(encoding="utf-8")
    names = {name for name in qcrd_fast.__all__ if not name.startswith("_")}
    assert names == {
        "Discriminator", "LogProbOutput", "QCRDLoss", "RationaleCollator", "attach", "contrastive_loss", "detach",
        "linear_kl", "linear_logprob", "make_compute_loss_func", "score_then_train",
    }  # fmt: skip
    assert all(f"## `{name}`\n" in page for name in names)
    for name in names:
        assert set(dir(qcrd_fast)) >= {name} and getattr(qcrd_fast, name).__doc__


@pytest.mark.parametrize("page", ["method.md", "trainers-parallel.md"])
def test_blocks_run(page, desk):
    """The blocks of a page, one after the other, in one namespace."""
    found = blocks(DOCS / page)
    assert found
    namespace: dict = {"__name__": page}
    for code in found:
        exec(compile(code, page, "exec"), namespace)


def test_every_block_is_tested():
    """A page with Python that no test runs is found here."""
    run = {"method.md", "trainers-parallel.md", "trainers.md"}
    untested = [p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md") if blocks(p)]
    assert set(untested) <= run


def test_newcomers_path(desk, warm):
    """The page's Trainer as it stands, then the README's six lines with its model, tokenizer and rows."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(NEWCOMER)[1].split("\n## ")[0]
    short = BLOCK.findall(section)[0][1]
    assert len(short.strip().splitlines()) <= 6
    code = f"{blocks(DOCS / 'trainers.md')[0]}\n{short}"
    said = warm.call("tests.support.warm:script", code, str(desk))
    assert said.count("'train_loss'") == 2
    assert list((desk / "out").glob("checkpoint-*/model.safetensors"))


def test_the_loss_alone(desk):
    """The README's other block, with the names that it takes as given."""
    import torch
    from transformers import AutoModelForCausalLM

    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## The loss alone")[1].split("\n## ")[0]
    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    namespace = {
        "model": model,
        "hidden": torch.randn(5, 32, requires_grad=True),
        "weight": model.lm_head.weight,
        "target": torch.tensor([3, 4, 5, 6, 7]),
        "rationale": torch.tensor([0, 0, 0, 1, 1]),
        "question": torch.tensor([0, 0]),
        "positive": torch.tensor([True, False]),
        "quality": torch.tensor([0.9, 0.2]),
    }
    exec(BLOCK.findall(section)[0][1], namespace)
    assert namespace["logprob"].shape == (5,) and namespace["hidden"].grad.abs().sum() > 0


def test_other_losses(desk, llama_folder, float64):
    """DPO and REDI on `linear_logprob` are those of the model's own logits, gradients too."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qcrd_fast import RationaleCollator

    spec = importlib.util.spec_from_file_location("dpo_redi", DOCS / "examples" / "dpo_redi.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama_folder), AutoTokenizer.from_pretrained(llama_folder)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.lm_head.weight.mul_(3)
    rows = [row for row in map(json.loads, (desk / "train.jsonl").read_text().splitlines()) if row["negatives"]][:4]
    batch = RationaleCollator(tokenizer, model, label="none")(rows)

    def dense(model):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logprob = logits.log_softmax(-1).gather(-1, batch["target"].clamp(min=0)[..., None])[..., 0]
        return (logprob * (batch["target"] != -100)).sum(1), (batch["target"] != -100).sum(1)

    policy_B, tokens_B = dense(model)
    reference_B, _ = dense(reference)
    expected, start = {"dpo": 0.0, "redi": 0.0}, 0
    for row in rows:
        m, k = len(row["positives"]), len(row["negatives"])
        ratio_B = (policy_B - reference_B)[start : start + m + k]
        nll_B = -(policy_B / tokens_B)[start : start + m + k]
        expected["dpo"] -= torch.nn.functional.logsigmoid(0.1 * (ratio_B[0] - ratio_B[m])) / len(rows)
        expected["redi"] += (nll_B[:m].mean() - 0.8 * nll_B[m:].mean()) / len(rows)
        start += m + k
    for name, actual in (("dpo", module.dpo_loss(model, reference, batch)), ("redi", module.redi_loss(model, batch))):
        torch.testing.assert_close(actual, expected[name])
        weights = list(model.parameters())
        ours, theirs = (torch.autograd.grad(x, weights, retain_graph=True) for x in (actual, expected[name]))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_whole_distributions(desk, llama_folder, float64, monkeypatch, capsys):
    """The example of `linear_kl` is TRL's divergence of the models' own logits, and it runs."""
    import copy
    import math

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qcrd_fast import RationaleCollator

    spec = importlib.util.spec_from_file_location("gkd", DOCS / "examples" / "gkd.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama_folder), AutoTokenizer.from_pretrained(llama_folder)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(3)
    rows = list(map(json.loads, (desk / "train.jsonl").read_text().splitlines()))[:3]
    batch = RationaleCollator(tokenizer, model)(rows)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    student_BLV, teacher_BLV = model(**inputs).logits.log_softmax(-1), teacher(**inputs).logits.log_softmax(-1).detach()
    mixture_BLV = torch.logsumexp(torch.stack([student_BLV + math.log(0.7), teacher_BLV + math.log(0.3)]), 0)
    kl = torch.nn.functional.kl_div
    jsd_BLV = 0.3 * kl(mixture_BLV, teacher_BLV, reduction="none", log_target=True)
    jsd_BLV = jsd_BLV + 0.7 * kl(mixture_BLV, student_BLV, reduction="none", log_target=True)
    expected = jsd_BLV.sum(-1)[batch["target"] != -100].mean()
    actual = module.distillation_loss(model, teacher, batch, beta=0.3)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    weights = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(x, weights) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    monkeypatch.setattr(
        sys, "argv", ["gkd.py", "HuggingFaceTB/SmolLM2-135M", "train.jsonl", "HuggingFaceTB/SmolLM2-135M"]
    )
    module.main()
    assert float(capsys.readouterr().out.splitlines()[0]) < 1e-6


CODE = re.compile(r"^(```+)[^\n]*\n.*?^\1|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?:\s[^)]*)?\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as mkdocs' `toc` makes them; GitHub makes the same of ours, but for repeats."""
    found: set[str] = set()
    for heading in re.findall(
        r"^#{1,6}\s+(.*?)[\s#]*$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.M
    ):
        shown = re.sub(r"[`*]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading))
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", unicodedata.normalize("NFKD", shown)).strip().lower())
        name, count = slug, 0
        while name in found:
            count += 1
            name = f"{slug}_{count}"
        found.add(name)
    return found


def broken_links(page: Path, root: Path, within: Path) -> list[str]:
    """Links of a page that lead to no file, to no heading, or out of `within`."""
    broken = []
    for link in (a or b for a, b in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8")))):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or not target.is_relative_to(within):
            broken.append(f"{page.relative_to(root)}: {link}")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text(encoding="utf-8")):
            broken.append(f"{page.relative_to(root)}: {link}: no such heading")
    return broken


def test_links_lead_somewhere():
    pages = [*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "bench").rglob("*.md"), *(ROOT / "recipes").glob("*.md")]
    assert len(pages) > 25
    broken = [b for page in pages for b in broken_links(page, ROOT, DOCS if page.is_relative_to(DOCS) else ROOT)]
    assert not broken, broken


def test_broken_links_are_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# A\n")
    (tmp_path / "docs" / "b.md").write_text(
        "# What `x` is, [really](b.md)?\n\n```\n# no heading [n](none.md)\n```\n## Two\n## Two\n"
    )
    (tmp_path / "docs" / "a.md").write_text(
        "[a](b.md#what-x-is-really) [b](b.md#two_1) [c](https://x.org/none.md) `[d](none.md)` [e](#none) [f](none.md)\n"
        "[g](b.md#no-heading-n) [h](../README.md) [i][j]\n\n[j]: b.md#three\n"
    )
    links = [b.split(": ")[1] for b in broken_links(tmp_path / "docs" / "a.md", tmp_path, tmp_path / "docs")]
    assert links == ["#none", "none.md", "b.md#no-heading-n", "../README.md", "b.md#three"]


def test_every_page_is_in_the_navigation_and_on_the_first_page():
    import yaml

    def pages(entry):
        return (
            [entry]
            if isinstance(entry, str)
            else [p for each in (entry.values() if isinstance(entry, dict) else entry) for p in pages(each)]
        )

    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    found = sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))
    assert sorted(named) == found
    first = (DOCS / "index.md").read_text(encoding="utf-8")
    assert [page for page in found if page != "index.md" and f"({page}" not in first] == []


def test_site_builds(tmp_path):
    """Every page in the navigation, every link and anchor between them."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install mkdocs-material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "trainers" / "index.html").is_file()
