"""Changes that get past a format's magic: numbers of its headers, pieces cut, doubled and swapped."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

from fuzz.targets import Target

_SMALL = (0, 1, 2, 3, 7, 8, 511, 512, 4095, 4096, 4097)
INTERESTING = (*_SMALL, *((1 << bit) + by for bit in (31, 32, 52, 63) for by in (-1, 0, 1)))


def mutated(
    target: Target, magics: list[bytes], data: bytes, rng: random.Random, plain: Callable[[bytes], bytes]
) -> bytes:
    """An input changed in one to four places: words of headers, pieces cut, doubled or swapped; or as `plain` does.

    magics: first target.keep bytes of images; of twenty that lose theirs, nineteen are given one again.
    """
    files = target.unpack(data)
    number = rng.randrange(len(files)) if rng.random() < 0.7 else 0
    changed = bytearray(files[number])
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        change = rng.choices((_word, _cut, _double, _swap, None), (12, 2, 1, 1, 4))[0]
        if change is None:
            changed = bytearray(plain(bytes(changed)))
        elif changed:
            change(changed, rng)
    files[number] = bytes(changed)
    if files[0][: target.keep] not in magics and rng.random() < 0.95:
        files[0] = rng.choice(magics) + files[0][target.keep :]
    return target.pack(files)


def _place(data: bytearray, rng: random.Random) -> int:
    """A byte, mostly where structures are: in front, at the start of a block, at the end."""
    kind = rng.random()
    if kind < 0.4:
        at = rng.randrange(1024)
    elif kind < 0.7:
        at = rng.randrange(0, len(data), 4096) + rng.randrange(128)
    elif kind < 0.8:
        at = len(data) - 1 - rng.randrange(256)
    else:
        at = rng.randrange(len(data))
    return at % len(data)


def _word(data: bytearray, rng: random.Random) -> None:
    """Set a number, of 1, 2, 4 or 8 bytes and either byte order, to one that readers may get wrong."""
    nbytes = rng.choice((1, 2, 4, 4, 8, 8))
    order: Literal["little", "big"] = rng.choice(("little", "little", "big"))
    at = _place(data, rng)
    at -= at % (nbytes if rng.random() < 0.8 else 1)
    old = int.from_bytes(data[at : at + nbytes], order)
    near = (old - 1, old + 1, old + 8, old * 2, old // 2, old + 4096, old - 4096, -old, ~old)
    there = _place(data, rng)
    value = rng.choice(
        (
            rng.choice(INTERESTING),
            rng.choice(near),
            -rng.choice(INTERESTING),
            len(data) + rng.choice((-4096, -1, 0, 1, 4096)),
            int.from_bytes(data[there : there + nbytes], order),
        )
    )
    data[at : at + nbytes] = (value % (1 << 8 * nbytes)).to_bytes(nbytes, order)


def _piece(data: bytearray, rng: random.Random) -> tuple[int, int]:
    at = _place(data, rng)
    return at, min(len(data), at + rng.choice((1, 4, 8, 12, 16, 24, 32, 56, 512, 4096)))


def _cut(data: bytearray, rng: random.Random) -> None:
    """Leave the end out, or a piece."""
    if rng.random() < 0.5:
        del data[_place(data, rng) :]
    else:
        start, end = _piece(data, rng)
        del data[start:end]


def _double(data: bytearray, rng: random.Random) -> None:
    """Put a piece in a second time, after itself or over something else."""
    start, end = _piece(data, rng)
    piece = data[start:end]
    at = end if rng.random() < 0.5 else _place(data, rng)
    data[at : at if rng.random() < 0.5 else at + len(piece)] = piece


def _swap(data: bytearray, rng: random.Random) -> None:
    """Two pieces change places."""
    start, end = _piece(data, rng)
    nbytes = end - start
    other = _place(data, rng)
    if abs(other - start) >= nbytes and other + nbytes <= len(data):
        data[start:end], data[other : other + nbytes] = data[other : other + nbytes], data[start:end]
