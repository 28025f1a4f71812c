"""The kernel's counters from a spectrum: against figures measured on a kernel, and against brute force."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmdist.counters import Counters, predict
from ksmdist.settings import Settings
from ksmdist.sharing import Pattern, Sharing
from ksmdist.tables import IMAGES, KINDS
from ksmdist.tree import ALL_NODES

# max_page_sharing, copies -> shared, sharing, unshared, chains, dups; measured on Linux 6.12
MEASURED = [
    (2, 3, 1, 1, 1, 0, 0),
    (2, 4, 2, 2, 0, 1, 2),
    (3, 7, 2, 4, 1, 1, 2),
    (3, 8, 3, 5, 0, 1, 3),
    (10, 11, 1, 9, 1, 0, 0),
    (256, 256, 1, 255, 0, 0, 0),
    (256, 257, 1, 255, 1, 0, 0),
    (256, 258, 2, 256, 0, 1, 2),
    (256, 513, 2, 510, 1, 1, 2),
    (256, 514, 3, 511, 0, 1, 3),
]


def shares(rows: list[tuple[int, str, int, int]]) -> Sharing:
    """One image whose contents have these (numa_node, kind, copies, contents), in frames of their own."""
    spectrum = [(node, KINDS.index(kind), copies, copies, contents) for node, kind, copies, contents in rows]
    by_image = [(n, 0, copies, 0, copies, -1, contents) for n, kind, copies, contents in rows if kind != "zero"]
    zero = [
        Pattern(KINDS.index("zero"), contents, np.array([[0, -1, max(node, 0), 0, -1, copies]]))
        for node, kind, copies, contents in rows
        if kind == "zero"
    ]
    pages = {"zero": 0, "unique": 0} | {
        name: sum(row[2] * row[3] for row in rows if (row[1] == "zero") == (name == "zero") and row[0] == ALL_NODES)
        for name in ("zero", "unique")
    }
    texts = dict.fromkeys(("image_id", "kind", "format", "producer", "filter_level", "host", "tenant"), "")
    row = {name: pages.get(name, texts.get(name, 0)) for name in IMAGES.schema.names}
    images = pa.Table.from_pylist([row], schema=IMAGES.schema)
    return Sharing(images, (), _matrix(spectrum, 5), _matrix(by_image, 7), _matrix((), 5), tuple(zero))


def _matrix(rows: Sequence[tuple[int, ...]], width: int) -> np.ndarray:
    return np.array(rows, np.int64).reshape(-1, width)


def ksm_counters(of: Sharing, settings: Settings) -> Counters:
    return predict(of, settings).counters


@pytest.mark.parametrize(("limit", "copies", "shared", "sharing", "unshared", "chains", "dups"), MEASURED)
def test_what_a_kernel_showed(
    limit: int, copies: int, shared: int, sharing: int, unshared: int, chains: int, dups: int
) -> None:
    got = ksm_counters(shares([(ALL_NODES, "other", copies, 1)]), Settings(max_page_sharing=limit))
    assert (got.pages_shared, got.pages_sharing, got.pages_unshared) == (shared, sharing, unshared)
    assert (got.stable_node_chains, got.stable_node_dups) == (chains, dups)


def _by_hand(copies: int, limit: int) -> tuple[int, int, int]:
    """Put pages one by one as ksmd does: nodes' lengths, and the page waiting in the unstable tree."""
    nodes: list[int] = []
    waiting = 0
    for _ in range(copies):
        free = next((i for i, length in enumerate(nodes) if length < limit), None)
        if free is not None:
            nodes[free] += 1
        elif waiting:
            nodes.append(2)
            waiting = 0
        else:
            waiting = 1
    return len(nodes), sum(nodes) - len(nodes), waiting


@given(st.integers(1, 400), st.integers(2, 20))
def test_the_closed_form_is_the_procedure(copies: int, limit: int) -> None:
    got = ksm_counters(shares([(ALL_NODES, "other", copies, 3)]), Settings(max_page_sharing=limit))
    one = _by_hand(copies, limit)
    assert (got.pages_shared, got.pages_sharing, got.pages_unshared) == tuple(3 * n for n in one)


def test_zero_pages_by_setting() -> None:
    table = shares([(ALL_NODES, "zero", 100, 1), (ALL_NODES, "other", 1, 10)])
    on = ksm_counters(table, Settings(use_zero_pages=True))
    assert (on.ksm_zero_pages, on.pages_shared, on.rmap_items, on.general_profit) == (100, 0, 10, 408960)
    off = ksm_counters(table, Settings())
    assert (off.ksm_zero_pages, off.pages_shared, off.pages_sharing, off.rmap_items) == (0, 1, 99, 110)
    assert (on.zero_merges, on.saved_bytes) == (100, 100 * 4096)
    assert (off.zero_merges, off.saved_bytes) == (100, 99 * 4096)


def test_nodes_apart() -> None:
    table = shares([(ALL_NODES, "other", 50, 1), (0, "other", 25, 1), (1, "other", 25, 1)])
    apart = ksm_counters(table, Settings(max_page_sharing=10, merge_across_nodes=False))
    assert (apart.pages_shared, apart.pages_sharing) == (6, 44)
    assert (apart.stable_node_chains, apart.stable_node_dups) == (2, 6)


def test_a_loss_keeps_its_sign() -> None:
    assert ksm_counters(shares([(ALL_NODES, "other", 1, 1000)]), Settings()).general_profit == -64000
