"""What tenants would share with each other: table `exposure` summed up, on the screen and on the page."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ksmdist.report.markup import counted, grid, listed, paragraph, section
from ksmdist.report.terminal import printable
from ksmdist.tables import EXPOSURE

__all__ = ["NO_TENANT", "exposed_lines", "exposure_section", "salts_of", "summarize_exposure", "tenants_of"]

_RARE: tuple[str, ...] = (
    "contents",
    "pages",
    "other_pages",
    "looked_at",
    "low",
    "middle",
    "high",
    "unknown",
)  # may be added up

NO_TENANT = "(no tenant)"
"""What stands for the images without a tenant, to people."""


def tenants_of(manifest: Mapping[str, Any]) -> int:
    """Tenants of a run; images without one are one. manifest: run.json."""
    return len({image["tenant"] for image in manifest["images"]})


def salts_of(manifest: Mapping[str, Any]) -> int:
    """Groups of images with one salt; images without one are one. manifest: run.json."""
    return len({image.get("salt", 0) for image in manifest["images"]})


def summarize_exposure(manifest: Mapping[str, Any], exposure: Iterable[pa.RecordBatch], most: int) -> dict[str, Any]:
    """The key `exposure` of `ksmdist report --json`. exposure: the table in batches, read once.

    tenants, salts: of the run; pairs: of tenants that share; rare: sums over all pairs of kind other; top: the `most`
    pairs with most rare contents of kind other, then most pages of it, then most pages: tenant, other, and a list
    `kinds` of their rows of the table, which has `rows` in all.
    """
    count, total, rare, top = 0, 0, np.zeros(len(_RARE), np.int64), EXPOSURE.schema.empty_table()
    held = top
    for batch in itertools.chain(exposure, [None]):
        rows = held if batch is None else pa.concat_tables([held, pa.Table.from_batches([batch])])
        rows = rows.combine_chunks()
        starts = _starts(rows)
        cut = len(rows) if batch is None or len(starts) == 0 else int(starts[-1])  # the last pair may go on
        rows, held, starts = rows.slice(0, cut), rows.slice(cut), starts[starts < cut]
        count, total = count + len(starts), total + len(rows)
        other = rows.filter(pc.equal(rows.column("kind"), "other"))
        rare += np.array([pc.sum(other.column(f"rare_{name}")).as_py() or 0 for name in _RARE], np.int64)
        top = _top(pa.concat_tables([top, rows]).combine_chunks(), most)
    pairs = []
    for (tenant, other_name), of_pair in itertools.groupby(top.to_pylist(), lambda row: (row["tenant"], row["other"])):
        kinds = [{name: value for name, value in row.items() if name not in ("tenant", "other")} for row in of_pair]
        pairs.append({"tenant": tenant, "other": other_name, "kinds": kinds})
    return {
        "tenants": tenants_of(manifest),
        "salts": salts_of(manifest),
        "pairs": count,
        "rows": total,
        "rare": dict(zip(_RARE, rare.tolist(), strict=True)),
        "top": pairs,
    }


def _starts(rows: pa.Table) -> np.ndarray:
    """Rows of table `exposure` where a pair begins, whose rows stand together."""
    if len(rows) == 0:
        return np.zeros(0, np.int64)
    new = np.ones(len(rows), bool)
    new[1:] = False
    for name in ("tenant", "other"):
        column = rows.column(name)
        new[1:] |= pc.not_equal(column.slice(1), column.slice(0, len(rows) - 1)).to_numpy()
    return np.flatnonzero(new)


def _top(rows: pa.Table, most: int) -> pa.Table:
    """The rows of the pairs that summarize_exposure() calls top; of equals the earlier."""
    starts = _starts(rows)
    if len(starts) == 0:
        return rows
    pages = rows.column("pages").to_numpy() + rows.column("other_pages").to_numpy()
    is_other = pc.equal(rows.column("kind"), "other").to_numpy()
    rare = rows.column("rare_contents").to_numpy() * is_other
    weights = [np.add.reduceat(column, starts) for column in (pages, pages * is_other, rare)]
    chosen = np.lexsort([-weight for weight in weights])[:most]
    ends = np.append(starts[1:], len(rows))
    at = [row for pair in chosen.tolist() for row in range(int(starts[pair]), int(ends[pair]))]
    return rows.take(pa.array(at, pa.int64()))


def exposed_lines(found: Mapping[str, Any], policy: Sequence[Mapping[str, Any]], most: int) -> list[list[str]]:
    """Rows of a table for the screen, the first a heading, and below it sentences, each a row of one cell.

    found: as summarize_exposure() gives it; nothing where there are fewer than two tenants.
    """
    if found["tenants"] < 2:
        return []
    if not found["pairs"]:
        return [[f"{found['tenants']:,} tenants: no two of them hold the same content, so none is exposed to another"]]
    rows = [["tenants exposed", "to each other", "contents", "pages", "rare"]]
    for pair in found["top"][:most]:
        names = [printable(pair[name] or NO_TENANT, 18) for name in ("tenant", "other")]
        other = next((row for row in pair["kinds"] if row["kind"] == "other"), None)
        counts = (
            (other["contents"], other["pages"] + other["other_pages"], other["rare_contents"]) if other else (0,) * 3
        )
        rows.append([*names, *(f"{count:,}" for count in counts)])
    return rows + [[line] for line in _sentences(found, policy)]


def _sentences(found: Mapping[str, Any], policy: Sequence[Mapping[str, Any]]) -> list[str]:
    """What holds for all pairs together."""
    rare = found["rare"]
    said = f"{counted(found['pairs'], 'pair')} of {found['tenants']:,} tenants share pages"
    if rare["contents"]:
        looked = "" if rare["looked_at"] == rare["contents"] else f" of {rare['looked_at']:,} looked at"
        said += f"; {counted(rare['contents'], 'rare content')}, of just two tenants:{looked} {rare['low']:,} of low "
        said += f"entropy, {rare['middle']:,} middle, {rare['high']:,} high"
        said += f", {rare['unknown']:,} not known" if rare["unknown"] else ""
    costs = {row["policy"]: row["cost_gib"] for row in policy}
    names = {"tenant": "within tenants"} | ({"salt": "within salts"} if found["salts"] > 1 else {})
    names |= {"image": "within images", "zero": "zero pages only", "never": "none"}
    told = ", ".join(f"{name} {costs[step]:,.3f}" for step, name in names.items())
    return [said, f"merging costs, in GiB not saved: {told}"]


def exposure_section(found: Mapping[str, Any], policy: Sequence[Mapping[str, Any]]) -> str:
    """The section of the page. found: as summarize_exposure() gives it."""
    title = "What tenants are exposed to"
    if found["tenants"] < 2:
        return section("exposure", title, paragraph("There is one tenant: none that it could be exposed to."))
    if not found["pairs"]:
        said = f"No two of {found['tenants']:,} tenants hold the same content: none is exposed to another."
        return section("exposure", title, paragraph(said))
    notes = [f"{line[0].upper()}{line[1:]}." for line in _sentences(found, policy)]
    return section(
        "exposure",
        title,
        paragraph(
            "A write to a merged page takes longer, so one tenant can find out that another holds a page it can guess. "
            "Contents that many hold say little; a rare one, of just two tenants, says who. Low entropy can be "
            "guessed; high entropy is compressed, encrypted or a key, and is no accident. Contents near "
            "max_page_sharing let one count how many copies others hold. A content of three tenants is in three rows: "
            "only columns of rare contents may be added up."
        ),
        listed(notes),
        grid("exposure", "Pairs of tenants with most rare contents", "exposure.parquet"),
    )
