"""Every table, defined once: columns, types, units, meaning, sort order, version.

`schemas/*.json` and `ksmdist schema` are rendered from here; nothing else defines a column.
A version number rises when a column goes, changes its name, type or meaning; adding a nullable
column does not raise it.
"""

from __future__ import annotations

from collections.abc import Mapping

from ksmdist.schema import Table
from ksmdist.tables.predictions import ACCOUNTINGS, COUNTERS, EXPLAIN, KSM_STAT, UNMERGE, WHATIF
from ksmdist.tables.scans import (
    CLASSES,
    HOLES,
    IMAGE_SPECTRUM,
    IMAGES,
    KINDS,
    MAPPINGS,
    MEMORY_IMAGE,
    PAGE,
    PAGE_FLAGS,
    PASSED_OVER,
    REASONS,
    REGIONS,
    SHARD_CONTENT,
    SPECTRUM,
    STABLE_TREE,
    ZERO_COLORS,
)

__all__ = [
    "ACCOUNTINGS",
    "CLASSES",
    "COUNTERS",
    "EXPLAIN",
    "HOLES",
    "IMAGES",
    "IMAGE_SPECTRUM",
    "KINDS",
    "KSM_STAT",
    "MAPPINGS",
    "MEMORY_IMAGE",
    "PAGE",
    "PAGE_FLAGS",
    "PASSED_OVER",
    "REASONS",
    "REGIONS",
    "SHARD_CONTENT",
    "SPECTRUM",
    "STABLE_TREE",
    "TABLES",
    "UNMERGE",
    "WHATIF",
    "ZERO_COLORS",
]

TABLES: Mapping[str, Table] = {
    table.name: table
    for table in (
        MEMORY_IMAGE,
        PAGE,
        SHARD_CONTENT,
        STABLE_TREE,
        SPECTRUM,
        IMAGE_SPECTRUM,
        MAPPINGS,
        REGIONS,
        ZERO_COLORS,
        IMAGES,
        HOLES,
        COUNTERS,
        KSM_STAT,
        WHATIF,
        EXPLAIN,
        UNMERGE,
    )
}
"""All tables by name."""
