"""Errors that users can mend."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from a user.

    The message is one line, ``what is wrong: how to mend it``. The command line prints it after
    ``error: `` and exits with status 2; library users see an ordinary ``ValueError``.
    """

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(" ".join(f"{what}: {mend}".split()))
        self.what = what
        self.mend = mend

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str]]:
        # The default pickles only the joined message, which a worker process could not rebuild.
        return (type(self), (self.what, self.mend))


def first_line(error: BaseException) -> str:
    """What another library's error says, cut to the one line that fits in an InputError."""
    return (str(error).splitlines() or [type(error).__name__])[0]
