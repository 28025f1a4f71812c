from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from ksmdist.columns import arrow, joined, present, strings, values
from ksmdist.groups import group_min, group_starts, group_sum, order_by

# Values that agree in most of their bits make the order's slow path run; even ones its fast path.
WORDS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1)), max_size=60)


@given(WORDS)
def test_the_order_is_that_of_a_stable_sort(words: list[int]) -> None:
    first = np.array(words, np.uint64)
    second = np.array([word % 3 for word in words[::-1]], np.int16)
    expected = sorted(range(len(words)), key=lambda row: (first[row], second[row]))
    assert order_by(first, second).tolist() == expected


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 100)), min_size=1, max_size=60))
def test_groups_are_those_of_a_dict(rows: list[tuple[int, int]]) -> None:
    rows = sorted(rows)
    groups: dict[int, list[int]] = {}
    for key, value in rows:
        groups.setdefault(key, []).append(value)
    keys, column = np.array([key for key, _ in rows]), np.array([value for _, value in rows])
    starts = group_starts(keys)
    assert keys[starts].tolist() == list(groups)
    assert group_sum(column, starts).tolist() == [sum(group) for group in groups.values()]
    assert group_min(column, starts).tolist() == [min(group) for group in groups.values()]


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 40), st.integers(0, 40))
def test_columns_go_to_arrow_and_back(null: list[bool], start: int, end: int) -> None:
    n = len(null)
    mask = np.array(null, bool)
    for column in (
        np.arange(n, dtype=np.int16),
        np.arange(n, dtype=np.uint64),
        np.arange(n) % 3 == 0,
        np.arange(n * 16, dtype=np.uint8).reshape(n, 16),
    ):
        array = arrow(column, null=mask).slice(start, end)
        array.validate(full=True)
        assert present(array).tolist() == (~mask[start : start + end]).tolist()
        assert np.array_equal(values(array), column[start : start + end])
        assert array.null_count == int(mask[start : start + end].sum())


def test_strings_and_joined_columns() -> None:
    index = np.array([2, 0, 0, 1])
    assert strings(["a", "", "größe"], index).to_pylist() == ["größe", "a", "a", ""]
    tables = [pa.table({"x": [1, 2]}), pa.concat_tables([pa.table({"x": [3]}), pa.table({"x": [4]})])]
    assert joined(tables, "x").tolist() == [1, 2, 3, 4]
