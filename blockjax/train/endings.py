"""How a training job ends before its last step, mistakes of the user aside; each with its exit code."""


class Preempted(KeyboardInterrupt):
    """A signal asked the job to leave; what it had done is saved, and the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


class Hung(RuntimeError):
    """Something did not go on within its limit."""

    exit_code = 76


class Diverged(RuntimeError):
    """Losses or gradients that are not finite, too often in a row."""

    exit_code = 77
