"""Files in object stores, through pyarrow's file systems: ranges of bytes, several in flight, with patience.

A range that cannot be read is asked for again, after a wait that doubles, until `patience_s` have passed
since it failed first; what another try cannot mend (no such object, access denied) is an error at once.
S3 connections that give no byte for `stall_s` are cut; those of other stores are cut by their own clients.

Raises ImageReadError: what the store does not give; ImageError: an object that changed meanwhile;
SettingsError: a URI that names nothing.
"""

from __future__ import annotations

import atexit
import functools
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from threading import Event, Lock
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from ksmdist.errors import ImageError, ImageReadError, SettingsError
from ksmdist.images.uris import Uri, parse_uri

__all__ = ["RULES", "Rules", "StoredFile", "in_order", "patiently", "store_of"]

T = TypeVar("T")

_GAP_BYTES = 32 << 10  # ranges this near are read as one: a request costs more than the bytes between
_ALIGN = 64  # of Arrow's buffers, kept in memory too


@dataclass(frozen=True, slots=True)
class Rules:
    """How stores are read.

    block_bytes:  a request asks for this much at most: S3's own advice is 8 to 16 MiB
    in_flight:    requests at a time for one shard: with 8 MiB each they hold 64 MiB, one batch of a local file
    patience_s:   how long a range is asked for again, from its first failure on
    wait_s:       before the second try; it doubles with each, up to longest_wait_s
    connect_s, stall_s: S3 connections are given up after these
    """

    block_bytes: int = 8 << 20
    in_flight: int = 8
    patience_s: float = 60.0
    wait_s: float = 0.1
    longest_wait_s: float = 5.0
    connect_s: float = 5.0
    stall_s: float = 20.0


RULES = Rules()
"""The rules for what is opened from now on."""

_FINAL = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT"
    r"|MISSING_AUTHENTICATION_TOKEN|PERMISSION_DENIED|UNAUTHENTICATED|Permission denied|Unable to load lib"
    r"|Authenti\w+Failed|Authorization\w*(?:Failure|Mismatch)|InvalidAuthenticationInfo|NoAuthenticationInformation"
    r"|HTTP status (?:30\d|4(?!08|09|16|25|29)\d\d)|curlCode: (?:35|58|60|77)\b"
)
"""Errors that stay whatever the patience, as pyarrow's S3, GCS, Azure and Hadoop clients word them.

Not 416: a range past the end of an object that became shorter, which the next try finds out.
"""
_ABSENT = re.compile(r"NO_SUCH_(?:KEY|BUCKET)|RESOURCE_NOT_FOUND|\bNOT_FOUND\b|(?:Blob|Container)NotFound")


def _final(error: Exception, where: str) -> ImageReadError | None:
    """The error to raise at once; None where another try may do better."""
    text = _said(error)
    if isinstance(error, FileNotFoundError) or _ABSENT.search(text):
        return ImageReadError("cannot be opened: no such object", where, "check the bucket and the name")
    if "Not a regular file" in text or isinstance(error, IsADirectoryError):
        return ImageReadError("is not an object but a folder", where, "end it with / to scan what is in it")
    if "Unable to load lib" in text:
        return ImageReadError(
            f"cannot be opened: {text}", where, "install Hadoop's native client; set JAVA_HOME, ARROW_LIBHDFS_DIR"
        )
    if isinstance(error, PermissionError) or _FINAL.search(text):
        if "HTTP status 30" in text:
            return ImageReadError(f"is in another region: {text}", where, "add ?region=NAME to the URI")
        if "curlCode" in text:
            return ImageReadError(f"cannot be reached: {text}", where, "check the store's certificate")
        return ImageReadError(
            f"cannot be opened: access denied ({text})",
            where,
            "check the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE or the like) and what they may read",
        )
    return None


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def patiently(attempt: Callable[[int], T], where: str, rules: Rules, stop: Event | None = None) -> T:
    """attempt(0), and where it raises OSError attempt(1) and so on, until the patience of `rules` is used up.

    where: for the error; stop: set by who does not want the result any more. Raises ImageReadError.
    """
    stop = stop or Event()
    wait, tries, deadline = rules.wait_s, 0, None
    while True:
        try:
            return attempt(tries)
        except OSError as error:
            final = _final(error, where)
            if final is not None:
                raise final from None
            now, tries = time.monotonic(), tries + 1
            deadline = now + rules.patience_s if deadline is None else deadline
            if now + wait > deadline or stop.wait(wait):
                raise ImageReadError(
                    f"cannot be read, {tries} tries in {rules.patience_s:g} s: {_said(error)}",
                    where,
                    "see that the store is up and can be reached from this host, then run again",
                ) from None
            wait = min(2 * wait, rules.longest_wait_s)


