"""Kill an active run at random moments, go on, and compare every byte with the run that was left alone.

    python -m tests.support.crash_active --kills 20

Half of the trials die at a random moment, half within an operation on a file; each is killed twice. Exit code 1 if any
run comes out otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.support.active_runs import arguments, contents, teach_to_reason, write_files
from tests.support.faults import Fault
from tests.support.warm import ROOT, Warm

KILLS = 2  # of a trial


class ActiveCrashes:
    """Trials of one run: three rounds, of which two repair what a student says."""

    def __init__(self, warm: Warm, folder: Path, steps: int = 60):
        from tests.support.students import make_llama

        self.warm, self.folder, self.run = warm, folder, folder / "run"
        (folder / "student").mkdir()
        student = make_llama(folder / "student", layers=1)
        files = write_files(folder, pool=14, validation=4, test=4)
        reasons = teach_to_reason(student, folder / "reasons", steps)
        options = {"by": "known", "num_samples": 2, "top": 4, "rounds": 3, "max_steps": 3, "budget_tokens": 2300}
        self.args = arguments(files, student=reasons, output_dir=self.run, **options)
        warm.run(["--version"])  # until everything is imported
        started = time.monotonic()
        done = warm.run(self.args, folder=self.run, timeout=600)
        assert done.code == 0, done.err
        self.seconds, self.points = time.monotonic() - started, done.points
        self.whole = contents(self.run)
        shutil.rmtree(self.run)

    def trial(self, seed: int, number: int) -> str | None:
        """What came out otherwise, or None."""
        rng = random.Random(f"{seed}/{number}")
        where, codes = list[str](), list[int]()
        try:
            for _ in range(KILLS):
                args = [*self.args, "--resume", "auto"]
                if number % 2:
                    seconds = rng.uniform(0.0, self.seconds / KILLS)
                    where.append(f"{seconds:.3f} s")
                    started = self.warm.start(args)
                    time.sleep(seconds)
                    os.kill(started[0], signal.SIGKILL)
                    codes.append(self.warm.wait(started).code)
                else:
                    point = rng.randrange(len(self.points) // KILLS)
                    where.append(f"point {point}")
                    codes.append(self.warm.run(args, Fault("kill", point), folder=self.run, timeout=600).code)
            if codes[0] != -signal.SIGKILL:
                return f"killed at {', '.join(where)}: the first one ended with {codes[0]} instead"
            done = self.warm.run([*self.args, "--resume", "auto"], timeout=600)
            if done.code:
                return f"killed at {', '.join(where)}: the resume ended with {done.code}\n{done.err[-3000:]}"
            found = contents(self.run)
            different = sorted(name for name in {*found, *self.whole} if found.get(name) != self.whole.get(name))
            return (
                f"killed at {', '.join(where)}: other than the unbroken run: {', '.join(different)}"
                if different
                else None
            )
        finally:
            shutil.rmtree(self.run, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="trials, of two kills each")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Warm() as warm:
        crashes = ActiveCrashes(warm, Path(folder))
        wrong = 0
        for number in range(given.kills):
            if text := crashes.trial(given.seed, number):
                wrong += 1
                print(f"FAILED {number}: {text}", flush=True)
    print(
        f"{given.kills - wrong} of {given.kills} runs, killed twice each and resumed, bit-identical to the unbroken run"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    sys.exit(main())
