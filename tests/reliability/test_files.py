"""Reliability, trials 22 to 24: files that would run code, names that lead elsewhere, models and settings that do not
fit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.main import entry
from qcrd_fast.config import TrainConfig
from qcrd_fast.errors import InputError
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.runs import checkpoints
from qcrd_fast.runs.folder import MANIFEST
from qcrd_fast.utils import files
from qcrd_fast.utils.files import sha256, write_json


def settings(rows: Path, student: Path, run: Path, **changes: Any) -> TrainConfig:
    values = dict(
        data=str(rows), student=str(student), output_dir=str(run), max_steps=2, per_device_train_batch_size=4,
        iteration_steps=1, negative_lag=1, max_new_tokens=4, discriminator_pretrain_steps=1,
        discriminator_update_batches=1,
        discriminator_folds=2, discriminator_min_auc=0.0, save_steps=1, max_answer_tokens=4,
        scheme="minmax", negative_source="lagged", quality="discriminator",
    )  # fmt: skip
    return TrainConfig(**(values | changes))


@pytest.fixture(scope="module")
def trained(rows_file: Path, llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qcrd_fast.train.trainer import train

    run = tmp_path_factory.mktemp("trained") / "run"
    train(settings(rows_file, llama_folder, run))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A finished run of the decoder, to be spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))


def arguments(rows: Path, student: Path | str, run: Path, *more: str) -> list[str]:
    """`train` on the command line, with the options of `settings`."""
    config = settings(rows, Path("x"), run)
    given = [f"--{f.name.replace('_', '-')}={getattr(config, f.name)}" for f in dataclasses.fields(config)
             if getattr(config, f.name) != f.default and f.name not in ("student", "output_dir", "data")]  # fmt: skip
    return ["train", "--data", str(rows), "--student", str(student), "--output-dir", str(run), *given, *more]


def refused(args: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    assert entry(args) == code, capsys.readouterr()
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err, err
    return err


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(value | changes), encoding="utf-8")


def reseal(folder: Path) -> None:
    """Make a checkpoint's manifest fit its files again, as somebody would who means harm."""
    files = {p.name: sha256(p) for p in folder.iterdir() if p.is_file() and p.name != MANIFEST}
    write_json(folder / MANIFEST, {"files": files})


