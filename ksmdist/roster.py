"""The images of a run: sources looked at where they are, named, in the order in which KSM scans them."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from ksmdist import engines, fleet, images, stages
from ksmdist.engines import Engine, Stage
from ksmdist.errors import EngineError, SettingsError
from ksmdist.fleet import Source
from ksmdist.images import ImageInfo
from ksmdist.scanned import Opened
from ksmdist.settings import Settings
from ksmdist.timings import Clock, Progress

__all__ = ["look", "opened"]

_SOURCES_A_TASK = 16  # looked at by one task


@contextmanager
def opened(
    paths: Sequence[str | os.PathLike[str]],
    manifest: str | None,
    settings: Settings,
    engine: str,
    address: str | None,
    progress: Progress,
    clock: Clock,
    strict: bool,
) -> Iterator[tuple[list[Opened], list[tuple[str, str]], engines.Choice, Engine]]:
    """Images in the order in which KSM scans them, files left out, and the engine, which is closed after use.

    A cluster's nodes look at the images themselves: the driver need not see them.
    """
    sources = [fleet.parse(os.fspath(path)) for path in paths]
    if manifest is not None:
        sources += fleet.read_manifest(manifest)
    sources = list(map(fleet.absolute, sources))
    if not sources:
        raise SettingsError("no image was given", "IMAGE", "name one or more memory images, or a manifest")
    choice = engines.choose(engine, address, 0)
    if choice.address is None:
        opened, left_out = look(engines.start(engines.choose("inline", None, 0)), sources, settings, strict)
        clock.lap("open", f"{len(opened)} images", progress)
        choice = engines.choose(engine, address, sum(image.info.pages for image in opened) * settings.page_size)
    progress.engine(choice.name, choice.why)
    runner = engines.start(choice)
    clock.lap("start", choice.name, progress)
    try:
        if choice.address is not None:
            opened, left_out = look(runner, sources, settings, strict)
            clock.lap("open", f"{len(opened)} images", progress)
        yield opened, left_out, choice, runner
    finally:
        runner.close()


def look(
    runner: Engine, sources: Sequence[Source], settings: Settings, strict: bool
) -> tuple[list[Opened], list[tuple[str, str]]]:
    """Open every source where it is."""
    nodes = runner.machines().nodes
    missing = [source for source in sources if source.node and source.node not in nodes]
    if missing and strict:
        names = sorted({source.node for source in missing})
        raise EngineError(
            f"{len(missing)} images are on nodes that are not in the cluster: {', '.join(names[:10])}",
            missing[0].uri,
            "start Ray there, with the label ksmdist-host=NAME where it goes by another name, or leave --strict out",
        )
    later = next((source for source in sources if (source.pass_number or 1) > 1), None)
    if later is not None:
        raise SettingsError("passes of an image are not compared yet", str(later), "give the first pass alone")
    there = sorted(
        (source for source in sources if not source.node or source.node in nodes), key=lambda source: source.node
    )
    tasks: list[tuple[Source, ...]] = []
    for source in there:
        if tasks and tasks[-1][0].node == source.node and len(tasks[-1]) < _SOURCES_A_TASK:
            tasks[-1] = (*tasks[-1], source)
        else:
            tasks.append((source,))
    found: dict[int, stages.Found] = {}
    stage = Stage(
        "open",
        functools.partial(stages.open_sources, settings),
        lambda task: f"open {task[0].uri}" + (f" and {len(task) - 1} more" if len(task) > 1 else ""),
        lambda task: task[0].node,
        lambda result: {"images": len(result.images)},
    )
    runner.run(stage, tasks, found.__setitem__)
    left_out = [pair for number in range(len(tasks)) for pair in found[number].left_out]
    opened = [
        Opened("", source.node, _said(source, info), holes)
        for number in range(len(tasks))
        for source, info, holes in found[number].images
    ]
    opened += [Opened("", source.node, _unknown(source, settings), reached=False) for source in missing]
    if not opened:
        raise SettingsError("no image is left", sources[0].uri, "name the image files themselves")
    named = [replace(image.info, path=_location(image.info.path, image.node)) for image in opened]
    opened = [replace(image, image_id=i) for image, i in zip(opened, images.image_ids(named), strict=True)]
    return sorted(opened, key=lambda image: (image.info.scan_order, image.image_id)), left_out


def _location(path: str, node: str) -> str:
    return f"node://{node}{path}" if node else path


def _said(source: Source, info: ImageInfo) -> ImageInfo:
    """An image's description, with what the manifest says instead of what the image says."""
    return replace(
        info,
        image_id=source.image_id or info.image_id,
        host=source.host or info.host,
        tenant=source.tenant or info.tenant,
        kind=source.kind or info.kind,
        regions=tuple(map(sys.intern, info.regions)),  # in a fleet the same few names come again and again
    )


def _unknown(source: Source, settings: Settings) -> ImageInfo:
    """An image of which no more is known than the manifest says."""
    return _said(
        replace(source, image_id=source.image_id or str(source)),
        ImageInfo(
            path=source.uri,
            format="unknown",
            kind="guest",
            page_size=settings.page_size,
            pages=0,
            pages_absent=0,
            nbytes=0,
            fingerprint="",
        ),
    )
