"""A finished run: where it is, what it found, and what other settings would show of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ksmdist import counters, store
from ksmdist.errors import RunDirectoryError, SettingsError
from ksmdist.settings import Settings
from ksmdist.sharing import Sharing
from ksmdist.tables import IMAGE_SPECTRUM, IMAGES, KSM_STAT, MAPPINGS, POLICY_SPECTRUM, REGIONS, SPECTRUM

__all__ = ["Run", "load", "whatif"]

_SHARING = (IMAGES, SPECTRUM, IMAGE_SPECTRUM, POLICY_SPECTRUM, MAPPINGS)


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run.

    summary:  the object `ksmdist run --json` prints
    settings: of the run, as they were filled in
    sharing:  all that a prediction for other settings needs
    regions:  table `regions`
    ksm_stat: table `ksm_stat`, for the run's settings
    caveats:  what the counts do not show, for people
    """

    path: Path
    summary: Mapping[str, Any]
    settings: Settings
    sharing: Sharing
    regions: pa.Table
    ksm_stat: pa.Table
    caveats: tuple[str, ...]

    @property
    def images(self) -> pa.Table:
        """Table `images`."""
        return self.sharing.images

    @property
    def holes(self) -> int:
        """Pages that could not be read, as far as that is known: see `complete`."""
        return int(self.sharing.of_images("unreadable").sum())

    @property
    def out_of_reach(self) -> tuple[str, ...]:
        """Images of which nothing could be read, since their node was not in the cluster."""
        return tuple(self.summary["holes"]["images"])

    @property
    def filtered(self) -> list[Mapping[str, Any]]:
        """Images whose producers left pages out: image_id, filter_level and excluded of each."""
        return list(self.summary["filtered"])

    @property
    def complete(self) -> bool:
        """Whether every page of every image was read."""
        return not self.holes and not self.out_of_reach


def load(path: str | os.PathLike[str]) -> Run:
    """Read a run back from its directory; raises RunDirectoryError where it is none, or of another version."""
    directory = Path(path)
    manifest = store.read_manifest(directory)
    try:
        settings = Settings(**manifest["settings"])
        summary, caveats = dict(manifest["summary"]), tuple(map(str, manifest["caveats"]))
    except (KeyError, TypeError, ValueError, SettingsError) as error:
        raise RunDirectoryError(
            f"has a run.json that is not what it should be: {error}", str(directory), "run it again"
        ) from None
    tables = {t.name: store.read_table(directory, t) for t in _SHARING}
    regions, ksm_stat = (store.read_table(directory, table) for table in (REGIONS, KSM_STAT))
    try:
        sharing = Sharing.from_tables(tables)
    except (KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise RunDirectoryError(
            f"has tables that are not what they should be: {error}", str(directory), "run the images again"
        ) from None
    return Run(directory, summary, settings, sharing, regions, ksm_stat, caveats)


def whatif(run: Run | str | os.PathLike[str], settings: Settings) -> dict[str, Any]:
    """What the images of a run show under other settings; no image is touched.

    Returns the keys merges, counters, bounds, physical, estimate, processes and settings of
    `ksmdist whatif --json`. Of the settings, those of KSM count; page_size, eligible and what says
    how to scan are the run's. Raises SettingsError where they differ.
    """
    done = run if isinstance(run, Run) else load(run)
    for name in ("page_size", "eligible", "zero_page_colors"):
        if getattr(settings, name) != getattr(done.settings, name):
            raise SettingsError(
                f"was {getattr(done.settings, name)} in {done.path}", name, "run the images again with another"
            )
    prediction = counters.predict(done.sharing, settings)
    stats = counters.ksm_stat_table(prediction, done.sharing, settings)
    return {
        **counters.summary(prediction, settings),
        "processes": stats.to_pylist(),
        "settings": settings.as_dict(),
    }
