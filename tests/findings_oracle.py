"""The tables of findings, the slow way: a dict from page bytes to the places that hold them.

All pages are in frames of their own. Rows are dicts by column, in the order of the table's definition.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import xxhash

from ksmdist.settings import Settings
from ksmdist.tables import KINDS, POLICIES

from .conftest import digest

Rows = list[dict[str, Any]]


class Page(NamedTuple):
    """A page. thp: of a huge page; placed: KSM had mapped it to the zero page."""

    address: int
    content: bytes
    eligible: bool = True
    thp: bool = False
    node: int = 0
    placed: bool = False
    volatile: bool = False

    def __repr__(self) -> str:
        set_ = [name for name in ("eligible", "thp", "placed", "volatile") if getattr(self, name)]
        return f"<{self.address // len(self.content)} {self.content[:4].hex()} {self.node} {' '.join(set_)}>"


class Image(NamedTuple):
    """An image, in scan order among others; pages by address."""

    image_id: str
    tenant: str
    pages: Sequence[Page]


Place = tuple[int, Page]  # the image's number, and a page that KSM would compare


def kind_of(content: bytes) -> str:
    word = content[:8]
    return "other" if content != word * (len(content) // 8) else "same_filled" if any(word) else "zero"


def held(images: Sequence[Image], included: bool = False) -> dict[bytes, list[Place]]:
    """Content -> where it is, in scan order; included: pages that changed too."""
    places: dict[bytes, list[Place]] = {}
    for number, image in enumerate(images):
        for page in image.pages:
            if page.eligible and (included or not page.volatile):
                places.setdefault(page.content, []).append((number, page))
    return places


def contents(places: Mapping[bytes, list[Place]], images: Sequence[Image]) -> Rows:
    """All that have two copies or more; `what`, `meaning` and `region` are not here."""
    ranked = sorted(places.items(), key=lambda item: (-len(item[1]), digest(item[0])))
    return [
        {
            "rank": rank,
            "digest": digest(content),
            "kind": kind_of(content),
            "fill_word": None if kind_of(content) == "other" else int.from_bytes(content[:8], "little"),
            "copies": len(where),
            "images": len({number for number, _ in where}),
            "tenants": len({images[number].tenant for number, _ in where}),
            "nodes": len({page.node for _, page in where}),
            "first_image": images[where[0][0]].image_id,
            "first_address": where[0][1].address,
        }
        for rank, (content, where) in enumerate(ranked, 1)
        if len(where) >= 2
    ]


def sharing(places: Mapping[bytes, list[Place]], images: Sequence[Image]) -> Rows:
    found: dict[tuple[int, int], list[int]] = {}
    for content, where in places.items():
        pages = Counter(number for number, _ in where)
        for image in pages:
            for other in pages:
                if any(content) and (image < other or (image == other and pages[image] >= 2)):
                    row = found.setdefault((image, other), [0, 0, 0])
                    row[:] = [row[0] + 1, row[1] + pages[image], row[2] + pages[other]]
    names = ("image", "image_id", "other", "other_id", "contents", "pages", "other_pages")
    return [
        dict(zip(names, (i, images[i].image_id, j, images[j].image_id, *found[i, j]), strict=True))
        for i, j in sorted(found)
    ]


def groups(
    places: Mapping[bytes, list[Place]], images: Sequence[Image], scope: str, by_node: bool
) -> dict[tuple[bytes, object, int], int]:
    """(content, its image or tenant, its node) -> copies that may merge."""
    of: Mapping[str, Callable[[int], object]] = {
        "image": lambda number: number,
        "tenant": lambda number: images[number].tenant,
        "salt": lambda _: 0,  # none has one
        "all": lambda _: 0,
    }
    return Counter(
        (content, of[scope](number), page.node if by_node else -1)
        for content, where in places.items()
        for number, page in where
    )


def merged(copies: int, content: bytes, settings: Settings) -> tuple[int, int, int]:
    """Of pages that may merge: those that do, KSM pages kept, and pages that are left over."""
    if settings.use_zero_pages and not any(content):
        return copies, 0, 0
    q, r = divmod(copies, settings.max_page_sharing or 1 << 40)
    return copies - (r == 1), q + (r >= 2), int(r == 1)


def policy(places: Mapping[bytes, list[Place]], images: Sequence[Image], settings: Settings) -> Rows:
    rows = []
    for level, name in enumerate(POLICIES):
        kinds = {"never": (), "zero": KINDS[:1], "same_filled": KINDS[:2]}.get(name, KINDS)
        scope = name if name in ("image", "tenant", "salt") else "all"
        row: dict[str, Any] = {"level": level, "policy": name, "merged_pages": 0, "frames_kept": 0}
        saved = dict.fromkeys(KINDS, 0)
        for (content, _, _), copies in groups(places, images, scope, not settings.merge_across_nodes).items():
            if kind_of(content) in kinds:
                pages, frames, _ = merged(copies, content, settings)
                row |= {"merged_pages": row["merged_pages"] + pages, "frames_kept": row["frames_kept"] + frames}
                saved[kind_of(content)] += pages - frames
        total = sum(saved.values())
        nbytes = total * settings.page_size
        row |= {"saved_pages": total} | {f"saved_{kind}": pages for kind, pages in saved.items()}
        rows.append(row | {"saved_bytes": nbytes, "saved_gib": nbytes / 2**30})
    costs = [rows[-1]["saved_bytes"] - row["saved_bytes"] for row in rows]
    return [row | {"cost_bytes": cost, "cost_gib": cost / 2**30} for row, cost in zip(rows, costs, strict=True)]


def policy_spectrum(places: Mapping[bytes, list[Place]], images: Sequence[Image]) -> Rows:
    """In no order: a node is null or a number."""
    found: Counter[tuple[int | None, str, str, int]] = Counter()
    for scope in ("image", "tenant", "salt", "all"):
        for by_node in (False, True):
            for (content, _, node), copies in groups(places, images, scope, by_node).items():
                if any(content):
                    found[node if by_node else None, scope, kind_of(content), copies] += 1
    return [
        {"numa_node": node, "scope": scope, "kind": kind, "copies": copies, "contents": n}
        for (node, scope, kind, copies), n in found.items()
    ]


def bucket(number: int) -> int:
    return 1 << number.bit_length() >> 1


def spectrum_buckets(places: Mapping[bytes, list[Place]], page_size: int) -> Rows:
    found: dict[tuple[int, str], list[int]] = {}
    for content, where in places.items():
        found.setdefault((bucket(len(where)), kind_of(content)), []).append(len(where))
    return [
        {"copies": least, "kind": kind, "contents": len(copies), "pages": sum(copies)}
        | {"contents_bytes": len(copies) * page_size, "pages_bytes": sum(copies) * page_size}
        for (least, kind), copies in sorted(found.items())
    ]


def cumulative(places: Mapping[bytes, list[Place]], images: Sequence[Image], page_size: int) -> Rows:
    rows, known, total = [], set[bytes](), 0
    for number, image in enumerate(images):
        here = [content for content, where in places.items() for n, _ in where if n == number]
        row = {"image": number, "image_id": image.image_id, "pages": len(here)}
        row["zero"] = sum(not any(content) for content in here)
        row["contents_added"] = len(set(here) - known)
        row["pages_known"] = sum(content in known for content in here)
        known |= set(here)
        total += len(here)
        row |= {"total_pages": total, "total_contents": len(known), "saved_pages": total - len(known)}
        rows.append(row | {"saved_bytes": (total - len(known)) * page_size})
    return rows


def huge(places: Mapping[bytes, list[Place]], images: Sequence[Image], page_size: int) -> Rows:
    size = page_size * (page_size // 8)
    frames: dict[tuple[int, int], list[tuple[bool, bool, bool]]] = {}
    for content, where in places.items():
        for number, page in where:
            facts = (not any(content) or len(where) >= 2, not any(content), page.thp)
            frames.setdefault((number, page.address // size), []).append(facts)
    found: dict[tuple[int, int], list[list[int]]] = {}
    for (number, _), pages in frames.items():
        mergeable, zero = (sum(page[fact] for page in pages) for fact in (0, 1))
        facts_of = [
            1,
            int(any(thp for _, _, thp in pages)),
            int(zero == size // page_size),
            len(pages),
            mergeable,
            zero,
        ]
        found.setdefault((number, bucket(mergeable)), []).append(facts_of)
    names = ("frames", "huge_frames", "zero_frames", "pages", "mergeable_pages", "zero_pages")
    return [
        {"image": number, "image_id": images[number].image_id, "mergeable": least}
        | dict(zip(names, map(sum, zip(*rows, strict=True)), strict=True))
        for (number, least), rows in sorted(found.items())
    ]


def checksum(content: bytes) -> int:
    """mm/ksm.c, calc_checksum: xxhash() is xxh64 on 64-bit, cut to u32."""
    return xxhash.xxh64_intdigest(content) & 0xFFFFFFFF


def passes(number: int, image_id: str, taken: Sequence[Mapping[int, bytes]]) -> Rows:
    """taken: pages by address, those with bytes of their own, of each pass in turn."""
    sums = [{address: checksum(content) for address, content in pages.items()} for pages in taken]
    rows: Rows = []
    for n, now in enumerate(sums):
        row: dict[str, Any] = {"image": number, "image_id": image_id, "pass": n + 1, "pages": len(now)}
        row |= dict.fromkeys(("changed", "appeared", "gone"))
        if n:
            before = sums[n - 1]
            row["changed"] = sum(before.get(address, value) != value for address, value in now.items())
            row["appeared"], row["gone"] = len(now.keys() - before.keys()), len(before.keys() - now.keys())
        stable = (address for address in now if all(then.get(address) == now[address] for then in sums[: n + 1]))
        rows.append(row | {"stable": sum(1 for _ in stable)})
    return rows


def checksums(number: int, taken: Sequence[Mapping[int, bytes]]) -> Rows:
    """Of the last of these passes. age: passes in a row before it that had the same checksum."""
    *before, now = taken
    rows = []
    for address in sorted(now):
        age = 0
        while age < len(before) and before[-1 - age].get(address) == now[address]:
            age += 1
        rows.append({"image": number, "address": address, "checksum": checksum(now[address]), "age": age})
    return rows


def last_pass(pages: Iterable[Page], before: Mapping[int, bytes]) -> list[Page]:
    """The pages, each volatile where the pass before has another checksum or no page there."""
    then = {address: checksum(content) for address, content in before.items()}
    return [
        page._replace(volatile=not page.placed and checksum(page.content) != then.get(page.address)) for page in pages
    ]


def tree_counters(images: Sequence[Image], settings: Settings, included: bool) -> dict[str, int]:
    """The counters of static memory (docs/ksm.md); a volatile page has an rmap item and is in neither tree."""
    places = held(images, included)
    volatile = 0 if included else sum(page.eligible and page.volatile for image in images for page in image.pages)
    counted: Counter[str] = Counter(pages_volatile=volatile)
    for (content, _, _), copies in groups(places, images, "all", not settings.merge_across_nodes).items():
        pages, frames, left = merged(copies, content, settings)
        placed = settings.use_zero_pages and not any(content)
        counted["ksm_zero_pages"] += pages if placed else 0
        counted["pages_shared"] += frames
        counted["pages_sharing"] += 0 if placed else pages - frames
        counted["pages_unshared"] += left
    names = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")
    items = sum(counted[name] for name in names)
    saved = (counted["pages_sharing"] + counted["ksm_zero_pages"]) * settings.page_size
    return {name: counted[name] for name in (*names, "ksm_zero_pages")} | {
        "rmap_items": items,
        "saved_bytes": saved,
        "general_profit": saved - items * 64,
    }
