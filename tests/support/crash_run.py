"""Kill a short run again and again, resume it, and compare every byte with the run that was left alone.

    python -m tests.support.crash_run --kills 200                       a T5 and a decoder in turn
    python -m tests.support.crash_run --every-point                     at each operation on a file, one after the other
    python -m tests.support.crash_run --every-point --do full           the disk is full from there on
    python -m tests.support.crash_run --every-point --do power          and what was not synced is lost
    python -m tests.support.crash_run --kills 20 --device cuda --deterministic
    python -m tests.support.crash_run --kills 20 --overlap stream       any option of `qcrd-fast train`
    python -m tests.support.crash_run --seed 3 --only 17                trial 17 of seed 3 again

Half of the trials die at a random moment, half within a save or an append. Exit code 1 if any run comes out otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.faults import BYTES, Fault
from tests.support.warm import ROOT, Warm, differences, short_run


@dataclasses.dataclass
class Whole:
    """An unbroken run: where it is, how long it took, the disk points it came by."""

    student: Path
    run: Path
    seconds: float
    points: list[str]


class Crashes:
    """Trials of one kind of run; `options` are `train`'s, and so is `more`, as on the command line."""

    def __init__(self, warm: Warm, folder: Path, more: Sequence[str] = (), **options: object):
        from tests.support.students import make_llama, make_t5, sampled_rows

        self.warm, self.folder, self.more, self.options = warm, folder, more, options
        self.rows = folder / "rows.jsonl"
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in sampled_rows(24)), encoding="utf-8")
        students = []
        for name, make in (("t5", make_t5), ("llama", make_llama)):
            students.append(folder / name)
            students[-1].mkdir()
            make(students[-1], layers=1)
        self.judge = students[0]
        warm.run(["--version"])  # until everything is imported
        self.wholes = [self._whole(student) for student in students]

    def _whole(self, student: Path) -> Whole:
        run = self.folder / f"whole-{student.name}"
        started = time.monotonic()
        done = self.warm.run(self.args(student, run), folder=run, timeout=600)
        assert done.code == 0, done.err
        return Whole(student, run, time.monotonic() - started, done.points)

    def args(self, student: Path, out: Path, **options: object) -> list[str]:
        return [*short_run(self.rows, student, self.judge, out, **(self.options | options)), *self.more]

    def random_trial(self, seed: int, number: int) -> str | None:
        """What came out otherwise, or None. Trial `number` of a seed is the same each time but for the moment it dies
        at."""
        rng = random.Random(f"{seed}/{number}")
        whole = self.wholes[number % 2]
        if number // 2 % 2:
            return self.trial(whole, seconds=rng.uniform(0.0, whole.seconds))
        return self.trial(whole, point=rng.randrange(len(whole.points)))

    def trial(self, whole: Whole, *, point: int | None = None, seconds: float = 0.0, do: str = "kill") -> str | None:
        """Die at a disk point, or after so many seconds; resume; compare. do="full": the disk is full from the point
        on."""
        run = Path(tempfile.mkdtemp(dir=self.folder)) / "run"
        where = f"{whole.student.name}, " + (
            f"{seconds:.3f} s" if point is None else f"point {point} ({whole.points[point]})"
        )
        try:
            if point is not None:
                done = self.warm.run(self.args(whole.student, run), Fault(do, point), folder=run)
            else:
                started = self.warm.start(self.args(whole.student, run))
                time.sleep(seconds)
                os.kill(started[0], signal.SIGKILL)  # the warm process has not reaped it yet
                done = self.warm.wait(started)
            if done.code == 0 and point is None:
                return self.trial(whole, seconds=seconds / 2)  # it was done before
            if do == "full":
                left = [str(p.relative_to(run)) for p in run.rglob(".*") if p.name != ".lock"]
                if done.code != 1 or "Traceback" in done.err or "bytes needed" not in done.err or left:
                    return f"{where}: full disk: exit code {done.code}, left {left}\n{done.err[-3000:]}"
            elif done.code != -signal.SIGKILL:
                return f"{where}: exit code {done.code} instead of a kill\n{done.err[-3000:]}"
            done = self.warm.run(self.args(whole.student, run, resume="auto"), timeout=600)
            if done.code:
                return f"{where}: the resume ended with {done.code}\n{done.err[-3000:]}"
            different = differences(run, whole.run)
            return f"{where}: other than the unbroken run: {', '.join(different)}" if different else None
        finally:
            shutil.rmtree(run.parent)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--every-point", action="store_true")
    parser.add_argument("--do", choices=("kill", "power", "full"), default="kill", help="with --every-point")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this trial alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--deterministic", action="store_true")
    given, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder, Warm() as warm:
        crashes = Crashes(warm, Path(folder), more, device=given.device, deterministic=given.deterministic)

        def trials() -> Iterator[tuple[str, str | None]]:
            if given.every_point:
                for whole in crashes.wholes:
                    for point, name in enumerate(whole.points):
                        if given.do != "full" or name.split()[0] in BYTES:  # that need room
                            yield f"{whole.student.name} point {point}", crashes.trial(whole, point=point, do=given.do)
                return
            for number in range(given.kills) if given.only is None else [given.only]:
                yield f"--seed {given.seed} --only {number}", crashes.random_trial(given.seed, number)

        good = count = 0
        for name, wrong in trials():
            count += 1
            good += wrong is None
            if wrong:
                print(f"FAILED {name}: {wrong}", flush=True)
            elif count % 20 == 0:
                print(f"{good} of {count} bit-identical", flush=True)
    print(f"{good} of {count} runs, killed and resumed, bit-identical to the unbroken run (seed {given.seed})")
    return int(good < count)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    sys.exit(main())