class TestTrial22:
    """Pickles, object arrays, YAML tags and remote code are never run; the message names the safe format."""

    @pytest.fixture
    def bomb(self, tmp_path: Path) -> Iterator[Any]:
        """An object that runs a command when it is unpickled; the test fails if one did."""
        mark = tmp_path / "pwned"

        class Bomb:
            def __reduce__(self) -> Any:
                return os.system, (f"touch '{mark}'",)

        yield Bomb()
        assert not mark.exists()
        pickle.loads(pickle.dumps(Bomb()))  # it does go off where a pickle is loaded
        assert mark.exists()

    def pickled(self, bomb: Any, name: str, path: Path) -> Path:
        path = path / name
        if name.endswith(".npy"):
            np.save(path, np.array([bomb], dtype=object), allow_pickle=True)
        elif name.startswith("protocol"):
            path.write_bytes(pickle.dumps(bomb, protocol=int(name[8])))
        else:
            torch.save({"weights": bomb}, path, _use_new_zipfile_serialization="old" not in name)
        return path

    @pytest.mark.parametrize(
        "name", ["a.pt", "a.bin", "old.pth", "a.npy", "protocol0.pkl", "protocol1.bin", "protocol4.jsonl"]
    )
    def test_as_rows(self, name: str, bomb: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = self.pickled(bomb, name, tmp_path)
        assert entry(["validate", str(path)]) == 2
        said = capsys.readouterr().out
        assert said.startswith(f"{path}:1: this is ") and ("pickle" in said or "never loaded" in said)
        assert said.endswith("rows are UTF-8 JSON, CSV, TSV or parquet\n") and said.count("\n") == 1
        for verb in (
            ["prepare", "--output", str(tmp_path / "out")],
            ["collect", "--output", str(tmp_path / "out"), "--teacher"],
        ):
            args = (
                [verb[0], str(path), *verb[1:]]
                if verb[0] == "prepare"
                else [*verb, "replay:x", "--questions", str(path)]
            )
            assert "rows are UTF-8 JSON" in refused(args, capsys)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "old.pth"])
    @pytest.mark.parametrize("verb", ["train", "discriminator", "teacher", "eval", "generate", "score", "use-peft"])
    def test_as_weights(
        self, verb: str, name: str, bomb: Any, rows_file: Path, t5_folder: Path, tmp_path: Path, capsys: Any
    ) -> None:
        model = Path(shutil.copytree(t5_folder, tmp_path / "model"))
        (model / "model.safetensors").unlink()
        self.pickled(bomb, name, model)
        data, run = ["--data", str(rows_file)], tmp_path / "run"
        args = {
            "train": arguments(rows_file, model, run),
            "use-peft": arguments(rows_file, model, run, "--use-peft"),
            "discriminator": arguments(rows_file, t5_folder, run, "--discriminator", str(model)),
            "teacher": [
                "collect",
                "--questions",
                str(rows_file),
                "--output",
                str(tmp_path / "c"),
                "--teacher",
                str(model),
            ],
            "eval": ["eval", str(model), *data],
            "generate": ["generate", str(model), "1 + 1?"],
            "score": ["score", str(model), *data],
        }[verb]
        said = refused(args, capsys)
        assert f"in {name}, a pickle, which is never loaded; convert them to safetensors" in said
        option = {"discriminator": "--discriminator: ", "teacher": "--teacher: "}.get(verb, "student: ")
        assert f"qcrd-fast: {option}" in said

    @pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.npy"])
    def test_a_file_as_a_student(self, name: str, bomb: Any, rows_file: Path, tmp_path: Path, capsys: Any) -> None:
        model = self.pickled(bomb, name, tmp_path)
        said = refused(arguments(rows_file, model, tmp_path / "run"), capsys)
        assert "is a file; name the folder with config.json and model.safetensors" in said

    def test_beside_a_checkpoint(self, bomb: Any, run: Path, rows_file: Path, llama_folder: Path) -> None:
        """Files that other trainers resume from are passed over."""
        from qcrd_fast.train.trainer import train

        for name in (
            "optimizer.pt",
            "rng_state.pth",
            "scheduler.pt",
            "training_args.bin",
            "pytorch_model.bin",
            "a.npy",
        ):
            self.pickled(bomb, name, run / "checkpoint-1")
        shutil.rmtree(run / "checkpoint-2")
        (run / "final").unlink()
        train(settings(rows_file, llama_folder, run, resume="auto"))
        assert (run / "checkpoint-2" / "model.safetensors").is_file()

    def test_in_place_of_a_checkpoints_files(
        self, bomb: Any, run: Path, rows_file: Path, llama_folder: Path, capsys: Any
    ) -> None:
        for name in ("optimizer.safetensors", "discriminator.safetensors", "model.safetensors"):
            for step in (1, 2):
                self.pickled(bomb, name, run / f"checkpoint-{step}")
                reseal(run / f"checkpoint-{step}")
            assert "Traceback" not in refused(arguments(rows_file, llama_folder, run, "--resume", "auto"), capsys)

    def test_an_adapter(
        self, bomb: Any, run: Path, llama_folder: Path, rows_file: Path, tmp_path: Path, capsys: Any
    ) -> None:
        folder = run / "checkpoint-2"
        adapter = {
            "peft_type": "LORA",
            "base_model_name_or_path": str(llama_folder),
            "r": 4,
            "target_modules": ["q_proj"],
        }
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
        self.pickled(bomb, "adapter_model.bin", folder)
        export = ["export", str(run), "--output", str(tmp_path / "out"), "--checkpoint", "checkpoint-2"]
        assert "adapter_model.safetensors is needed; a pickle is never loaded" in refused(export, capsys)
        said = refused(arguments(rows_file, folder, tmp_path / "other"), capsys)
        assert "holds an adapter; merge it into its base model first" in said

    @pytest.mark.parametrize(
        "tag", ["!!python/object/apply:os.system ['touch {}']", "!!python/name:os.system", "!!binary eA=="]
    )
    def test_yaml_tags(
        self, tag: str, run: Path, rows_file: Path, llama_folder: Path, tmp_path: Path, capsys: Any
    ) -> None:
        mark, config = tmp_path / "pwned", tmp_path / "config.yaml"
        text = f"seed: {tag.format(mark)}\n"
        config.write_text(text, encoding="utf-8")
        said = refused(arguments(rows_file, llama_folder, tmp_path / "new", "--config", str(config)), capsys)
        assert "only plain YAML values are read" in said or "--seed expects int" in said
        (run / "config.resolved.yaml").write_text(text, encoding="utf-8")
        said = refused(arguments(rows_file, llama_folder, run, "--resume", "auto"), capsys)
        assert "only plain values are read" in said or "the run began with" in said
        assert entry(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
        assert entry(["export", str(run), "--output", str(tmp_path / "exported")]) == 0
        assert not mark.exists()

    @pytest.mark.parametrize("known", [True, False], ids=["known architecture", "its own architecture"])
    @pytest.mark.parametrize("where", ["config", "tokenizer_config"])
    def test_remote_code(
        self, where: str, known: bool, rows_file: Path, llama_folder: Path, tmp_path: Path, capsys: Any
    ) -> None:
        """A known architecture is loaded by transformers' own code; any other is refused."""
        mark, model = tmp_path / "pwned", Path(shutil.copytree(llama_folder, tmp_path / "model"))
        code = f"import os\nos.system('touch {mark}')\nfrom transformers import *\nM = LlamaForCausalLM\n"
        classes = "class C(PretrainedConfig): model_type = 'evil'\nclass T(PreTrainedTokenizerFast): pass\n"
        (model / "evil.py").write_text(code + classes)
        autos = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
        other = {"config": {"model_type": "evil", "architectures": ["M"]}, "tokenizer_config": {"tokenizer_class": "T"}}
        edit(model / f"{where}.json", auto_map=autos, **({} if known else other[where]))
        args = arguments(rows_file, model, tmp_path / "run", "--dry-run")
        if known:
            assert entry(args) == 0
        else:
            assert "contains custom code which must be executed" in refused(args, capsys)
        assert not mark.exists()

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (
                {"attn_implementation": "somebody/kernel"},
                "asks for code from the hub (attn_implementation 'somebody/kernel')",
            ),
            ({"_attn_implementation": "somebody/kernel@main:f"}, "asks for code from the hub"),
            ({"transformers_weights": "adapter_model.bin"}, "safetensors of its own folder are needed"),
            ({"transformers_weights": "../model.safetensors"}, "safetensors of its own folder are needed"),
        ],
    )
    def test_code_and_pickles_that_a_configuration_asks_for(
        self, change: dict[str, str], says: str, rows_file: Path, llama_folder: Path, tmp_path: Path, capsys: Any
    ) -> None:
        model = Path(shutil.copytree(llama_folder, tmp_path / "model"))
        edit(model / "config.json", **change)
        assert says in refused(arguments(rows_file, model, tmp_path / "run"), capsys)
        args = arguments(rows_file, llama_folder, tmp_path / "run", "--discriminator", str(model))
        assert says in refused(args, capsys)


