"""The command line: parse, call, print. The only place that ends the process or renders an error."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Annotated, Any, TextIO

import pyarrow as pa
import typer

from ksmdist import report
from ksmdist.cli import files, live, predictions, publishing, reports, safety, scanning
from ksmdist.errors import KsmdistError, RunDirectoryError
from ksmdist.signals import leave_no_core
from ksmdist.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it would take [heap] and [default: ...] for markup
    help=(
        "What Linux KSM would merge in memory images, and what that would save.\n\n"
        "Exit codes: 0 done; 1 failed; 2 wrong arguments; 3 done, but some pages could not be read, or doctor could "
        "not find something out; "
        "10 not a memory image, or a broken one; 11 the run directory is in use; 130 interrupted."
    ),
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"ksmdist {__version__}")
        raise typer.Exit


_OF_RUNS = ("whatif", "explain", "unmerge", "report", "diff", "query", "publish")
_UNFIT = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(AssertionError, StopIteration, MemoryError, RecursionError),
    pa.ArrowException,
)


def _of_a_run(command: Callable[..., None]) -> Callable[..., None]:
    """A command that reads a run directory, which anyone may have made: tables that do not fit each other end it.

    Each file is checked where it is read (store.py, streams.py). What no file says for itself, an image that is in no
    table, comes out where it is used.
    """

    @functools.wraps(command)
    def checked(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except _UNFIT as error:
            if isinstance(error, UnicodeEncodeError):  # of the terminal
                raise
            run = next((str(value) for name, value in options.items() if name in ("run", "run_a")), "")
            said = str(error).splitlines()[0][:200] if str(error) else ""
            raise RunDirectoryError(
                f"holds what does not fit together: {type(error).__name__}: {said}",
                run,
                "run the images again; if ksmdist wrote it as it is, this is a bug of ksmdist",
            ) from error

    return checked


for _name, _command in (
    ("run", scanning.run_command),
    ("plan", scanning.plan_command),
    ("info", files.info_command),
    ("import", files.import_command),
    ("export", files.export_command),
    ("capture", live.capture_command),
    ("verify-kernel", live.verify_command),
    ("demo", scanning.demo_command),
    ("schema", reports.schema_command),
    ("whatif", predictions.whatif_command),
    ("explain", predictions.explain_command),
    ("unmerge", predictions.unmerge_command),
    ("report", reports.report_command),
    ("diff", reports.diff_command),
    ("query", reports.query_command),
    ("publish", publishing.publish_command),
    ("doctor", safety.doctor_command),
):
    app.command(_name)(_of_a_run(_command) if _name in _OF_RUNS else _command)


class _Stream:
    """A stream whose reader may leave (`| head`): from then on nothing is written, and nothing is wrong with that.

    left: whether it has. rich and typer would end the process with 1.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.left = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._unless_left(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._unless_left(self._stream.flush)

    def _unless_left(self, do: Callable[[], object]) -> None:
        if not self.left:
            try:
                do()
            except BrokenPipeError:
                self.left = True


def main() -> None:
    """The console script: run a command, render what it raises, end the process with its code."""
    leave_no_core()
    code = 0
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: whoever closed it wants nothing
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        setattr(sys, name, _Stream(getattr(sys, name)))
    try:
        app()
    except KsmdistError as error:
        # Names in it may come from images; a message of DuckDB has lines.
        print("\n".join(map(report.printable, f"ksmdist: {error}".split("\n"))), file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        if error.filename is not None:  # of a file, and not foreseen: a bug
            raise
        with suppress(OSError):
            print(f"ksmdist: cannot write what was found: {os.strerror(error.errno or 0)}", file=sys.stderr)
        code = 1
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except OSError as error:
        with suppress(OSError):
            os.write(2, f"ksmdist: cannot write what was found: {os.strerror(error.errno or 0)}\n".encode())
        code = code or 1
    os._exit(code)  # taking Arrow and numpy apart takes 35 ms, and changes nothing
