"""The site key: 32 random bytes, made once for each user, that the seeds of all hashes come from.

Without it, whoever holds a run could hash a page they guess and see whether it was there, and a guest could be made
to hold pages that collide. The key itself never leaves this process: workers get seeds, a run its fingerprint.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ksmdist.digests import Digester
from ksmdist.errors import RunDirectoryError, SettingsError

__all__ = ["KEY_BYTES", "NO_KEY", "VARIABLE", "Key", "check_same", "load", "site_file", "unsafe"]

KEY_BYTES = 32
VARIABLE = "KSMDIST_KEY"
"""Environment variable that may hold the key, as 64 hexadecimal digits."""


@dataclass(frozen=True, slots=True)
class Key:
    """What a run is told of a key. fingerprint: names it, in run.json; None for no key.

    digester: with the seeds that come from it. source: where it was found, for people
    """

    fingerprint: str | None
    digester: Digester = field(repr=False)
    source: str = ""

    @classmethod
    def of(cls, secret: bytes, source: str = "") -> Key:
        """The seeds and the fingerprint that these KEY_BYTES bytes give.

        Each is keyed BLAKE2b (RFC 7693) with a person of its own, so that none tells of another: one of the seeds has
        32 bits only.
        """

        def derived(person: bytes, nbytes: int) -> bytes:
            return hashlib.blake2b(key=secret, person=person, digest_size=nbytes).digest()

        seed, witness_seed = (int.from_bytes(derived(*what), "big") for what in ((b"xxh3", 8), (b"mmh3", 4)))
        return cls(derived(b"fingerprint", 8).hex(), Digester(seed, witness_seed), source)


NO_KEY = Key(None, Digester(), "no key")
"""Seed 0 for all hashes: test vectors, and digests that others can compute too."""


def load(key_file: str | os.PathLike[str] | None = None, no_key: bool = False) -> Key:
    """The key: of a file, of KSMDIST_KEY, or the site key, which is made if there is none.

    Raises SettingsError where it cannot be read or made, is no key, or is open to others.
    """
    if no_key:
        if key_file is not None:
            raise SettingsError("is given, and --no-key", "--key-file", "leave one out")
        return NO_KEY
    if key_file is not None:
        return _read(Path(key_file))
    if VARIABLE in os.environ:
        return Key.of(_parsed(os.environ[VARIABLE], VARIABLE), VARIABLE)
    path = site_file(os.environ)
    if not path.exists():
        _make(path)
    return _read(path)


def site_file(environment: Mapping[str, str]) -> Path:
    """Where the user's key is: ksmdist/key in the configuration directory (XDG Base Directory Specification 0.8)."""
    configuration = environment.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(configuration):  # "must be absolute", else to be ignored
        configuration = os.path.join(os.path.expanduser("~"), ".config")
    return Path(configuration) / "ksmdist" / "key"


def unsafe(found: os.stat_result, user: int) -> str | None:
    """Why a file with this status cannot hold the key of the user with this number, in words; None where it can."""
    if not stat.S_ISREG(found.st_mode):
        return "is no regular file"
    if found.st_uid not in (user, 0):
        return f"belongs to user {found.st_uid}"
    if stat.S_IMODE(found.st_mode) & 0o077:
        return f"can be read or written by others (mode {stat.S_IMODE(found.st_mode):04o})"
    return None


def check_same(key: Key, fingerprint: str | None, where: str) -> None:
    """Raises RunDirectoryError where a run was made under another key than this one."""
    if key.fingerprint != fingerprint:
        raise RunDirectoryError(
            f"was made under {_named(fingerprint)}, and here is {_named(key.fingerprint)}",
            where,
            f"give the key it was made with: --key-file, {VARIABLE}" if fingerprint else "give --no-key",
        )


def _named(fingerprint: str | None) -> str:
    return "no key" if fingerprint is None else f"key {fingerprint}"


def _read(path: Path) -> Key:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            why = unsafe(os.fstat(fd), os.geteuid())
            if why is not None:
                raise SettingsError(why, str(path), "make it yours alone: chmod 600, chown")
            text = os.read(fd, 1024)
        finally:
            os.close(fd)
    except OSError as error:
        raise _wanting(path, "read", error) from None
    return Key.of(_parsed(text.decode("ascii", "replace"), str(path)), str(path))


def _parsed(text: str, where: str) -> bytes:
    """The key that 64 hexadecimal digits are. What is wrong with them is not said: they may be almost a key."""
    digits = text.strip()
    if len(digits) != 2 * KEY_BYTES or not set(digits) <= set("0123456789abcdefABCDEF"):
        raise SettingsError(
            f"is no key: it must be {2 * KEY_BYTES} hexadecimal digits", where, "make one: openssl rand -hex 32"
        )
    return bytes.fromhex(digits)


def _make(path: Path) -> None:
    """Make the site key, once: of two processes that do, one wins, and both read its key."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=".key.", dir=path.parent)  # 0600
        try:
            with open(fd, "w", encoding="ascii") as sink:
                sink.write(os.urandom(KEY_BYTES).hex() + "\n")
                sink.flush()
                os.fsync(sink.fileno())
            with suppress(FileExistsError):
                os.link(name, path)
        finally:
            os.unlink(name)
    except OSError as error:
        raise _wanting(path, "made", error) from None


def _wanting(path: Path, what: str, error: OSError) -> SettingsError:
    return SettingsError(
        f"cannot be {what}: {os.strerror(error.errno or 0)}",
        str(path),
        f"give a key with --key-file or {VARIABLE}, or run with --no-key",
    )
