"""PTX text -> instructions, labels and parameters of its kernel."""

from __future__ import annotations

import re
from typing import NamedTuple

LABEL = re.compile(r"([\w$]+):(?!:)")
STATEMENT = re.compile(r"(?:@(!?)(\S+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.(\w+).*?([\w$]+)(?:\[\d+\])?$")


class Instruction(NamedTuple):
    """`name` is the first word of the opcode, `parts` all of them: ld.global.b32 -> (ld, global, b32)."""

    name: str
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    text: str

    @property
    def kind(self) -> str:
        """The last part: of most, the type of the result."""
        return self.parts[-1]


class Program:
    """What is between a kernel's braces. Registers and labels of inner scopes (inline assembly) get names of their
    own."""

    def __init__(self, ptx: str):
        start = ptx.index(".visible .entry")
        open_ = ptx.index("\n{", start)
        header = ptx[start:open_]
        lines = (line.split("//")[0].strip() for line in ptx[open_ + 2 :].splitlines())
        body = " ".join(line for line in lines if not line.startswith((".loc", ".file")))
        found = [PARAMETER.match(line.strip().rstrip(",")) for line in header.splitlines()]
        self.parameters = [match[2] for match in found if match]
        self.threads = int(re.search(r"\.reqntid (\d+)", header)[1])  # type: ignore[index]
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self._read(body)

    def _read(self, body: str) -> None:
        at, count = 0, 0
        scopes: list[tuple[int, set[str]]] = [(0, set())]  # (number, names declared) of each that is open
        while True:
            while body[at].isspace():
                at += 1
            if body[at] == "{":
                count += 1
                scopes.append((count, set()))
                at += 1
            elif body[at] == "}":
                scopes.pop()
                at += 1
                if not scopes:
                    return
            elif label := LABEL.match(body, at):
                self.labels[_local(label[1], scopes)] = len(self.code)
                at = label.end()
            else:
                end = body.index(";", at)
                self._statement(body[at:end].strip(), scopes)
                at = end + 1

    def _statement(self, text: str, scopes: list[tuple[int, set[str]]]) -> None:
        if text.startswith(".reg") and len(scopes) > 1:
            scopes[-1][1].update(name.strip() for name in re.sub(r"\.reg\s+\.\w+", "", text).split(","))
        if not text or text.startswith("."):
            return
        for scope, names in scopes[1:]:
            for name in names:
                text = re.sub(rf"(?<![\w%$]){re.escape(name)}(?!\w)", f"{name}@{scope}", text)
        negated, predicate, opcode, rest = STATEMENT.match(text).groups()  # type: ignore[union-attr]
        operands = split(rest)
        if opcode.startswith("bra"):
            operands = [_local(operands[0], scopes)]
        self.code.append(
            Instruction(opcode.split(".")[0], (*opcode.split("."),), (*operands,), predicate, negated == "!", text)
        )


def _local(label: str, scopes: list[tuple[int, set[str]]]) -> str:
    """Labels with a $ are the kernel's, others their scope's."""
    return label if label.startswith("$") or len(scopes) == 1 else f"{label}@{scopes[-1][0]}"


def split(text: str) -> list[str]:
    """At commas outside brackets."""
    found, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    return [*found, text[start:].strip()] if text[start:].strip() else found


def elements(operand: str) -> list[str]:
    """{a, b} -> a, b; of a single register itself."""
    return [name.strip() for name in operand.strip("{} ").split(",")]
