"""The errors a user meets, each with the exit code the command line ends with."""


class InputError(ValueError):
    """Usage, configuration or data at fault: exit code 2. The message names the file, line or option."""

    exit_code = 2


class RunError(RuntimeError):
    """Something failed while running: exit code 1."""

    exit_code = 1


class LimitReached(RunError):
    """A limit that the user set was reached and everything so far is saved: exit code 75."""

    exit_code = 75


class Stopped(Exception):
    """A signal asked the run to stop and its state was saved: exit code 128 + signal number."""

    def __init__(self, signum: int, advice: str = "continue with --resume auto"):
        super().__init__(f"stopped by signal {signum}; {advice}")
        self.exit_code = 128 + signum
