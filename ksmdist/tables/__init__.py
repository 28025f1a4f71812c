"""Every table, defined once: columns, types, units, meaning, sort order, version.

`schemas/*.json` and `ksmdist schema` are rendered from here; nothing else defines a column.
A version number rises when a column goes, changes its name, type or meaning; adding a nullable
column does not raise it (but store.RUN_VERSION rises: a run is read with the columns that it must have).
"""

from __future__ import annotations

from collections.abc import Mapping

from ksmdist.schema import Table
from ksmdist.tables.findings import (
    CONTENTS,
    CUMULATIVE,
    DIFF_CONTENTS,
    DIFF_IMAGES,
    HUGE,
    HUGE_FRAME,
    IMAGE_SET,
    PASSES,
    POLICIES,
    POLICY,
    POLICY_SPECTRUM,
    SCOPES,
    SHARING,
    SPECTRUM_BUCKETS,
    WHATS,
)
from ksmdist.tables.predictions import ACCOUNTINGS, COUNTERS, EXPLAIN, KSM_STAT, UNMERGE, WHATIF
from ksmdist.tables.scans import (
    CHECKSUMS,
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
    "CHECKSUMS",
    "CLASSES",
    "CONTENTS",
    "COUNTERS",
    "CUMULATIVE",
    "DIFF_CONTENTS",
    "DIFF_IMAGES",
    "EXPLAIN",
    "HOLES",
    "HUGE",
    "HUGE_FRAME",
    "IMAGES",
    "IMAGE_SET",
    "IMAGE_SPECTRUM",
    "KINDS",
    "KSM_STAT",
    "MAPPINGS",
    "MEMORY_IMAGE",
    "PAGE",
    "PAGE_FLAGS",
    "PASSED_OVER",
    "PASSES",
    "POLICIES",
    "POLICY",
    "POLICY_SPECTRUM",
    "REASONS",
    "REGIONS",
    "SCOPES",
    "SHARD_CONTENT",
    "SHARING",
    "SPECTRUM",
    "SPECTRUM_BUCKETS",
    "STABLE_TREE",
    "TABLES",
    "UNMERGE",
    "WHATIF",
    "WHATS",
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
        CONTENTS,
        SHARING,
        POLICY,
        POLICY_SPECTRUM,
        SPECTRUM_BUCKETS,
        CUMULATIVE,
        HUGE,
        IMAGE_SET,
        HUGE_FRAME,
        PASSES,
        CHECKSUMS,
        DIFF_CONTENTS,
        DIFF_IMAGES,
    )
}
"""All tables by name."""
