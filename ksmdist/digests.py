"""Page bytes -> digests: xxh3_128 for each page, and the word of those filled with one word.

The digest is XXH3 128 bit (xxhash specification 0.2.0), in the canonical big-endian form, with the seed that the site
key gives (keys.py). A digest match is a claim, not a proof: at 10**9 pages the odds of any accidental match are about
10**18 / 2**129 = 1.5e-21. A seeded XXH3 is no MAC: who finds its seed can make matches, so that confirm.py checks
what turned out shared.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import mmh3
import numpy as np
import pyarrow as pa
import xxhash

from ksmdist.columns import arrow, codes, present, values
from ksmdist.tables import PAGE, PAGE_FLAGS

__all__ = ["Digester", "checksum_pages", "content_rows", "digest_pages"]

_page_digest: Callable[..., bytes] = xxhash.xxh3_128_digest
_page_witness: Callable[..., bytes] = mmh3.mmh3_x64_128_digest


@dataclass(frozen=True, slots=True)
class Digester:
    """How the contents of this run's pages are named.

    seed:         of xxh3_128, 64 bits; witness_seed: of mmh3_x64_128, 32 bits. Neither is ever shown
    collided:     digests that several contents have: pages with one keep its first half, and get 64 bits of BLAKE2b
                  (RFC 7693) for its second
    """

    seed: int = field(default=0, repr=False)
    witness_seed: int = field(default=0, repr=False)
    collided: frozenset[bytes] = field(default=frozenset(), repr=False)

    def digest(self, rows: np.ndarray, which: np.ndarray | None = None, zero: bytes | None = None) -> np.ndarray:
        """Pages, uint8[n, page_size] -> the digests, uint8[m, 16], of those which, bool[n], marks, or of all.

        zero: digest of the zero page, which none of these is: a page that has it all the same gets another.
        """
        # map over the rows of one array: 260 ns a 4 KiB page; a memoryview slice for each costs 240 more.
        chosen = rows if which is None or which.all() else itertools.compress(rows, which.tobytes())
        found = np.frombuffer(b"".join(map(_page_digest, chosen, itertools.repeat(self.seed))), np.uint8)
        digest = found.reshape(-1, 16)
        taken = self.collided
        if zero is not None and (digest.view("V16") == np.void(zero)).any():
            taken |= {zero}
        if not taken:
            return digest
        return self._told_apart(digest, rows, np.arange(len(rows)) if which is None else np.flatnonzero(which), taken)

    def of_word(self, word: int, page_size: int) -> bytes:
        """Digest of a page filled with one little-endian 64-bit word; 0 gives the zero page's."""
        page = np.full((1, page_size // 8), word, "<u8").view(np.uint8)
        return self.digest(page).tobytes()

    def witness(self, rows: np.ndarray) -> np.ndarray:
        """Pages, uint8[n, page_size] -> uint8[n, 16]: mmh3_x64_128, which knows nothing of xxh3_128."""
        found = b"".join(map(_page_witness, rows, itertools.repeat(self.witness_seed)))
        return np.frombuffer(found, np.uint8).reshape(-1, 16)

    def _told_apart(
        self, digest: np.ndarray, rows: np.ndarray, places: np.ndarray, taken: frozenset[bytes]
    ) -> np.ndarray:
        """The digests, those that are taken replaced: again, should the new one be taken too."""
        told = digest.copy()
        several = np.frombuffer(b"".join(sorted(taken)), "V16")
        for row in np.flatnonzero(np.isin(np.ascontiguousarray(digest).view("V16")[:, 0], several)).tolist():
            name = digest[row].tobytes()
            for turn in itertools.count():
                if name not in taken:
                    break
                hashed = hashlib.blake2b(
                    rows[places[row]].tobytes(),
                    digest_size=8,
                    key=self.seed.to_bytes(8, "big"),
                    salt=turn.to_bytes(8, "big"),
                )
                name = name[:8] + hashed.digest()
            told[row] = np.frombuffer(name, np.uint8)
        return told


def checksum_pages(batch: pa.RecordBatch, page_size: int) -> np.ndarray:
    """A `memory_image` batch -> uint32[n]: each page's checksum as ksmd computes it, 0 where it has no bytes.

    mm/ksm.c, calc_checksum ("ksm: replace jhash2 with xxhash", Linux 5.0): the low 32 bits of
    xxhash(page, PAGE_SIZE, 0), which is xxh64 on 64-bit.
    """
    content = batch.column("content")
    rows = content_rows(content, page_size)
    checksum = np.zeros(len(batch), np.uint32)
    checksum[present(content)] = np.fromiter(map(xxhash.xxh64_intdigest, rows), np.uint64, len(rows)).astype(np.uint32)
    return checksum


def digest_pages(batch: pa.RecordBatch, page_size: int, digester: Digester) -> pa.RecordBatch:
    """A `memory_image` batch -> a `page` batch, row for row.

    Every non-null content must be page_size bytes long, every null one 0 (the readers check it).
    """
    content = batch.column("content")
    rows = content_rows(content, page_size)
    at, word = _fill_words(rows)
    n = len(batch)
    hashed = np.ones(len(rows), bool)
    hashed[at[word == 0]] = False
    zero = digester.of_word(0, page_size)
    found = np.tile(np.frombuffer(zero, np.uint8), (len(rows), 1))
    found[hashed] = digester.digest(rows, hashed, zero)
    if content.null_count == 0:
        digest = arrow(found)
    else:
        valid = present(content)
        spread = np.zeros((n, 16), np.uint8)
        spread[valid] = found
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


def content_rows(content: pa.Array, page_size: int) -> np.ndarray:
    """The non-null contents of a `memory_image` batch as uint8[n, page_size], with no copy."""
    count = len(content) - content.null_count
    if count == 0:
        return np.zeros((0, page_size), np.uint8)
    _, offsets, data = content.buffers()
    first = int(np.frombuffer(offsets, np.int32)[content.offset])
    return np.frombuffer(data, np.uint8, count * page_size, first).reshape(count, page_size)


def _fill_words(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows repeat one word (int64 indices, ascending) and that word (uint64): by their bytes, not by a digest.

    A look at five words rules out nearly all others; what is left is compared in full.
    """
    words = rows.view("<u8")
    # The first two words share a cache line; only pages that repeat there are looked at elsewhere.
    head = rows.view("V16")[:, 0].copy().view("<u8").reshape(-1, 2)
    candidates = np.flatnonzero(head[:, 0] == head[:, 1])
    first = head[candidates, 0]
    for column in (words.shape[1] // 3, words.shape[1] // 2, words.shape[1] - 1):
        like = words[candidates, column] == first
        candidates, first = candidates[like], first[like]
    same = np.zeros(len(candidates), bool)
    for at in range(0, len(candidates), 64):  # 256 KiB at a time, which stay in the cache: the rows are copied
        some = slice(at, at + 64)
        block = words[candidates[some]]
        if first[some].any():
            block ^= first[some, None]
        same[some] = np.bitwise_or.reduce(block, axis=1) == 0
    return candidates[same], first[same].astype(np.uint64)
