"""Runs every example of docs/examples as a script on tiny models: python tests/support/run_examples.py FOLDER.

`.ci/run` does so with the installed wheel. Where something that an example needs is not installed, it fails and names
it.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
DECODERS = ("trl_sft", "lightning_module", "peft_lora", "dpo_redi", "gkd")  # the others train a T5


def main(folder: Path) -> None:
    sys.path.append(str(ROOT))  # behind what is installed: it is the wheel that is tried
    import qcrd_fast
    from qcrd_fast.data.load import load_questions, write_prepared
    from tests.support.students import make_llama, make_t5, sampled_rows

    os.chdir(folder)
    Path("samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sampled_rows(24)), encoding="utf-8")
    write_prepared("train.jsonl", load_questions("samples.jsonl").questions)
    make_t5(folder / "t5")
    make_llama(folder / "llama")
    print(f"qcrd-fast {qcrd_fast.__version__} of {Path(qcrd_fast.__file__).parent}")
    for path in sorted(EXAMPLES.glob("*.py")):
        print(f"-- {path.name}", flush=True)
        sys.argv = [str(path), "llama" if path.stem in DECODERS else "t5", "train.jsonl"]
        sys.argv += ["llama"] if path.stem == "gkd" else []  # the teacher
        runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
