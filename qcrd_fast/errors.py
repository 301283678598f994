"""The errors a user meets, each with the exit code the command line ends with."""


class InputError(ValueError):
    """Usage, configuration or data at fault: exit code 2. The message names the file, line or option."""

    exit_code = 2


class RunError(RuntimeError):
    """Something failed while running: exit code 1."""

    exit_code = 1


class Stopped(Exception):
    """A signal asked the run to stop and its state was saved: exit code 128 + signal number."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by signal {signum}; continue with --resume auto")
        self.exit_code = 128 + signum
