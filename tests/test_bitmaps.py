"""Sets of pages, against Python sets."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmdist.images.bitmaps import PageBitmap


@settings(max_examples=100, deadline=None)
@given(
    st.sets(st.integers(0, 5000) | st.integers(1 << 33, (1 << 33) + 3000) | st.integers(1020, 1030), max_size=200),
    st.booleans(),
    st.integers(0, 6000) | st.integers(1 << 33, (1 << 33) + 3000),
)
def test_a_set_of_pages(numbers: set[int], full: bool, border: int) -> None:
    if full:
        numbers |= set(range(2048, 4096))
    ordered = sorted(numbers)
    found = bitmap_of(numbers)
    assert len(found) == len(ordered)
    assert found.end == (ordered[-1] + 1 if ordered else 0)
    assert found.pages(np.arange(len(ordered))).tolist() == ordered
    assert found.pages(np.arange(0, len(ordered), 3)).tolist() == ordered[::3]
    asked = np.array(
        sorted({0, 1023, 1024, 5001, 1 << 40, border, *(n + d for n in ordered for d in (0, 1))}), np.int64
    )
    assert found.has(asked).tolist() == [n in numbers for n in asked.tolist()]
    assert found.rank(asked).tolist() == [bisect_left(ordered, n) for n in asked.tolist()]
    ranges = [n for low, high in found.ranges().tolist() for n in range(low, high)]
    assert ranges == ordered
    assert found.below(border) == bitmap_of({n for n in numbers if n < border})
    assert found.from_page(border) == bitmap_of({n for n in numbers if n >= border})
    assert found.below(border).joined(found.from_page(border)) == found


def bitmap_of(numbers: set[int]) -> PageBitmap:
    chunks = []
    for at in sorted({n >> 13 for n in numbers}):
        bits = np.zeros(1 << 13, np.uint8)
        bits[[n & 0x1FFF for n in numbers if n >> 13 == at]] = 1
        chunks.append((at << 10, np.packbits(bits, bitorder="little").tobytes()))
    return PageBitmap.of(chunks)
