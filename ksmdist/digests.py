"""Page bytes -> digests: xxh3_128 for each page, and the word of those filled with one word.

The digest is XXH3 128 bit, seed 0, in the canonical big-endian form (xxhash specification 0.2.0).
A digest match is a claim, not a proof: at 10**9 pages the odds of any accidental match are about
10**18 / 2**129 = 1.5e-21. A digest without a key can be forged by who chooses page contents.
"""

from __future__ import annotations

import functools

import numpy as np
import pyarrow as pa
import xxhash

from ksmdist.columns import arrow, codes, present, values
from ksmdist.tables import PAGE, PAGE_FLAGS

__all__ = ["checksum_pages", "digest_pages", "fill_digest", "hash_rows"]


@functools.cache
def fill_digest(word: int, page_size: int) -> bytes:
    """Digest of a page filled with one little-endian 64-bit word; 0 gives the zero page's."""
    return xxhash.xxh3_128_digest(word.to_bytes(8, "little") * (page_size // 8))


def hash_rows(rows: np.ndarray) -> np.ndarray:
    """Pages, uint8[n, page_size] -> their digests, uint8[n, 16]."""
    return np.frombuffer(b"".join(map(xxhash.xxh3_128_digest, rows)), np.uint8).reshape(-1, 16)


def checksum_pages(batch: pa.RecordBatch, page_size: int) -> np.ndarray:
    """A `memory_image` batch -> uint32[n]: each page's checksum as ksmd computes it, 0 where it has no bytes.

    mm/ksm.c, calc_checksum ("ksm: replace jhash2 with xxhash", Linux 5.0): the low 32 bits of
    xxhash(page, PAGE_SIZE, 0), which is xxh64 on 64-bit.
    """
    content = batch.column("content")
    rows = _rows(content, page_size)
    checksum = np.zeros(len(batch), np.uint32)
    checksum[present(content)] = np.fromiter(map(xxhash.xxh64_intdigest, rows), np.uint64, len(rows)).astype(np.uint32)
    return checksum


def digest_pages(batch: pa.RecordBatch, page_size: int) -> pa.RecordBatch:
    """A `memory_image` batch -> a `page` batch, row for row.

    Every non-null content must be page_size bytes long, every null one 0 (the readers check it).
    """
    content = batch.column("content")
    rows = _rows(content, page_size)
    # map over the rows of one array: 210 ns a 4 KiB page; a memoryview slice for each costs 450.
    joined = b"".join(map(xxhash.xxh3_128_digest, rows))
    at, word = _fill_words(rows, joined, page_size)
    n = len(batch)
    if content.null_count == 0:
        digest = arrow(np.frombuffer(joined, np.uint8).reshape(-1, 16))
    else:
        valid = present(content)
        spread = np.zeros((n, 16), np.uint8)
        spread[valid] = np.frombuffer(joined, np.uint8).reshape(-1, 16)
        digest = arrow(spread, null=~valid)
        at = np.flatnonzero(valid)[at]
    words = np.zeros(n, np.uint64)
    words[at] = word
    other = np.ones(n, bool)
    other[at] = False
    columns = [
        batch.column("address"),
        batch.column("flags"),
        batch.column("numa_node"),
        _shared_frame(batch),
        arrow(codes(batch.column("region"))),
        digest,
        arrow(words, null=other),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=PAGE.schema)


def _shared_frame(batch: pa.RecordBatch) -> pa.Array:
    """The frames that other page table entries may map too: not exclusive ones, nor KSM pages'."""
    frame = batch.column("frame")
    if frame.null_count == len(frame):
        return frame
    own = values(batch.column("flags")) & np.uint32(PAGE_FLAGS["exclusive"] | PAGE_FLAGS["ksm"])
    return arrow(values(frame), null=(own != 0) | ~present(frame))


def _rows(content: pa.Array, page_size: int) -> np.ndarray:
    """The non-null contents as uint8[n, page_size], with no copy."""
    count = len(content) - content.null_count
    if count == 0:
        return np.zeros((0, page_size), np.uint8)
    _, offsets, data = content.buffers()
    first = int(np.frombuffer(offsets, np.int32)[content.offset])
    return np.frombuffer(data, np.uint8, count * page_size, first).reshape(count, page_size)


def _fill_words(rows: np.ndarray, joined: bytes, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows repeat one word (int64 indices, in no order) and that word (uint64).

    Zero pages are known by digest. A look at five words rules out nearly all others; what is left,
    a few pages in real images, is compared in full.
    """
    digest = np.frombuffer(joined, np.uint64).reshape(-1, 2)
    zero = (digest == np.frombuffer(fill_digest(0, page_size), np.uint64)).all(axis=1)
    candidates = np.flatnonzero(~zero)
    # The first two words share a cache line; only pages that repeat there are looked at elsewhere.
    head = rows.view("V16")[candidates, 0].view("<u8").reshape(-1, 2)
    like = head[:, 0] == head[:, 1]
    candidates, first = candidates[like], head[like, 0]
    words = rows.view("<u8")
    for column in (words.shape[1] // 3, words.shape[1] // 2, words.shape[1] - 1):
        like = words[candidates, column] == first
        candidates, first = candidates[like], first[like]
    same = np.zeros(len(candidates), bool)
    for at in range(0, len(candidates), 256):  # 1 MiB at a time: the rows are copied
        some = slice(at, at + 256)
        same[some] = (words[candidates[some]] == first[some, None]).all(axis=1)
    zeros = np.flatnonzero(zero)
    word = np.concatenate((np.zeros(len(zeros), np.uint64), first[same].astype(np.uint64)))
    return np.concatenate((zeros, candidates[same])), word
