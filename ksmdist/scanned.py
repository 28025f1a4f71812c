"""What scans tell the driver, a few numbers an image, and the tables made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from ksmdist.classes import Classified
from ksmdist.collisions import Confirmed
from ksmdist.images import Hole, ImageInfo
from ksmdist.passes import Compared
from ksmdist.settings import Settings
from ksmdist.tables import CLASSES, HOLES, IMAGES, KINDS, PASSED_OVER, REASONS, REGIONS, ZERO_COLORS

__all__ = [
    "Mapped",
    "Opened",
    "Scanned",
    "add_hole",
    "as_if_still",
    "colors_table",
    "filtered_images",
    "holes_table",
    "images_table",
    "regions_table",
]


@dataclass(frozen=True, slots=True)
class Opened:
    """An image of a run. node: the node that alone has it, "" for any; holes: known from its headers.

    reached False: the node is not in the cluster, so that nothing is known but the name.
    number: of its pass; earlier: its passes before this one, in their order.
    salt: number of the group of images with its salt, from 1; 0: it has none. The salt itself is not in info any more.
    """

    image_id: str
    node: str
    info: ImageInfo
    holes: tuple[Hole, ...] = ()
    reached: bool = True
    number: int = 1
    earlier: tuple[Opened, ...] = ()
    salt: int = 0

    def as_json(self) -> dict[str, Any]:
        """As plan.json keeps it."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Opened:
        """Read what as_json() gave, through JSON."""
        info = dict(fields["info"])
        for name in ("caveats", "regions", "base"):
            info[name] = tuple(info[name])
        for name in ("passed_over", "ksm_stat", "parts"):
            info[name] = tuple(map(tuple, info[name]))
        holes = tuple(Hole(**hole) for hole in fields["holes"])
        earlier = tuple(map(cls.from_json, fields["earlier"]))
        more = (fields["reached"], fields["number"], earlier, fields["salt"])
        return cls(fields["image_id"], fields["node"], ImageInfo(**info), holes, *more)


@dataclass(slots=True)
class Scanned:
    """What scans found of an image: pages by class, kind, region and colour of the zero page.

    classes: int64[classes]; kinds: int64[kinds]; regions: int64[regions + 1, reasons]; colors: int64[colors, 2];
    framed: int64[2], pages whose frame is known, not volatile and volatile; compared: with the pass before, if any
    """

    classes: np.ndarray
    kinds: np.ndarray
    regions: np.ndarray
    colors: np.ndarray
    framed: np.ndarray
    compared: Compared = field(default_factory=Compared)

    @classmethod
    def nothing(cls, info: ImageInfo, settings: Settings) -> Scanned:
        """Of an image of which nothing is scanned yet."""
        return cls(
            np.zeros(len(CLASSES), np.int64),
            np.zeros(len(KINDS), np.int64),
            np.zeros((len(info.regions) + 1, len(REASONS)), np.int64),
            np.zeros((settings.zero_page_colors, 2), np.int64),
            np.zeros(2, np.int64),
        )

    def add(self, other: Scanned | Classified) -> None:
        """Add what another scan of the image found."""
        self.classes += other.classes
        self.kinds += other.kinds
        self.regions += other.regions
        self.colors += other.colors
        self.framed += other.framed
        if isinstance(other, Scanned):
            self.compared.add(other.compared)