_watched: dict[str, list[str]] = {}


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event != "open" or not _watched or not isinstance(args[0], str) or (args[2] or 0) & os.O_NOFOLLOW:
        return
    for folder, opened in _watched.items():
        if os.path.realpath(args[0]).startswith(folder + os.sep):
            opened.append(args[0])


sys.addaudithook(_audit)


@contextlib.contextmanager
def watching(folder: Path) -> Iterator[list[str]]:
    """The names by which Python opens files of a folder in here, through links or not."""
    _watched[str(folder.resolve())] = opened = []
    try:
        yield opened
    finally:
        _watched.clear()


class TestTrial23:
    """`../`, absolute and symlinked names: nothing outside the output folder is read, written or deleted."""

    @pytest.fixture
    def victim(self, tmp_path: Path) -> Iterator[Path]:
        """A folder outside the run that must stay as it is, and whose files must not be opened."""
        folder = tmp_path / "victim"
        folder.mkdir()
        (folder / "precious").write_text("precious", encoding="utf-8")
        with watching(folder) as opened:
            yield folder
        assert opened == []
        assert [path.name for path in folder.iterdir()] == ["precious"] and (
            folder / "precious"
        ).read_text() == "precious"

    @pytest.mark.parametrize(
        "name",
        [".lock", "metrics.jsonl", ".metrics.jsonl.tmp", "run.log", "config.resolved.yaml", "eval_results.json",
        "negatives",
         "snapshots", "checkpoint-1", "checkpoint-9", ".tmp-checkpoint-3", "negatives/iteration-00001.jsonl",
         "snapshots/iteration-00009.safetensors", "checkpoint-1/model.safetensors", "checkpoint-2/state.json"],
    )  # fmt: skip
    @pytest.mark.parametrize("target", ["victim", "victim/precious", "victim/new"])
    def test_links_in_a_run(
        self, name: str, target: str, victim: Path, run: Path, rows_file: Path, llama_folder: Path, capsys: Any
    ) -> None:
        files.remove_tree(run / name)
        (run / name).symlink_to(victim.parent / target)
        said = refused(arguments(rows_file, llama_folder, run, "--resume", "auto"), capsys)
        assert "is a link" in said or (name == ".lock" and "cannot write to" in said)

    def test_final_that_leads_elsewhere(
        self, victim: Path, run: Path, rows_file: Path, llama_folder: Path, capsys: Any
    ) -> None:
        elsewhere = victim.parent / "elsewhere"
        shutil.copytree(run / "checkpoint-2", elsewhere)
        (run / "final").unlink()
        (run / "final").symlink_to(elsewhere)
        for args in (
            ["eval", str(run), "--data", str(rows_file)],
            ["generate", str(run), "1 + 1?"],
            ["score", str(run), "--data"],
        ):
            assert "leads out of the run" in refused([*args, str(rows_file)] if args[0] == "score" else args, capsys)
        before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
        assert entry(arguments(rows_file, llama_folder, run, "--resume", "auto")) == 0  # points it where it belongs
        assert os.readlink(run / "final").startswith("checkpoint-")
        assert before == {path.name: path.read_bytes() for path in elsewhere.iterdir()}

    def test_links_and_pipes_in_a_run_that_is_looked_at(self, victim: Path, run: Path, tmp_path: Path) -> None:
        """What a run that somebody sent links to does not get into a page about it, and nobody waits for a pipe."""
        for name in ("eval_results.json", "config.resolved.yaml", "predictions.jsonl", "quality_scores.jsonl"):
            (run / name).unlink(missing_ok=True)
            (run / name).symlink_to(victim / "precious")
        (run / "metrics.jsonl").unlink()
        os.mkfifo(run / "metrics.jsonl")
        assert entry(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
        assert entry(["export", str(run), "--checkpoint", "checkpoint-2", "--output", str(tmp_path / "model")]) == 0

    @pytest.mark.parametrize("name", ["../victim/precious", "{}/precious", "..", "", "sub/../../victim/precious"])
    def test_names_in_a_manifest(self, name: str, victim: Path, run: Path) -> None:
        folder = run / "checkpoint-2"
        manifest = json.loads((folder / MANIFEST).read_text())
        name = name.format(victim)
        manifest["files"][name] = "0" * 64
        write_json(folder / MANIFEST, manifest)
        assert checkpoints.find_corruption(folder) == f"{name}, listed in MANIFEST.json, is missing"

    def test_a_checkpoint_of_links_is_none(self, run: Path, victim: Path) -> None:
        moved = victim.parent / "moved"
        (run / "checkpoint-2" / "optimizer.safetensors").rename(moved)
        (run / "checkpoint-2" / "optimizer.safetensors").symlink_to(moved)
        assert checkpoints.find_corruption(run / "checkpoint-2") == "optimizer.safetensors is a link"
        (run / "checkpoint-3").symlink_to(run / "checkpoint-1")
        assert [path.name for path in checkpoints.checkpoints(run)] == ["checkpoint-2", "checkpoint-1"]

    @pytest.mark.parametrize("kind", ["another run", "absolute", "link"])
    def test_a_resume_from_elsewhere(
        self, kind: str, victim: Path, run: Path, rows_file: Path, llama_folder: Path, capsys: Any
    ) -> None:
        other = Path(shutil.copytree(run, victim.parent / "other", symlinks=True))
        chosen = {"another run": run / ".." / "other" / "checkpoint-1", "absolute": other / "checkpoint-1"}.get(kind)
        if chosen is None:
            chosen = victim.parent / "link"
            chosen.symlink_to(other / "checkpoint-1")
        said = refused(arguments(rows_file, llama_folder, run, "--resume", str(chosen)), capsys)
        assert f"is not a checkpoint of {run}" in said

    @pytest.mark.parametrize("file", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
    @pytest.mark.parametrize(
        "name", ["../other/model.safetensors", "{}/model.safetensors", "..", "sub/model.safetensors", 7]
    )
    def test_names_in_a_shard_index(
        self, name: Any, file: str, rows_file: Path, llama_folder: Path, tmp_path: Path, capsys: Any
    ) -> None:
        model, other = (Path(shutil.copytree(llama_folder, tmp_path / n)) for n in ("model", "other"))
        (model / "model.safetensors").unlink()
        name = name.format(other) if isinstance(name, str) else name
        weights = dict.fromkeys(load_file(other / "model.safetensors"), name)
        (model / file).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
        for args in (
            arguments(rows_file, model, tmp_path / "run"),
            arguments(rows_file, other, tmp_path / "run", "--discriminator", str(model)),
        ):
            assert f"{model / file} names {str(name)!r}, which is not a file of this folder" in refused(args, capsys)

    def test_shards_of_the_folder_itself_are_read(self, llama_folder: Path, tmp_path: Path) -> None:
        model = Path(shutil.copytree(llama_folder, tmp_path / "model"))
        weights = load_file(model / "model.safetensors")
        (model / "model.safetensors").unlink()
        names = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(weights)}
        for shard in set(names.values()):
            save_file({n: t for n, t in weights.items() if names[n] == shard}, model / shard, metadata={"format": "pt"})
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
        Student.load(str(model), PromptSettings())

    def test_names_in_the_data_are_no_paths(
        self, victim: Path, rows_file: Path, llama_folder: Path, tmp_path: Path
    ) -> None:
        """Ids, splits, domains and sources that look like paths, through every verb that writes something."""
        odd = [
            "../victim/precious",
            str(victim / "precious"),
            "/etc/passwd",
            "a/../../victim",
            "..",
            "~",
            "C:\\x",
            "-rf",
            "a\nb",
        ]
        rows = [json.loads(line) for line in rows_file.read_text().splitlines()][: len(odd)]
        data = tmp_path / "rows.jsonl"
        texts = (
            json.dumps(r | {"id": name, "domain": name, "split": None}) + "\n"
            for r, name in zip(rows, odd, strict=True)
        )
        data.write_text("".join(texts), encoding="utf-8")
        outputs = {
            name: str(tmp_path / "out" / name) for name in ("rows", "run", "eval", "scores", "page.html", "model")
        }
        (tmp_path / "out").mkdir()
        before = {path.name for path in tmp_path.iterdir()}
        for args in (
            ["prepare", str(data), "--output", outputs["rows"]],
            arguments(Path(outputs["rows"]), llama_folder, Path(outputs["run"])),
            ["eval", outputs["run"], "--data", outputs["rows"], "--output", outputs["eval"]],
            ["score", outputs["run"], "--data", outputs["rows"], "--output", outputs["scores"]],
            ["report", outputs["run"], "--output", outputs["page.html"]],
            ["export", outputs["run"], "--output", outputs["model"]],
        ):
            assert entry(args) == 0, args
        assert {path.name for path in tmp_path.iterdir()} == before
        assert {path.name for path in (tmp_path / "out").iterdir()} == set(outputs)

    def test_rotation_follows_no_link(self, victim: Path, run: Path) -> None:
        (run / "checkpoint-1" / "link").symlink_to(victim)
        (run / "checkpoint-0").symlink_to(victim)
        checkpoints.rotate(run, 2, 1, None)
        assert (
            not (run / "checkpoint-1").exists()
            and (run / "checkpoint-2").is_dir()
            and (run / "checkpoint-0").is_symlink()
        )

    def test_temporary_files_are_not_written_through_links(self, victim: Path, rows_file: Path, tmp_path: Path) -> None:
        from qcrd_fast.data.load import prepare
        from qcrd_fast.utils.files import write_text

        (tmp_path / ".a.json.tmp").symlink_to(victim / "precious")
        write_text(tmp_path / "a.json", "a")
        (tmp_path / f".qcrd-{os.getpid()}.tmp").symlink_to(victim / "precious")
        prepare(rows_file, tmp_path / "b.jsonl")
        assert (tmp_path / "a.json").read_text() == "a" and not (tmp_path / "b.jsonl").is_symlink()


Change = Callable[[Path], None]


def config(**changes: Any) -> Change:
    return lambda model: edit(model / "config.json", **changes)


def more_tokens(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"token{i}" for i in range(20)])
    tokenizer.save_pretrained(model)


