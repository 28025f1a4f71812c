"""What can go wrong, as one small tree; every error says what, where and what to do next.

    KsmdistError                 exit 1
    ├── SettingsError            exit 2   a setting or argument that cannot be
    ├── ImageError               exit 10  not an image, or one whose structure is broken
    │   └── ImageReadError       exit 1   the file cannot be opened or read
    ├── RunDirectoryError        exit 11  the run directory is in use, or cannot be written
    ├── EngineError              exit 1   Ray or its cluster did not do its work
    └── IdentityError            exit 1   a total does not add up: a bug in ksmdist

Exit codes besides: 0 done; 3 done, but some pages could not be read (holes.parquet says which);
130 interrupted. Every error is picklable, so that it crosses from a Ray worker as it is: each
constructor hands all its fields, in order, to `Exception.__init__`.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_HOLES = 3
EXIT_INTERRUPTED = 130

__all__ = [
    "EXIT_HOLES",
    "EXIT_INTERRUPTED",
    "EngineError",
    "IdentityError",
    "ImageError",
    "ImageReadError",
    "KsmdistError",
    "RunDirectoryError",
    "SettingsError",
]


class KsmdistError(Exception):
    """An error that ksmdist foresaw: `what` happened, `where`, and the `hint` of what to do next."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, where: str, hint: str) -> None:
        super().__init__(what, where, hint)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.hint}"


class SettingsError(KsmdistError):
    """A setting or a command-line argument that cannot be."""

    exit_code = 2


class ImageError(KsmdistError):
    """A file that is no memory image, or whose structure is broken beyond reading it in part."""

    exit_code = 10


class ImageReadError(ImageError):
    """A file that the operating system does not let us open or read."""

    exit_code = 1


class RunDirectoryError(KsmdistError):
    """The run directory holds something else already, or cannot be written."""

    exit_code = 11


class EngineError(KsmdistError):
    """The engine (Ray, its cluster) could not be started or lost work it could not redo."""


class IdentityError(KsmdistError):
    """An identity of docs/design.md does not hold: a bug, never the input's fault."""
