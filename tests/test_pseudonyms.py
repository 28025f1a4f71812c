"""Numbers in the place of names, orders that tell nothing, and what is left of a region's name."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmdist.pseudonyms import numbered, random_order, region_class
from ksmdist.tables.published import REGION_CLASSES


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("/home/alice/secret.db (deleted)", "file"),
        ("/[heap]", "file"),
        ("[heap]", "heap"),
        ("[stack]", "stack"),
        ("[stack:1234]", "stack"),
        ("[anon]", "anonymous"),
        ("", "anonymous"),
        ("[anon:v8 secret]", "anonymous"),
        ("[anon_shmem:x]", "shared"),
        ("/memfd:x (deleted)", "shared"),
        ("/dev/shm/x", "shared"),
        ("/SYSV0000002a (deleted)", "shared"),
        ("/dev/zero (deleted)", "shared"),
        ("/dev/zeros", "shared"),
        ("[vdso]", "kernel"),
        ("[vvar]", "kernel"),
        ("/[aio] (deleted)", "kernel"),
        ("anon_inode:kvm-vcpu:0", "other"),
        ("[heap", "other"),
    ],
)
def test_a_regions_class(name: str, wanted: str) -> None:
    assert region_class(name) == wanted


@settings(deadline=None)
@given(st.text(max_size=40))
def test_a_class_is_all_that_is_left_of_a_name(name: str) -> None:
    assert region_class(name) in REGION_CLASSES


_texts = st.text(min_size=1, max_size=12)


@settings(deadline=None)
@given(st.sets(_texts, min_size=1, max_size=20), st.binary(min_size=32, max_size=32), st.data())
def test_numbers_of_names(names: set[str], seed: bytes, data: st.DataObject) -> None:
    known_names = data.draw(st.sets(st.sampled_from(sorted(names))))
    known = numbered(known_names, {}, seed, "images")
    every = numbered(names, known, seed, "images")
    assert every.keys() == names
    assert sorted(every.values()) == list(range(1, len(names) + 1))
    assert all(every[name] == number for name, number in known.items())


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(0, 50))
def test_an_order_is_of_all_numbers(seed: bytes, n: int) -> None:
    order = random_order(seed, "x", n)
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == random_order(seed, "x", n).tolist()


def test_orders_of_other_seeds_and_things_differ() -> None:
    orders = [random_order(bytes([a]) * 32, b, 100).tolist() for a in range(3) for b in ("images", "hosts")]
    assert len({tuple(order) for order in orders}) == len(orders)
    means = np.mean([random_order(bytes([n]) * 32, "x", 200) for n in range(200)], axis=0)
    assert abs(means - 99.5).max() < 25  # 6 standard deviations: no place is drawn to any number