@dataclass(frozen=True, slots=True)
class Mapped:
    """What one task of the map tells the driver: its images by number, and holes. pages: in its shards.

    confirmed: what came of comparing the pages of these shards with each other, with --verify bytes
    """

    images: Mapping[int, Scanned]
    holes: Sequence[tuple[int, Hole]]
    pages: int
    confirmed: Confirmed = field(default_factory=Confirmed)

    def as_json(self) -> dict[str, Any]:
        """As the task's mark keeps it."""
        images = {}
        for number, scanned in self.images.items():
            at = np.argwhere(scanned.regions)
            images[str(number)] = {
                "classes": scanned.classes.tolist(),
                "kinds": scanned.kinds.tolist(),
                "regions": np.column_stack([at, scanned.regions[at[:, 0], at[:, 1]]]).tolist(),
                "colors": scanned.colors.tolist(),
                "framed": scanned.framed.tolist(),
                "compared": asdict(scanned.compared),
            }
        return {
            "images": images,
            "holes": [[image, asdict(hole)] for image, hole in self.holes],
            "pages": self.pages,
        } | {"confirmed": self.confirmed.as_json()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], infos: Mapping[int, ImageInfo], settings: Settings) -> Mapped:
        """Read what as_json() gave, through JSON. infos: by number, of its images at least."""
        images = {}
        for name, found in fields["images"].items():
            scanned = Scanned.nothing(infos[int(name)], settings)
            scanned.classes[:], scanned.kinds[:], scanned.colors[:] = found["classes"], found["kinds"], found["colors"]
            for region, reason, count in found["regions"]:
                scanned.regions[region, reason] = count
            scanned.framed[:], scanned.compared = found["framed"], Compared(**found["compared"])
            images[int(name)] = scanned
        return cls(
            images,
            [(image, Hole(**hole)) for image, hole in fields["holes"]],
            fields["pages"],
            Confirmed.from_json(fields["confirmed"]),
        )


def filtered_images(opened: Sequence[Opened]) -> list[dict[str, Any]]:
    """Images whose producers left pages out or made some up: image_id, filter_level and excluded (pages) of each."""
    return [
        {"image_id": image.image_id, "filter_level": image.info.filter_level, "excluded": image.info.pages_excluded}
        for image in opened
        if image.info.filter_level
    ]


def add_hole(holes: list[tuple[int, Hole]], image: int, hole: Hole, page_size: int) -> None:
    """Add a hole of an image to a task's, or make the last one longer if it goes on there: a hole comes in blocks."""
    if holes and holes[-1][0] == image:
        last = holes[-1][1]
        if last.reason == hole.reason and last.address + last.pages * page_size == hole.address:
            holes[-1] = (image, replace(last, pages=last.pages + hole.pages))
            return
    holes.append((image, hole))


def holes_table(holes: Sequence[tuple[int, Hole]], images: Sequence[Opened], page_size: int) -> pa.Table:
    """The `holes` table: sorted, and neighbours with one reason joined, however the shards cut them."""
    joined: list[tuple[int, Hole]] = []
    for image, hole in sorted(holes, key=lambda found: (found[0], found[1].address)):
        before, last = joined[-1] if joined else (-1, hole)
        if (before, last.address + last.pages * page_size, last.reason) == (image, hole.address, hole.reason):
            joined[-1] = (image, replace(last, pages=last.pages + hole.pages))
        else:
            joined.append((image, hole))
    rows: list[dict[str, Any]] = [{"image_id": images[image].image_id, **asdict(hole)} for image, hole in joined]
    rows += [
        {"image_id": image.image_id, "address": 0, "pages": None, "reason": "no_node"}
        for image in images
        if not image.reached
    ]
    rows.sort(key=lambda row: (row["image_id"], row["address"]))
    return pa.Table.from_pylist(rows, schema=HOLES.schema)