def store_of(uri: Uri) -> tuple[Any, str]:
    """The pyarrow.fs.FileSystem of a URI, and the path in it; kept, so that connections are used again.

    Asks the network only for the region of an S3 bucket, where neither the URI nor the environment names one
    and there is no endpoint_override (or AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL).
    """
    rules = RULES
    try:
        bucket = uri.authority if uri.scheme == "s3" else ""
        options = dict(uri.query)
        if uri.scheme == "s3":
            options = _s3_options(options, bucket, rules)
        authority = "" if uri.scheme == "s3" else uri.authority
        system, root = _opened(uri.scheme, authority, tuple(sorted(options.items())), rules, os.getpid())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise SettingsError(f"is no URI of this store: {_said(error)}", str(uri), "check how it is written") from None
    except OSError as error:
        final = _final(error, str(uri))
        raise final or ImageReadError(
            f"cannot be opened: {_said(error)}", str(uri), "see that the store can be reached from this host"
        ) from None
    return system, f"{bucket or root.rstrip('/')}/{uri.path}"


def _s3_options(query: dict[str, str], bucket: str, rules: Rules) -> dict[str, str]:
    options = dict(query)
    # pyarrow's own constructor does not look at these (Arrow issue 49643).
    endpoint = options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3", "")
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL", "")
    if endpoint:
        scheme, separator, host = endpoint.rpartition("://")
        options["endpoint_override"] = host.rstrip("/")
        options["scheme"] = options.get("scheme") or (scheme if separator else "https")
        options.setdefault(
            "region", os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        )
    elif "region" not in options:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or _region(bucket, rules)
        options["region"] = region
    return options


@functools.lru_cache(maxsize=64)
def _region(bucket: str, rules: Rules) -> str:
    from pyarrow import fs

    def ask(_: int) -> str:
        return str(fs.resolve_s3_region(bucket))

    return patiently(ask, f"s3://{bucket}", rules)


@functools.lru_cache(maxsize=16)
def _opened(
    scheme: str, authority: str, options: tuple[tuple[str, str], ...], rules: Rules, process: int
) -> tuple[Any, str]:
    """A file system and the path of its root. process: one that is forked opens its own."""
    from pyarrow import fs  # here, and not above: its import costs 10 ms of every start

    _leave_cleanly()
    if scheme == "s3":
        return fs.S3FileSystem(
            **dict(options),
            connect_timeout=rules.connect_s,
            request_timeout=rules.stall_s,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),  # patiently() tries again
            background_writes=False,
        ), ""
    asked = dict(options)
    if scheme == "gs":  # its client tries again by itself, for 15 minutes unless told
        asked.setdefault("retry_limit_seconds", f"{rules.stall_s:g}")
    query = "&".join(f"{key}={value}" for key, value in asked.items())
    system, root = fs.FileSystem.from_uri(f"{scheme}://{authority}/" + (f"?{query}" if query else ""))
    return system, str(root)


@functools.cache
def _leave_cleanly() -> None:
    """Let the file systems go before pyarrow, at exit, ends the AWS SDK below them: else it may crash."""
    atexit.register(_opened.cache_clear)


