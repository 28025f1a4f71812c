"""What a run found: its tables, the summary that `--json` prints, and what run.json says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from ksmdist import contents, counters, identities, scanned, spectra, store
from ksmdist.collisions import Confirmed
from ksmdist.contents import Seen
from ksmdist.counters import Prediction
from ksmdist.identities import Identity
from ksmdist.images import Hole
from ksmdist.passes import passes_table
from ksmdist.policy import policy_table
from ksmdist.previous import History
from ksmdist.scanned import Opened, Scanned
from ksmdist.settings import Settings
from ksmdist.sharing import Sharing
from ksmdist.stages import Inspect
from ksmdist.tables import (
    CLASSES,
    CONTENTS,
    COUNTERS,
    CUMULATIVE,
    HOLES,
    HUGE,
    IMAGES,
    KINDS,
    KSM_STAT,
    PASSES,
    POLICY,
    REGIONS,
    SPECTRUM_BUCKETS,
    WHATIF,
    ZERO_COLORS,
)
from ksmdist.totals import Totals
from ksmdist.tree import Top
from ksmdist.whatif import grid

__all__ = ["Outcome", "looks"]

_CONTENTS_A_TASK = 256
_NAMED = 3  # images that have a caveat


def looks(top: Top | None, opened: Sequence[Opened]) -> list[Inspect]:
    """The tasks that read the first pages of the top contents again, on the nodes that have them."""
    if top is None:
        return []
    tasks = []
    nodes = [opened[number].node for number in top.image.tolist()]
    for node in sorted(set(nodes)):
        rows = np.array([row for row, of in enumerate(nodes) if of == node], np.int64)
        rows = rows[np.lexsort((top.address[rows], top.image[rows]))]
        for at in range(0, len(rows), _CONTENTS_A_TASK):
            some = rows[at : at + _CONTENTS_A_TASK]
            infos = {number: opened[number].info for number in np.unique(top.image[some]).tolist()}
            tasks.append(
                Inspect(node, infos, some, top.image[some].astype(np.int64), top.address[some], top.digest[some])
            )
    return tasks


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the stages of a run have found.

    found:     by image; holes: (image, hole); pages: in all shards
    totals:    of all merges; changing: the same, with pages that changed between passes counted as if they had not
    huge:      the parts of table `huge`
    seen:      what contents of totals.top are, by row
    unseen:    rare contents of table `exposure` that were to be looked at, and could not be read again
    history:   passes of the images; previous: path of the run before
    confirmed: what came of confirming equal digests; key: fingerprint of the site key
    """

    settings: Settings
    opened: Sequence[Opened]
    left_out: Sequence[tuple[str, str]]
    region_names: Sequence[str]
    found: Sequence[Scanned]
    holes: Sequence[tuple[int, Hole]]
    pages: int
    totals: Totals
    changing: Totals | None
    huge: Sequence[pa.Table]
    seen: Mapping[int, Seen]
    unseen: int
    history: History
    previous: str | None
    confirmed: Confirmed
    key: str | None

    @cached_property
    def holes_table(self) -> pa.Table:
        """Table `holes`."""
        return scanned.holes_table(self.holes, self.opened, self.settings.page_size)

    @cached_property
    def sharing(self) -> Sharing:
        """All that a prediction needs; pages that changed between passes are not merged."""
        images = scanned.images_table(self.opened, self.holes_table, self.found, self.totals.shares)
        return self._sharing(images, self.totals)

    def _sharing(self, images: pa.Table, totals: Totals) -> Sharing:
        spectra = totals.spectrum(), totals.image_spectrum(), totals.scopes()
        return Sharing.of(images, self.region_names, *spectra, totals.patterns())

    @cached_property
    def prediction(self) -> Prediction:
        """What KSM shows under the settings."""
        return counters.predict(self.sharing, self.settings)

    @cached_property
    def still(self) -> Prediction | None:
        """What KSM would show had no page changed between passes; None where there was one pass."""
        if self.changing is None:
            return None
        images = scanned.as_if_still(self.sharing.images, self.found, self.totals.shares, self.changing.shares)
        return counters.predict(self._sharing(images, self.changing), self.settings)

    @cached_property
    def identities(self) -> list[Identity]:
        """The identities, which hold; raises IdentityError if one does not."""
        known = sum(hole.pages for image in self.opened for hole in image.holes)
        lost = sum(pages or 0 for pages in self.holes_table.column("pages").to_pylist()) - known
        tables = {name: self._tables[name] for name in (POLICY.name, SPECTRUM_BUCKETS.name, CUMULATIVE.name, HUGE.name)}
        return identities.check(
            self.sharing, self.prediction, self.settings, self.totals.stable_copies, self.pages, lost, tables
        )

    @cached_property
    def _tables(self) -> dict[str, pa.Table]:
        sharing, settings = self.sharing, self.settings
        ids = [image.image_id for image in self.opened]
        counted = [counters.counters_table(self.prediction.counters, settings, "excluded")]
        if self.still is not None:
            counted.append(counters.counters_table(self.still.counters, settings, "included"))
        top = self.totals.top
        return sharing.tables() | {
            IMAGES.name: sharing.images,
            HOLES.name: self.holes_table,
            REGIONS.name: scanned.regions_table([image.info for image in self.opened], self.found),
            ZERO_COLORS.name: scanned.colors_table(self.found),
            COUNTERS.name: pa.concat_tables(counted),
            KSM_STAT.name: counters.ksm_stat_table(self.prediction, sharing, settings),
            WHATIF.name: grid(sharing, settings),
            POLICY.name: policy_table(sharing, settings),
            SPECTRUM_BUCKETS.name: spectra.buckets_table(sharing, settings.page_size),
            CUMULATIVE.name: spectra.cumulative_table(sharing, settings.page_size),
            HUGE.name: pa.concat_tables([HUGE.schema.empty_table(), *self.huge]),
            PASSES.name: passes_table(self.history.passes, self.history.rows, ids),
            CONTENTS.name: CONTENTS.schema.empty_table()
            if top is None
            else contents.contents_table(top, self.seen, ids),
        }

    def tables(self) -> dict[str, pa.Table]:
        """The tables by name, but stable_tree, sharing and checksums, which workers write. Raises IdentityError."""
        assert all(identity.holds for identity in self.identities)
        return self._tables

    def summary(self) -> dict[str, Any]:
        """The object `ksmdist run --json` prints. Keys are a promise: they are added to, none goes."""
        sharing = self.sharing
        return {
            "pages": {name: int(sharing.of_images(name).sum()) for name in ("total", "absent", *CLASSES)},
            "kinds": {name: int(sharing.of_images(f"kind_{name}").sum()) for name in KINDS},
            "contents": counters.contents(sharing),
            **counters.summary(self.prediction, self.settings),
            "holes": {
                "ranges": len(self.holes_table),
                "pages": int(sharing.of_images("unreadable").sum()),
                "images": [image.image_id for image in self.opened if not image.reached],
            },
            "filtered": scanned.filtered_images(self.opened),
            "verified": {
                "verify": self.settings.verify,
                "contents": self.confirmed.contents,
                "pages": self.confirmed.pages,
                "unread": self.confirmed.unread,
                "collided": len(self.confirmed.collided),
            },
            "settings": self.settings.as_dict(),
            "zero_colors": self._tables[ZERO_COLORS.name].to_pylist(),
            "policy": self._tables[POLICY.name].to_pylist(),
            "still": None if self.still is None else counters.summary(self.still, self.settings),
        }

    @property
    def caveats(self) -> tuple[str, ...]:
        """What the counts do not show, for people."""
        of_images: dict[str, list[str]] = {}
        for image in self.opened:
            for caveat in image.info.caveats:
                of_images.setdefault(caveat, []).append(image.image_id)
        said = []
        for caveat, ids in of_images.items():
            more = f" and {len(ids) - _NAMED:,} more" if len(ids) > _NAMED else ""
            said.append(f"{', '.join(ids[:_NAMED])}{more}: {caveat}")
        said += [f"left out: {name}: {why}" for name, why in self.left_out]
        top = self.totals.top
        filled = [] if top is None else top.filled.tolist()
        unknown = sum(not known and row not in self.seen for row, known in enumerate(filled))
        if unknown:
            said.append(
                f"contents: the first pages of {unknown:,} of {len(filled):,} could not be read again: what these "
                "contents are is not known"
            )
        if self.unseen:
            said.append(
                f"exposure: the first pages of {self.unseen:,} contents of just two tenants could not be read again: "
                "their entropy is not known"
            )
        if len(self.confirmed.collided):
            said.append(
                f"verify: {len(self.confirmed.collided):,} digests turned out to be of several contents each, which "
                "are counted apart: chance does not do this to 128 bits, so that somebody may know the seed of the key"
            )
        if self.confirmed.unread:
            said.append(
                f"verify: {self.confirmed.unread:,} of {self.confirmed.pages:,} pages could not be read again: that "
                "they are what their digests say is not confirmed"
            )
        several = self.history.images
        for number, image in enumerate(self.opened):
            if several and number not in several and image.reached:
                said.append(f"{image.image_id}: it has one pass: none of its pages is known to change")
            if self.history.lost.get(number):
                said.append(
                    f"{image.image_id}: {self.history.lost[number]:,} pages of earlier passes could not be read: what "
                    "is there now counts as volatile"
                )
        return tuple(dict.fromkeys(said))

    def manifest(self) -> dict[str, Any]:
        """What run.json says, but engine, timings and the summary."""
        return {
            "run_version": store.RUN_VERSION,
            "settings": self.settings.as_dict(),
            "images": [_of_manifest(image) for image in self.opened],
            "identities": [asdict(identity) | {"holds": identity.holds} for identity in self.identities],
            "caveats": self.caveats,
            "previous": self.previous,
            "key": self.key,
        }


def _of_manifest(image: Opened) -> dict[str, object]:
    """What run.json says of an image: not its regions, which have a table, and of its salt the group alone."""
    left_out = ("regions", "passed_over", "ksm_stat", "salt")
    fields = {name: value for name, value in asdict(image.info).items() if name not in left_out}
    return fields | {"image_id": image.image_id, "node": image.node, "reached": image.reached, "salt": image.salt}
