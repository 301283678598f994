"""`score-teacher` and `collect --top-logprobs` as a user runs them: what is written, resumed, refused, and learnt
from."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from qcrd_fast.cli.main import entry
from transformers import AutoModelForCausalLM, AutoTokenizer

from qcrd_fast.models.prompts import EXPLAIN, PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.teacher_signal import score, shards
from qcrd_fast.teacher_signal.local import LocalTeacher
from qcrd_fast.teacher_signal.shards import read_logprobs, text_digest
from tests.support.fake_teacher import serving
from tests.support.prompt_server import scoring


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 20)


def scored(rows, teacher, out, *more):
    return ["score-teacher", "--data", str(rows), "--teacher", str(teacher), "--output", str(out), "--json", *more]


def test_score_teacher_goes_on_where_it_died(rows_file, t5_folder, tmp_path, capsys, monkeypatch, small_shards):
    out, whole = tmp_path / "lp", tmp_path / "whole"
    assert entry(scored(rows_file, t5_folder, whole, "--top-logprobs", "4")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["scored"] > 80 and 0 < summary["mean_mass_of_top"] < 1
    calls = []

    def dying(self, batch):
        calls.append(len(batch))
        if len(calls) == 4:
            raise MemoryError("killed")
        return real(self, batch)

    real = score._Local.score
    monkeypatch.setattr(score._Local, "score", dying)
    assert entry(scored(rows_file, t5_folder, out, "--top-logprobs", "4", "--batch-size", "8")) == 1
    capsys.readouterr()
    assert entry(scored(rows_file, t5_folder, out, "--top-logprobs", "4", "--batch-size", "8")) == 0
    again = json.loads(capsys.readouterr().out)
    # what was there is not made again
    assert again["scored"] == summary["scored"] and sum(calls[4:]) == summary["scored"] - 24
    tokenizer = AutoTokenizer.from_pretrained(t5_folder)
    a, b = read_logprobs(out, tokenizer).texts, read_logprobs(whole, tokenizer).texts
    assert a.keys() == b.keys()
    for key, text in b.items():
        assert a[key].tokens == text.tokens
        assert (a[key].top.logprob_TK - text.top.logprob_TK).abs().max() < 1e-5
    assert (out / "shard-00001.safetensors.gz").exists()


def test_a_servers_log_probs_are_those_of_its_model(rows_file, llama_folder, tmp_path, capsys):
    model = Student.load(str(llama_folder), PromptSettings())
    model.model.eval()
    few = tmp_path / "few.jsonl"
    few.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:3]))
    assert entry(scored(few, llama_folder, tmp_path / "a", "--top-logprobs", "3")) == 0
    with serving(scoring(model)) as server:
        assert (
            entry(scored(few, server.url, tmp_path / "b", "--top-logprobs", "3", "--student", str(llama_folder))) == 0
        )
    a, b = (read_logprobs(tmp_path / name, model.tokenizer).texts for name in "ab")
    assert a.keys() == b.keys() and len(a) > 6
    for key in a:
        assert torch.equal(a[key].top.ids_TK, b[key].top.ids_TK)
        assert (a[key].top.logprob_TK - b[key].top.logprob_TK).abs().max() < 1e-5
    capsys.readouterr()
    assert entry(scored(few, "http://127.0.0.1:1/v1", tmp_path / "c")) == 2
    assert "--student is needed" in capsys.readouterr().err
    assert entry(scored(few, "http://127.0.0.1:1/v1", tmp_path / "c", "--temperature", "2")) == 2
    assert "temperature 1" in capsys.readouterr().err


def test_other_weights_under_the_same_path_do_not_join_a_folder(rows_file, llama_folder, tmp_path, capsys):
    out, teacher, rows = tmp_path / "lp", tmp_path / "teacher", tmp_path / "rows.jsonl"
    rows.write_text("".join(rows_file.read_text().splitlines(True)[:2]))
    shutil.copytree(llama_folder, teacher)
    assert entry(scored(rows, teacher, out)) == entry(scored(rows, teacher, out)) == 0
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    model.save_pretrained(teacher)
    assert entry(scored(rows, teacher, out)) == 2 and "begun with weights" in capsys.readouterr().err


def test_one_text_in_two_views_is_scored_behind_both_prompts(llama_folder, tmp_path, capsys):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "lp"
    positives = [{"text": "2 + 2 = 4.", "answer": "4", "view": view} for view in ("steps", "short")]
    row = {"id": "a", "question": "2 + 2?", "gold": "4", "majority": "4", "positives": positives, "negatives": []}
    rows.write_text(json.dumps(row) + "\n")
    assert entry(scored(rows, llama_folder, out)) == 0
    assert json.loads(capsys.readouterr().out)["scored"] == 3  # and the label
    files = read_logprobs(out, AutoTokenizer.from_pretrained(llama_folder))
    a, b = (files.texts[text_digest("2 + 2?", EXPLAIN, "2 + 2 = 4.", view)] for view in ("steps", "short"))
    assert a.tokens == b.tokens and not torch.equal(a.top.logprob_TK, b.top.logprob_TK)


def test_texts_behind_other_prompts_do_not_join_a_folder(rows_file, llama_folder, tmp_path, capsys):
    out, template = tmp_path / "lp", tmp_path / "prompt.txt"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(rows_file.read_text().splitlines(True)[:2]))
    template.write_text("Q: {prompt} A:")
    begun = scored(rows, llama_folder, out, "--prompt-template", str(template))
    assert entry(begun) == entry(begun) == 0
    template.write_text("{prompt}?")
    assert entry([*begun, "--dry-run"]) == 2 and "begun with prompts" in capsys.readouterr().err
    assert entry(begun) == 2 and "begun with prompts" in capsys.readouterr().err
    meta = json.loads((out / shards.META).read_text())
    del meta["prompts"]  # as folders were before
    (out / shards.META).write_text(json.dumps(meta))
    assert entry(begun) == 0


def test_a_dry_run_and_bad_input(rows_file, llama_folder, t5_folder, tmp_path, capsys):
    assert entry(scored(rows_file, llama_folder, tmp_path / "lp", "--dry-run")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["texts"] > 80 and not (tmp_path / "lp").exists()
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.txt").write_text("x")
    for out, says in (("file", "is a file"), ("full", "holds x.txt and no meta.json")):
        assert entry(scored(rows_file, llama_folder, tmp_path / out)) == 2
        assert says in capsys.readouterr().err
    assert entry(scored(rows_file, llama_folder, tmp_path / "lp", "--teacher-model", "m")) == 2
    assert "--teacher-model names a model of a server" in capsys.readouterr().err
    assert entry(scored(rows_file, "/nowhere/model", tmp_path / "lp")) == 2
    assert "--teacher: folder '/nowhere/model' does not exist" in capsys.readouterr().err


def test_collect_keeps_log_probs_and_training_finds_them(rows_file, llama_folder, tmp_path, capsys):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()[:3]]
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps({k: r[k] for k in ("id", "question", "answer")}) + "\n" for r in rows)
    )
    (tmp_path / "t.txt").write_text("explain: {question}")
    out = tmp_path / "s.jsonl"
    command = [
        "collect",
        "--questions",
        str(tmp_path / "q.jsonl"),
        "--output",
        str(out),
        "--teacher",
        str(llama_folder),
    ]
    command += ["--template", str(tmp_path / "t.txt"), "--num-samples", "2", "--max-tokens", "9", "--json"]
    assert entry([*command, "--top-logprobs", "3"]) == 0
    capsys.readouterr()
    model = Student.load(str(llama_folder), PromptSettings())
    model.model.eval()
    files = read_logprobs(tmp_path / "s.jsonl.logprobs", model.tokenizer)
    samples = [
        (r["question"], s["rationale"]) for r in map(json.loads, out.read_text().splitlines()) for s in r["samples"]
    ]
    assert len(samples) == 6
    for question, rationale in samples:
        text = files.texts[text_digest(question, EXPLAIN, rationale)]
        source = model.source_ids("", f"explain: {question}")
        _, top = LocalTeacher(model).top([source], [text.tokens], [0], 3)
        assert torch.equal(text.top.ids_TK.long(), top.ids_TK)
        assert (text.top.logprob_TK - top.logprob_TK).abs().max() < 1e-5
    assert entry([*command[:5], "--teacher", "http://127.0.0.1:1/v1", "--top-logprobs", "3"]) == 2
    assert "needs --student" in capsys.readouterr().err
    assert entry([*command, "--student", str(llama_folder)]) == 2
    assert "goes with --top-logprobs" in capsys.readouterr().err


def chat_reply(model, text, *, ids, k=2):
    """A chat's choice with the log-probs of its tokens, as text or as ids."""
    tokens = model.tokenizer(text, add_special_tokens=False).input_ids

    def shown(id):
        return f"token_id:{id}" if ids else model.tokenizer.decode([id])

    content = [
        {
            "token": shown(t),
            "logprob": -0.5,
            "top_logprobs": [{"token": shown(t + j), "logprob": -0.5 - j} for j in range(k)],
        }
        for t in tokens
    ]
    return {
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
        "logprobs": {"content": content},
    }


