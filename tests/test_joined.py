"""Pages from anywhere in files lie back to back, whether they were mapped or copied."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ksmdist.images.joined import Stretch, join_pages

from .conftest import PAGE

CONTENT = np.random.default_rng(4).bytes(300 * PAGE)
# (offset in the file, pages), or (-1 - byte, pages): lengths at which a stretch is copied and at which it is mapped
STRETCHES = st.lists(
    st.tuples(
        st.one_of(
            st.integers(0, 100).map(lambda n: n * PAGE), st.integers(0, 100 * PAGE), st.sampled_from([-1, -2, -256])
        ),
        st.sampled_from([1, 2, 15, 16, 17, 40]),
    ),
    min_size=1,
    max_size=8,
)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> int:
    path = tmp_path_factory.mktemp("joined") / "content"
    path.write_bytes(CONTENT)
    return os.open(path, os.O_RDONLY)


def _stretch(fd: int, offset: int, pages: int) -> Stretch:
    return Stretch(fd, offset, pages * PAGE) if offset >= 0 else Stretch(-1, -1 - offset, pages * PAGE)


@settings(max_examples=200, deadline=None)
@given(STRETCHES)
def test_stretches_lie_end_to_end(content: int, stretches: list[tuple[int, int]]) -> None:
    data, readable = join_pages([_stretch(content, *stretch) for stretch in stretches], PAGE)
    expected = b"".join(
        CONTENT[offset : offset + pages * PAGE] if offset >= 0 else bytes([-1 - offset]) * (pages * PAGE)
        for offset, pages in stretches
    )
    assert bytes(data) == expected
    assert readable.all()
    assert data.readonly


@settings(max_examples=60, deadline=None)
@example([(0, 16)], 16 * PAGE - 100)
@given(STRETCHES, st.integers(0, 300 * PAGE))
def test_what_the_file_has_no_more_is_said(
    tmp_path_factory: pytest.TempPathFactory, stretches: list[tuple[int, int]], size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "joined-cut"
    path.write_bytes(CONTENT[:size])
    with open(path, "rb") as file:
        data, readable = join_pages([_stretch(file.fileno(), *stretch) for stretch in stretches], PAGE)
    starts = [(offset + n * PAGE if offset >= 0 else offset) for offset, pages in stretches for n in range(pages)]
    assert readable.tolist() == [start < 0 or start + PAGE <= size for start in starts]
    for number in np.flatnonzero(readable).tolist():
        start = starts[number]
        expected = CONTENT[start : start + PAGE] if start >= 0 else bytes([-1 - start]) * PAGE
        assert data[number * PAGE : (number + 1) * PAGE] == expected


def test_a_page_of_pieces(content: int) -> None:
    pieces = [Stretch(content, 5, 1000), Stretch(content, 90 * PAGE, PAGE - 1000), Stretch(content, 0, 40 * PAGE)]
    data, readable = join_pages(pieces, PAGE)
    assert bytes(data) == CONTENT[5:1005] + CONTENT[90 * PAGE : 91 * PAGE - 1000] + CONTENT[: 40 * PAGE]
    assert readable.tolist() == [True] * 41
