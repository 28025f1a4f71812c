"""What is saved if merging is allowed for some pages only, or only within an image, a tenant or a salt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from ksmdist.counters import Counters, predict
from ksmdist.settings import Settings
from ksmdist.sharing import Pattern, Sharing
from ksmdist.tables import KINDS, POLICIES, POLICY, SCOPES
from ksmdist.tree import ALL_NODES

__all__ = ["policy_table"]

_ZERO, _SAME_FILLED, _OTHER = range(len(KINDS))


def policy_table(sharing: Sharing, settings: Settings) -> pa.Table:
    """The `policy` table: each step of the ladder counted as KSM would count it under these settings.

    A step is a prediction in which what may not merge is no content: within a tenant, a content that two tenants hold
    is two contents. So `all` is what the run itself counts, and what a step costs is what it saves less.
    salt: pages merge if content and salt match, as ESX has it (sched.mem.pshare.salt, with Mem.ShareForceSalting=1, by
    which machines without a salt have salt 0 all; Broadcom KB 323624, vSphere's advanced memory attributes).
    """
    rows: list[dict[str, Any]] = []
    counted: dict[tuple[str, int], Counters] = {}
    for level, policy in enumerate(POLICIES):
        scope = policy if policy in SCOPES else "all"
        kinds = {"never": (), "zero": (_ZERO,), "same_filled": (_ZERO, _SAME_FILLED)}.get(policy, range(len(KINDS)))
        for kind in kinds:
            if (scope, kind) not in counted:
                counted[scope, kind] = _counted(sharing, settings, scope, kind)
        done = [counted[scope, kind] if kind in kinds else None for kind in range(len(KINDS))]
        saved = [0 if one is None else one.saved_bytes // settings.page_size for one in done]
        rows.append(
            {
                "level": level,
                "policy": policy,
                "merged_pages": sum(one.zero_merges + one.content_merges for one in done if one is not None),
                "frames_kept": sum(one.pages_shared for one in done if one is not None),
                "saved_pages": sum(saved),
                "saved_zero": saved[_ZERO],
                "saved_same_filled": saved[_SAME_FILLED],
                "saved_other": saved[_OTHER],
                "saved_bytes": sum(saved) * settings.page_size,
                "saved_gib": sum(saved) * settings.page_size / (1 << 30),
            }
        )
    whole = rows[-1]["saved_bytes"]
    rows = [row | {"cost_bytes": whole - row["saved_bytes"]} for row in rows]
    rows = [row | {"cost_gib": row["cost_bytes"] / (1 << 30)} for row in rows]
    return pa.Table.from_pylist(rows, schema=POLICY.schema)


def _counted(sharing: Sharing, settings: Settings, scope: str, kind: int) -> Counters:
    """The counters of the contents of one kind, where they merge within a scope."""
    rows = sharing.scopes[(sharing.scopes[:, 1] == SCOPES.index(scope)) & (sharing.scopes[:, 2] == kind)]
    if sharing.one_node:  # then image_spectrum has no rows for the node
        rows = rows[rows[:, 0] == ALL_NODES]
    node, copies, contents = rows[:, 0], rows[:, 3], rows[:, 4]
    none = np.zeros(len(rows), np.int64)
    # As if each content were one image's alone: where its copies lie does not change how many merge.
    by_image = np.stack([node, none, copies, none, copies, none - 1, contents], axis=1)
    patterns = [
        part for pattern in sharing.patterns if pattern.kind == kind for part in _parts(pattern, sharing, scope)
    ]
    one = replace(sharing, image_spectrum=by_image, patterns=tuple(patterns))
    return predict(one, settings).counters


def _parts(pattern: Pattern, sharing: Sharing, scope: str) -> list[Pattern]:
    """A pattern cut into those of each image, or tenant, or salt."""
    if scope == "all":
        return [pattern]
    image = pattern.rows[:, 0]
    owner = image if scope == "image" else (sharing.tenants if scope == "tenant" else sharing.salts)[image]
    return [replace(pattern, rows=pattern.rows[owner == number]) for number in np.unique(owner).tolist()]