@pytest.mark.parametrize("ids", [True, False])
def test_log_probs_of_an_endpoint(ids, rows_file, llama_folder, tmp_path, capsys):
    model = Student.load(str(llama_folder), PromptSettings())
    row = json.loads(rows_file.read_text().splitlines()[0])
    (tmp_path / "q.jsonl").write_text(json.dumps({k: row[k] for k in ("id", "question", "answer")}) + "\n")
    said = row["samples"][0]["rationale"] + "\nAnswer: " + row["samples"][0]["answer"]

    def usual(handler, seen):
        assert seen.body["logprobs"] is True and seen.body["top_logprobs"] == 2
        handler.send_json(
            {"choices": [chat_reply(model, said, ids=ids)], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
        )

    with serving(usual) as server:
        command = ["collect", "--questions", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "s.jsonl")]
        command += ["--teacher", server.url, "--teacher-model", "m", "--num-samples", "1", "--top-logprobs", "2"]
        assert entry([*command, "--student", str(llama_folder)]) == 0
    capsys.readouterr()
    files = read_logprobs(tmp_path / "s.jsonl.logprobs", model.tokenizer)
    (sample,) = json.loads((tmp_path / "s.jsonl").read_text())["samples"]
    target = model.target_ids(sample["rationale"])
    found = shards.find_top(files, row["question"], EXPLAIN, sample["rationale"], target)
    covered = found.logprob_TK.isfinite().all(1)
    assert covered[:-1].sum() >= 0.8 * (len(target) - 1) and not covered[-1]  # the answer follows, not the end
    assert (found.ids_TK[covered][:, 0] == torch.tensor(target)[covered]).all()


def test_an_endpoint_with_other_tokens_is_refused(rows_file, llama_folder, tmp_path, capsys):
    row = json.loads(rows_file.read_text().splitlines()[0])
    (tmp_path / "q.jsonl").write_text(json.dumps({k: row[k] for k in ("id", "question", "answer")}) + "\n")
    token = {"token": "zzq", "logprob": -0.5, "top_logprobs": []}

    def usual(handler, seen):
        message = {"role": "assistant", "content": "So it is.\nAnswer: 3"}
        handler.send_json(
            {"choices": [{"message": message, "finish_reason": "stop", "logprobs": {"content": [token] * 40}}]}
        )

    with serving(usual) as server:
        command = [
            "collect",
            "--questions",
            str(tmp_path / "q.jsonl"),
            "--output",
            str(tmp_path / "s.jsonl"),
            "--num-samples",
            "1",
        ]
        command += [
            "--teacher",
            server.url,
            "--teacher-model",
            "m",
            "--top-logprobs",
            "2",
            "--student",
            str(llama_folder),
        ]
        command += ["--num-samples", "1"]
        assert entry(command) == 2
    assert "has other tokens than the student" in capsys.readouterr().err
