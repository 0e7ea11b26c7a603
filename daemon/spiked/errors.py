"""What can go wrong, sorted by what the operator should do.

    SpikedError
     ├─ ConfigError        fix the configuration or the command line, then start again
     ├─ SourceError        the stream is absent, silent or not what was configured
     │   └─ StreamChanged  channel count or sampling rate changed while running
     ├─ RecordingError     the session file cannot be written or read
     ├─ Overrun            a ring reader was lapped by the writer (carries the lost interval)
     └─ OfflineError       an offline stage failed; `kind` is biology, environment or resource

Every message is one line: what is wrong, then what to do.
"""

from __future__ import annotations


class SpikedError(Exception):
    """Base of all errors with a message meant for the operator; `exit_code` is the process's."""

    exit_code = 1


class ConfigError(SpikedError):
    """The configuration or an argument is wrong."""

    exit_code = 2


class SourceError(SpikedError):
    """The stream cannot be had, or is not what the configuration says."""

    exit_code = 3


class StreamChanged(SourceError):
    """Channel count or sampling rate changed while the session ran."""


class RecordingError(SpikedError):
    """A recording cannot be written or read."""

    exit_code = 4


class Overrun(SpikedError):
    """A ring reader fell behind by more than the ring holds.

    `start` and `stop` bound the lost samples (sample numbers, half open).
    """

    exit_code = 5

    def __init__(self, start: int, stop: int) -> None:
        super().__init__(f"reader fell behind: samples {start} to {stop} were overwritten; enlarge ring_s")
        self.start, self.stop = start, stop


class OfflineError(SpikedError):
    """An offline stage failed. `kind` is 'biology' (skip), 'environment' (fix) or 'resource' (retry smaller).

    `name` is the failure's own (failures.CAUSES, or a guard's), `evidence` are lines of what was seen.
    """

    exit_code = 6

    def __init__(
        self,
        message: str,
        kind: str = "environment",
        stage: str = "",
        name: str = "",
        evidence: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.kind, self.stage, self.name, self.evidence = kind, stage, name, tuple(evidence)

    @property
    def remedy(self) -> str:
        """What to do: the message's part after the last semicolon; "" where it has none."""
        return str(self).rpartition("; ")[2] if "; " in str(self) else ""