class StoredFile:
    """An object, open for reading. path: its URI; nbytes; fingerprint: size and ETag, or time where there is none."""

    unpacked = 0

    def __init__(self, uri: str) -> None:
        self.path = uri
        self._rules = RULES
        self._store, self._name = store_of(parse_uri(uri))
        self._lock = Lock()
        self._handle = patiently(lambda _: self._store.open_input_file(self._name), uri, self._rules)
        self.nbytes = self.disk_nbytes = int(self._handle.size())
        self.fingerprint = self._fingerprint(self._handle)

    def close(self) -> None:
        """Let it go."""
        self._handle.close()

    def data_extents(self) -> np.ndarray:
        """Byte ranges that are not holes: int64[n, 2]. A store knows of no holes."""
        return np.array([(0, self.nbytes)] if self.nbytes else [], np.int64).reshape(-1, 2)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes from `offset` on: `nbytes`, or as many as there are."""
        return self.read_exactly(offset, max(0, min(nbytes, self.nbytes - offset)))

    def read_exactly(self, offset: int, nbytes: int, stop: Event | None = None) -> bytes:
        """Bytes [offset, offset + nbytes), which the object has. stop: as patiently() has it."""

        def attempt(tries: int) -> bytes:
            if tries:  # an answer to a range says less than one to the object: gone, denied, another
                self.check()
            data: bytes = self._handle.read_at(nbytes, offset)
            if len(data) != nbytes:
                raise OSError(f"the store gave {len(data)} bytes")
            return data

        if nbytes == 0:
            return b""
        return patiently(attempt, f"{self.path} bytes {offset} to {offset + nbytes}", self._rules, stop)

    def read_spans(self, spans: Sequence[tuple[int, int]], stop: Event | None = None) -> list[pa.Buffer]:
        """A buffer for each (offset, nbytes); near ones come in one request, and none is over a block by much."""
        found = [pa.py_buffer(b"")] * len(spans)
        order = sorted((i for i in range(len(spans)) if spans[i][1]), key=lambda i: spans[i])
        at = 0
        while at < len(order):
            first = spans[order[at]][0] // _ALIGN * _ALIGN
            end, last = sum(spans[order[at]]), at + 1
            while last < len(order):
                offset, nbytes = spans[order[last]]
                if offset > end + _GAP_BYTES or max(end, offset + nbytes) - first > 2 * self._rules.block_bytes:
                    break
                end, last = max(end, offset + nbytes), last + 1
            data = pa.py_buffer(self.read_exactly(first, end - first, stop))
            for i in order[at:last]:
                found[i] = data.slice(spans[i][0] - first, spans[i][1])
            at = last
        return found

    def check(self) -> None:
        """Raises ImageError if the object is not the one that was opened; one small request."""
        handle = self._store.open_input_file(self._name)
        try:
            if self._fingerprint(handle) != self.fingerprint:
                raise ImageError("changed while it was scanned", self.path, "scan a copy, or stop what writes to it")
        finally:
            handle.close()

    def checked(self) -> None:
        """check(), with patience: after the pages of a shard, since ranges of two versions would fit together."""
        patiently(lambda _: self.check(), self.path, self._rules)

    def in_order(self, tasks: Iterable[Callable[[Event], T]], in_flight: int | None = None) -> Iterator[T]:
        """The results of tasks that read this file, in order; see in_order()."""
        return in_order(tasks, in_flight or self._rules.in_flight)

    @property
    def block_bytes(self) -> int:
        """Most bytes to ask for at once."""
        return self._rules.block_bytes

    def _fingerprint(self, handle: Any) -> str:
        mark = ""
        with suppress(pa.ArrowNotImplementedError, AttributeError):  # a store that has none
            tags = [value for key, value in handle.metadata().items() if key in ("ETag", "etag", b"ETag", b"etag")]
            mark = tags[0].decode().strip('"') if tags else ""
        if not mark:
            mark = str(self._store.get_file_info(self._name).mtime_ns)
        return f"{int(handle.size())}-{mark}"


def in_order(tasks: Iterable[Callable[[Event], T]], in_flight: int) -> Iterator[T]:
    """The results of tasks, in order, `in_flight` of them running while the one before is used.

    Each gets an event that is set when nobody wants its result any more.
    """
    from concurrent.futures import Future, ThreadPoolExecutor

    stop = Event()
    pool = ThreadPoolExecutor(in_flight, thread_name_prefix="ksmdist-store")
    running: deque[Future[T]] = deque()
    left = iter(tasks)
    try:
        running.extend(pool.submit(task, stop) for task in islice(left, in_flight))
        while running:
            result = running.popleft().result()
            running.extend(pool.submit(task, stop) for task in islice(left, 1))
            yield result
            del result  # before the next is waited for
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
