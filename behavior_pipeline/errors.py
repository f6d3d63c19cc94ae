"""The one exception for a user's mistake: shown as a short message, never as a traceback."""

from __future__ import annotations


class PipelineError(ValueError):
    """Something the user can put right; the message names the file, row or column at fault.

    Attributes:
        way_out: one sentence that says what to do about it, or an empty string.
    """

    def __init__(self, message: str, way_out: str = "") -> None:
        super().__init__(message)
        self.way_out = way_out

    def __str__(self) -> str:
        """Return the message with the way out on a line of its own."""
        message = str(self.args[0])
        return f"{message}\n{self.way_out}" if self.way_out else message


class NothingArrivedError(PipelineError):
    """There is nothing to load: no file, or files without a row.

    Attributes:
        is_missing: whether there is no file, rather than an empty one.
    """

    def __init__(self, message: str, way_out: str = "", *, is_missing: bool = False) -> None:
        super().__init__(message, way_out)
        self.is_missing = is_missing
