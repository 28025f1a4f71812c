"""Fuzz one reader: `python fuzz/readers.py TARGET --seconds N`. Needs atheris, which `make fuzz` installs.

A reader may answer any bytes with pages that keep what an Image promises (tests/readers.py), or with an error that
says what to do next. All else is found: another exception, a broken promise, a hang, too much memory. What is found
is saved once for each place in the code, input and traceback, under build/fuzz/TARGET, and fuzzing goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing these imports the readers, which must be instrumented first
    from fuzz.targets import Target

MOST_BYTES = 256 << 10
_INPUT_S = 10  # more is a hang: the slowest inputs take a quarter of a second
_MEMORY = 3 << 30  # of address space: 1.2 GiB are libraries
_INPUTS = 15_000  # in one process: atheris keeps some of what a mutator returns, up to 42 KB of each
_FOUND = Path("build/fuzz")


class HangError(Exception):
    """An input took longer than _INPUT_S."""


class Finder:
    """Feeds inputs to a reader, and keeps those that it does not answer as it must: one for each place in the code."""

    def __init__(self, target: Target, into: Path, scratch: Path) -> None:
        from ksmdist.errors import SettingsError
        from tests import readers

        # Of larger images a few pages are read: what a header claims with a right must not take the time.
        readers.MOST_PAGES = 1 << 10
        self._exercise, self._answers = readers.exercise, (SettingsError,)  # pages of another size
        self._target, self._into, self._scratch = target, into, scratch
        self.tried = self.opened = 0
        signal.signal(signal.SIGALRM, self._hang)

    def _hang(self, signum: int, frame: FrameType | None) -> None:
        raise HangError(f"more than {_INPUT_S} s")

    def __call__(self, data: bytes) -> None:
        """Try one input."""
        for name, content in zip(self._target.files, self._target.unpack(data), strict=True):
            path = self._scratch / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        self.tried += 1
        signal.alarm(_INPUT_S)
        try:
            self.opened += isinstance(self._exercise(self._scratch / self._target.files[0]), dict)
        except self._answers:
            pass
        except Exception as error:
            self._keep(data, error)
        finally:
            signal.alarm(0)

    def _keep(self, data: bytes, error: Exception) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "/ksmdist/" in frame.filename or "/tests/" in frame.filename]
        where = f"{Path(ours[-1].filename).stem}-{ours[-1].lineno}" if ours else "outside"
        path = self._into / f"{type(error).__name__}-{where}"
        if not path.exists() or path.stat().st_size > len(data):
            path.write_bytes(data)
            path.with_name(path.name + ".txt").write_text("".join(traceback.format_exception(error)))


def fuzz(name: str, seconds: int, into: Path) -> None:
    """Fuzz a target in this process, which atheris ends."""
    import atheris

    with atheris.instrument_imports(include=["ksmdist.images"]):
        from fuzz.mutations import mutated
        from fuzz.targets import TARGETS
    target = TARGETS[name]
    corpus = into / "corpus"
    seeds = [target.pack(files) for files in target.seeds()]
    for seed in seeds:
        assert len(seed) <= MOST_BYTES
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    scratch = Path(os.environ["TMPDIR"])
    find = Finder(target, into, scratch)
    for seed in seeds:
        find(seed)
    assert find.opened == len(seeds), "a seed is no image"
    magics = [target.unpack(seed)[0][: target.keep] for seed in seeds]

    def mutate(data: bytes, most: int, number: int) -> bytes:
        def plain(some: bytes) -> bytes:
            return bytes(atheris.Mutate(some, max(len(some), 64)))

        return mutated(target, magics, bytes(data), random.Random(number), plain)[:most]

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    options = [
        f"-max_total_time={seconds}",
        f"-runs={_INPUTS}",
        f"-max_len={MOST_BYTES}",
        f"-timeout={3 * _INPUT_S}",
        f"-artifact_prefix={into}/died-",
        "-rss_limit_mb=2048",
        "-len_control=0",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], str(corpus), *options], find, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    """Fuzz a target in a process of its own, and say what was found."""
    if "--child" in sys.argv:
        fuzz(sys.argv[1], int(sys.argv[3]), _FOUND.absolute() / sys.argv[1])
    from fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(description="Fuzz one reader; what is found is saved under build/fuzz/TARGET.")
    parser.add_argument("target", choices=[*sorted(TARGETS), "list"], help="list: print them all")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--try", dest="again", type=Path, help="no fuzzing: try this input that was found")
    given = parser.parse_args()
    if given.target == "list":
        print("\n".join(TARGETS))
        return 0
    into = (_FOUND / given.target).absolute()
    corpus = into / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as scratch:
        if given.again is not None:
            Finder(TARGETS[given.target], Path(scratch), Path(scratch))(given.again.read_bytes())
            for said in Path(scratch).glob("*.txt"):
                print(said.read_text())
            return 0
        for name in _found(into):  # what was found before is tried again, first
            (into / name).rename(into / "corpus" / name)
            (into / f"{name}.txt").unlink(missing_ok=True)
        log, began = into / "log.txt", time.monotonic()
        log.unlink(missing_ok=True)
        while (left := given.seconds - (time.monotonic() - began)) > 1:  # _INPUTS are done, or one ended the process
            command = [sys.executable, __file__, given.target, "--child", str(int(left))]
            with open(log, "ab") as told:
                ended = subprocess.run(command, stdout=told, stderr=told, env={**os.environ, "TMPDIR": scratch})
            if ended.returncode and not list(into.glob("died-*")):
                print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
                return 1
    found, lines = _found(into), log.read_text(errors="replace").splitlines()
    tried = sum(int(line.split()[-1]) for line in lines if "number_of_executed" in line)
    print(f"{given.target}: {tried:,} inputs, {len(list(corpus.iterdir()))} in the corpus, {len(found)} found")
    for name in found:
        print(f"  {into / name}")
    return int(bool(found))


def _found(into: Path) -> list[str]:
    """Names of inputs that were found."""
    return sorted(path.name for path in into.iterdir() if path.is_file() and path.suffix != ".txt")


if __name__ == "__main__":
    sys.exit(main())