def cut_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    save_file(
        {n: t for n, t in weights.items() if ".1." not in n}, model / "model.safetensors", metadata={"format": "pt"}
    )


class TestTrial24:
    """Wrong vocabulary, shape, architecture, changed settings on resume: refused before step 1 with both values."""

    @pytest.mark.parametrize(
        ("family", "change", "says"),
        [
            ("llama", more_tokens, "the tokenizer has 109 tokens but the model only 89 rows"),
            (
                "llama",
                config(vocab_size=97),
                "model.embed_tokens.weight of shape (97, 32), but in the weights it is (89, 32)",
            ),
            (
                "llama",
                config(vocab_size=81),
                "model.embed_tokens.weight of shape (81, 32), but in the weights it is (89, 32)",
            ),
            ("llama", config(hidden_size=64), "of shape (89, 64), but in the weights it is (89, 32)"),
            (
                "llama",
                config(num_hidden_layers=3),
                "the weights lack 9 of its tensors, such as model.layers.2.input_layernorm",
            ),
            (
                "llama",
                config(num_hidden_layers=1),
                "fewer layers than the weights: it has no place for 9, such as model.layers.1.",
            ),
            ("llama", cut_weights, "describes a LlamaForCausalLM; the weights lack 9 of its tensors"),
            ("llama", config(model_type="gpt2"), "describes a GPT2LMHeadModel; the weights lack"),
            ("llama", config(model_type="gpt2"), "but hold model.embed_tokens.weight"),
            (
                "llama",
                config(model_type="vit"),
                "configuration_vit.ViTConfig'> for this kind of AutoModel: AutoModelForCausalLM",
            ),
            (
                "llama",
                config(num_attention_heads=3),
                "hidden size (32) is not a multiple of the number of attention heads (3)",
            ),
            ("llama", config(hidden_size="wide"), "expected int, got str (value: 'wide')"),
            ("t5", config(d_model=64), "SelfAttention.k.weight of shape (32, 64), but in the weights it is (32, 32)"),
            (
                "t5",
                config(decoder_start_token_id=5000),
                "decoder_start_token_id is 5000 in config.json, but the model has 92 rows",
            ),
            ("t5", config(model_type="llama"), "LlamaConfig"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_students(
        self, family: str, change: Change, says: str, rows_file: Path, tmp_path: Path, request: Any, capsys: Any
    ) -> None:
        model = Path(shutil.copytree(request.getfixturevalue(f"{family}_folder"), tmp_path / "model"))
        change(model)
        said = refused(arguments(rows_file, model, tmp_path / "run"), capsys)
        assert says in said
        assert not list((tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run" / "metrics.jsonl").exists()

    def test_more_rows_than_tokens_are_fine(self, t5_folder: Path) -> None:
        """As T5's 32,128 rows for 32,100 tokens."""
        student = Student.load(str(t5_folder), PromptSettings())
        assert len(student.tokenizer) == 89 and student.head.weight.shape[0] == 92

    @pytest.mark.parametrize(
        ("more", "says"),
        [
            (["--method", "dss"], "--method 'qcrd', now it is 'dss'"),
            (["--learning-rate", "0.5"], "--learning-rate 0.0001, now it is 0.5"),
            (["--beta", "0.9"], "--beta 0.2, now it is 0.9"),
            (["--seed", "7"], "--seed 0, now it is 7"),
            (["--negative-lag", "2"], "--negative-lag 1, now it is 2"),
            (["--max-target-length", "9"], "--max-target-length 256, now it is 9"),
            (["--max-steps", "9"], "--max-steps 2, now it is 9"),
            (["--use-peft"], "--use-peft False, now it is True"),
            (["--student", "elsewhere"], "now it is 'elsewhere'"),
            (["--per-device-train-batch-size", "3"], "the run began with 4 questions a step, now it is 3"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    @pytest.mark.parametrize("left", ["config.resolved.yaml", "state.json"])
    def test_other_settings_on_resume(
        self, left: str, more: list[str], says: str, run: Path, rows_file: Path, llama_folder: Path, capsys: Any
    ) -> None:
        if left == "state.json":
            (run / "config.resolved.yaml").unlink()
        args = arguments(rows_file, llama_folder, run, "--resume", "auto", *more)
        assert says.replace("0.0001", str(TrainConfig().learning_rate)) in refused(args, capsys)

    def test_a_checkpoint_of_another_run(
        self, run: Path, rows_file: Path, t5_folder: Path, llama_folder: Path, tmp_path: Path, capsys: Any
    ) -> None:
        from qcrd_fast.train.trainer import train

        train(settings(rows_file, t5_folder, tmp_path / "t5"))
        for step in (1, 2):
            shutil.rmtree(run / f"checkpoint-{step}")
        for name in ("checkpoint-2", "snapshots"):
            shutil.copytree(tmp_path / "t5" / name, run / name, dirs_exist_ok=True)
        said = refused(arguments(rows_file, llama_folder, run, "--resume", "auto"), capsys)
        assert f"the run began with --student {str(t5_folder)!r}, now it is {str(llama_folder)!r}" in said

    def test_other_rows_on_resume(
        self, run: Path, rows_file: Path, llama_folder: Path, tmp_path: Path, capsys: Any
    ) -> None:
        changed = tmp_path / "rows.jsonl"
        changed.write_text("\n".join(rows_file.read_text().splitlines()[:-1]) + "\n")
        for path in (
            run / "config.resolved.yaml",
            run / "checkpoint-2" / "state.json",
            run / "checkpoint-1" / "state.json",
        ):
            path.write_text(path.read_text().replace(str(rows_file), str(changed)))
        for step in (1, 2):
            reseal(run / f"checkpoint-{step}")
        with pytest.raises(InputError, match=r"the rows differ from those that .*checkpoint-2 was trained on"):
            from qcrd_fast.train.trainer import train

            train(settings(changed, llama_folder, run, resume="auto"))


class TestWhatAVerbIsGiven:
    """A damaged run, names and settings that cannot be: exit code 2 in one line, in each verb."""

    @pytest.mark.parametrize("verb", ["eval", "generate", "score", "export", "train"])
    def test_a_damaged_checkpoint(self, verb: str, run: Path, rows_file: Path, tmp_path: Path, capsys: Any) -> None:
        weights = run / "final" / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(bytes(data))
        more = {
            "eval": [str(run), "--data", str(rows_file)],
            "generate": [str(run), "How many?"],
            "score": [str(run), "--data", str(rows_file)],
            "export": [str(run), "--output", str(tmp_path / "model")],
            "train": [
                "--student",
                str(run / "final"),
                "--data",
                str(rows_file),
                "--output-dir",
                str(tmp_path / "other"),
            ],
        }
        said = refused([verb, *more[verb]], capsys)
        assert "the checkpoint is damaged: model.safetensors" in said

    @pytest.mark.parametrize(
        "changes", [{"task": "nonsense"}, {"task": 5}, {"prompt": {"template": "no place for it"}}]
    )
    def test_a_state_that_says_nonsense(self, changes: dict[str, Any], run: Path, rows_file: Path, capsys: Any) -> None:
        edit(run / "final" / "state.json", **changes)
        reseal((run / "final").resolve())
        assert "state.json" in refused(["eval", str(run), "--data", str(rows_file)], capsys)

    @pytest.mark.parametrize(
        "arguments",
        [
            ["prepare", "ROWS", "--output", "LONG"],
            ["prepare", "LONG", "--output", "OUT"],
            ["validate", "LONG"],
            ["eval", "T5", "--data", "LONG"],
            ["eval", "T5", "--data", "ROWS", "--output", "LONG"],
            ["score", "LONG", "--data", "ROWS"],
            ["export", "LONG", "--output", "OUT"],
            ["collect", "--questions", "LONG", "--output", "OUT", "--teacher", "replay:ROWS"],
            ["train", "--data", "LONG", "--student", "T5", "--output-dir", "OUT"],
            ["train", "--data", "ROWS", "--student", "T5", "--output-dir", "OUT", "--prompt-template", "LONG"],
            ["bench", "loss", "--json", "LONG"],
            ["eval", "T5", "--data", "ROWS", "--device", "meta"],
            ["train", "--data", "ROWS", "--student", "T5", "--output-dir", "OUT", "--device", "xpu"],
        ],
        ids=" ".join,
    )
    def test_names_that_cannot_be(
        self, arguments: list[str], rows_file: Path, t5_folder: Path, tmp_path: Path, capsys: Any
    ) -> None:
        names = {"ROWS": str(rows_file), "T5": str(t5_folder), "OUT": str(tmp_path / "out"), "LONG": 300 * "a"}
        said = refused([names.get(a, a.replace("ROWS", str(rows_file))) for a in arguments], capsys)
        assert said.count("qcrd-fast") == 1 and str(tmp_path / "out") not in said, said
        assert not (tmp_path / "out").is_file()

    @pytest.mark.parametrize(
        "verb", [["generate", "T5", "How many?"], ["eval", "T5", "--data", "ROWS"]], ids=lambda v: v[0]
    )
    @pytest.mark.parametrize("impl", ["bogus", "triton"])
    def test_the_kill_switch(
        self, impl: str, verb: list[str], t5_folder: Path, rows_file: Path, monkeypatch: Any, capsys: Any
    ) -> None:
        monkeypatch.setenv("QCRD_FAST_IMPL", impl)
        names = {"ROWS": str(rows_file), "T5": str(t5_folder)}
        assert f"QCRD_FAST_IMPL={impl}" in refused([names.get(a, a) for a in [*verb, "--device", "cpu"]], capsys)

    def test_the_kill_switch_is_nothing_to_who_computes_nothing(
        self, run: Path, tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.setenv("QCRD_FAST_IMPL", "triton")
        assert entry(["export", str(run), "--output", str(tmp_path / "model")]) == 0

    @pytest.mark.parametrize(
        "text", ["? [1, 2]\n: 3\n", "? {a: b}\n: 3\n", 'output_dir: "a\\0b"\ndata: ROWS\nstudent: T5\n']
    )
    def test_yaml_that_is_no_mapping_of_options(
        self, text: str, rows_file: Path, t5_folder: Path, tmp_path: Path, capsys: Any
    ) -> None:
        (tmp_path / "c.yaml").write_text(text.replace("ROWS", str(rows_file)).replace("T5", str(t5_folder)))
        refused(["train", "--config", str(tmp_path / "c.yaml")], capsys)