def images_table(images: Sequence[Opened], holes: pa.Table, found: Sequence[Scanned], shares: np.ndarray) -> pa.Table:
    """The `images` table. shares: int64[images, 5], as totals.Totals has it."""
    ids = [image.image_id for image in images]
    infos = [image.info for image in images]
    unreadable = {image.image_id: 0 if image.reached else None for image in images}
    for row in holes.to_pylist():
        if row["pages"] is not None:
            unreadable[row["image_id"]] = (unreadable[row["image_id"]] or 0) + row["pages"]
    by_class = np.stack([scanned.classes for scanned in found])
    by_kind = np.stack([scanned.kinds for scanned in found])
    by_class[:, CLASSES.index("duplicate")] += shares[:, 0]
    by_class[:, CLASSES.index("unique")] += shares[:, 1]
    columns: dict[str, object] = {
        "scan_order": np.arange(len(ids), dtype=np.int32),
        "image_id": ids,
        "kind": [info.kind for info in infos],
        "format": [info.format for info in infos],
        "producer": [info.producer for info in infos],
        "filter_level": [info.filter_level for info in infos],
        "host": [info.host for info in infos],
        "tenant": [info.tenant for info in infos],
        "salt": [image.salt for image in images],
        "total": by_class.sum(axis=1),
        "bytes": by_class.sum(axis=1) * np.array([info.page_size for info in infos], np.int64),
        "absent": [info.pages_absent for info in infos],
        "excluded": [info.pages_excluded for info in infos],
        "unreadable": [unreadable[image_id] for image_id in ids],
    }
    columns |= {name: by_class[:, code] for code, name in enumerate(CLASSES)}
    columns |= {f"kind_{name}": by_kind[:, code] for code, name in enumerate(KINDS)}
    columns |= {"shared_within": shares[:, 2], "shared_with_others": shares[:, 3]}
    columns |= {"frames_known": [scanned.framed[0] for scanned in found]}
    return pa.Table.from_pydict(columns, schema=IMAGES.schema)


def as_if_still(images: pa.Table, found: Sequence[Scanned], shares: np.ndarray, changing: np.ndarray) -> pa.Table:
    """Table `images`, had no page changed between passes. shares, changing: totals.Totals.shares without and with them.

    Of the pages that changed, those that are not among the duplicate and unique ones more are zero pages.
    """
    names = ("volatile", "zero", "duplicate", "unique", "frames_known")
    column = {name: images.column(name).to_numpy() for name in names}
    more = changing - shares
    column["zero"] = column["zero"] + column["volatile"] - more[:, 0] - more[:, 1]
    column["duplicate"], column["unique"] = column["duplicate"] + more[:, 0], column["unique"] + more[:, 1]
    column["frames_known"] = column["frames_known"] + np.array([scanned.framed[1] for scanned in found], np.int64)
    column["volatile"] = np.zeros(len(images), np.int64)
    columns = [
        pa.array(column[field.name]) if field.name in column else images.column(field.name) for field in IMAGES.schema
    ]
    return pa.Table.from_arrays(columns, schema=IMAGES.schema)


def regions_table(infos: Sequence[ImageInfo], found: Sequence[Scanned]) -> pa.Table:
    """The `regions` table; pages that are absent for no reason given are of no region."""
    rows = []
    for number, (info, scanned) in enumerate(zip(infos, found, strict=True)):
        by_region: dict[str, dict[str, int]] = {}
        said = sum(pages for _, _, pages in info.passed_over)
        passed_over = [*info.passed_over, ("", "absent", max(0, info.pages_absent - said))]
        counted = [
            (region, reason, pages)
            for region, counts in zip([*info.regions, ""], scanned.regions.tolist(), strict=True)
            for reason, pages in zip(REASONS, counts, strict=True)
        ]
        for region, reason, pages in [*passed_over, *counted]:
            if pages:
                row = by_region.setdefault(region, dict.fromkeys((*PASSED_OVER, "absent", *REASONS), 0))
                row[reason] += pages
        rows += [{"image": number, "region": region or None, **by_region[region]} for region in sorted(by_region)]
    return pa.Table.from_pylist(rows, schema=REGIONS.schema)


def colors_table(found: Sequence[Scanned]) -> pa.Table:
    """The `zero_colors` table."""
    total = sum(scanned.colors for scanned in found)
    assert isinstance(total, np.ndarray)
    columns = {"color": np.arange(len(total), dtype=np.int32), "zero": total[:, 0], "zero_mapped_fault": total[:, 1]}
    return pa.Table.from_pydict(columns, schema=ZERO_COLORS.schema)
