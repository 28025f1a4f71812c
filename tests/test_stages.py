"""The pure stages against a dict, with every flag and several NUMA nodes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmdist import classes, digests, tree
from ksmdist.settings import Eligible, Settings
from ksmdist.tables import CLASSES, KINDS, MEMORY_IMAGE, PAGE_FLAGS

from .conftest import DIGESTER, PAGE, digest, page

CONTENTS = (bytes(PAGE), b"\x6b" * PAGE, bytes(PAGE - 1) + b"\1", page(1), page(2))
NAMES = ("a", "b")
NO_REGIONS = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Row:
    """A page: an index into CONTENTS or None, names of flags, a node."""

    content: int | None
    flags: frozenset[str]
    node: int


ROWS = st.lists(
    st.builds(
        Row,
        st.one_of(st.none(), st.integers(0, len(CONTENTS) - 1)),
        st.frozensets(st.sampled_from(["eligible", "zero_mapped", "pte_dirty", "file", "swapped"])),
        st.integers(0, 2),
    ),
    max_size=12,
)


def batch(rows: list[Row], first: int) -> pa.RecordBatch:
    columns = {
        "address": [(first + number) * PAGE for number in range(len(rows))],
        "content": [None if row.content is None else CONTENTS[row.content] for row in rows],
        "flags": [sum(PAGE_FLAGS[name] for name in row.flags) for row in rows],
        "numa_node": [row.node for row in rows],
        "frame": [None] * len(rows),
    }
    region = pa.nulls(len(rows), MEMORY_IMAGE.schema.field("region").type)
    arrays = [region if f.name == "region" else pa.array(columns[f.name], f.type) for f in MEMORY_IMAGE.schema]
    return pa.RecordBatch.from_arrays(arrays, schema=MEMORY_IMAGE.schema)


def decide(row: Row, eligible: Eligible) -> tuple[str, int | None]:
    """Class and content that a page enters the tree with, the slow way; `merge` stands for the last two."""
    own = row.content is not None
    mapped = not own and "zero_mapped" in row.flags
    may = (own or mapped) and "file" not in row.flags and (eligible == "all" or "eligible" in row.flags)
    if not may:
        return "ineligible", None
    if mapped:
        return ("zero_mapped_ksm", 0) if "pte_dirty" in row.flags else ("zero_mapped_fault", None)
    return ("zero" if row.content == 0 else "merge"), row.content


@pytest.mark.parametrize("eligible", ["flagged", "all"])
@given(images=st.lists(ROWS, min_size=2, max_size=2), cut=st.integers(0, 12), ranges=st.sampled_from([1, 2, 8]))
@settings(max_examples=150, deadline=None)
def test_stages_equal_a_dict(eligible: Eligible, images: list[list[Row]], cut: int, ranges: int) -> None:
    parts: list[list[pa.Table]] = []
    by_class: Counter[str] = Counter()
    for image, rows in enumerate(images):
        for first, some in ((0, rows[:cut]), (cut, rows[cut:])):
            found = classes.classify(
                digests.digest_pages(batch(some, first), PAGE, DIGESTER),
                image,
                Settings(eligible=eligible),
                NO_REGIONS,
                DIGESTER.of_word(0, PAGE),
            )
            by_class.update(dict(zip(CLASSES, found.classes.tolist(), strict=True)))
            parts.append(tree.split(classes.combine([found.content], PAGE), ranges))
    owners = tree.Owners(NAMES, ("", ""), ("", ""))
    merged = [tree.merge([part[number] for part in parts], owners, PAGE, 10) for number in range(ranges)]

    expected: Counter[str] = Counter()
    places: dict[int, list[tuple[str, int, int]]] = {}
    for name, rows in zip(NAMES, images, strict=True):
        for number, row in enumerate(rows):
            kind, content = decide(row, eligible)
            expected[kind] += 1
            if content is not None:
                places.setdefault(content, []).append((name, number * PAGE, row.node))
    expected.pop("merge", None)
    assert +by_class == +expected

    stable = {
        row["digest"]: (row["copies"], row["images"], row["nodes"], row["first_image"], row["first_address"])
        for part in merged
        for row in part.stable.to_pylist()
    }
    assert stable == {
        digest(CONTENTS[content]): (
            len(where),
            len({name for name, _, _ in where}),
            len({node for _, _, node in where}),
            *min(where)[:2],
        )
        for content, where in places.items()
        if len(where) > 1
    }
    kinds = ("zero", "same_filled", "other", "other", "other")
    spectrum: Counter[tuple[int, str, int]] = Counter()
    for content, where in places.items():
        spectrum[(tree.ALL_NODES, kinds[content], len(where))] += 1
        for node, copies in Counter(node for _, _, node in where).items():
            spectrum[(node, kinds[content], copies)] += 1
    table = tree.add_rows([part.spectrum for part in merged])
    assert {(node, KINDS[kind], copies): n for node, kind, copies, _, n in table.tolist()} == spectrum
    assert (table[:, 2] == table[:, 3]).all()  # no frames known: each copy has its own
    shares: Counter[tuple[str, str]] = Counter()
    for content, where in places.items():
        held = Counter(name for name, _, _ in where)
        for name, here in held.items() if content else ():
            shares[name, "duplicate" if len(where) > 1 else "unique"] += here
            shares[name, "within"] += here if here > 1 else 0
            shares[name, "others"] += here if len(held) > 1 else 0
    got: Counter[tuple[str, str]] = Counter()
    for part in merged:
        for image, *pages in part.images.tolist():
            facts = zip(("duplicate", "unique", "within", "others"), pages[:4], strict=True)
            got.update({(NAMES[image], what): count for what, count in facts})
    assert +got == +shares
