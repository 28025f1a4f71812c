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
from ksmdist.images import Hole, ImageInfo, roots
from ksmdist.plan import UNPACK_S_PER_GIB
from ksmdist.scanned import Opened
from ksmdist.settings import Settings
from ksmdist.timings import Clock, Progress

__all__ = ["look", "opened", "packed_pages", "unpack_s"]

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
    more: Sequence[Source] = (),
    base: Sequence[str | os.PathLike[str]] = (),
    manifest_roots: Sequence[str | os.PathLike[str]] = (),
) -> Iterator[tuple[list[Opened], list[tuple[str, str]], engines.Choice, Engine]]:
    """Images in the order in which KSM scans them, files left out, and the engine, which is closed after use.

    A cluster's nodes look at the images themselves: the driver need not see them. more: images of an earlier run, by
    image_id: those of them that are here again are the first pass of these. base: files that those of `paths` are
    laid over. manifest_roots: where the manifest's images may lie besides its folder, as images.roots.root() has them.
    """
    sources = [replace(fleet.parse(os.fspath(path)), base=tuple(os.fspath(lower) for lower in base)) for path in paths]
    more_roots = tuple(os.fspath(root) for root in manifest_roots)
    if more_roots and manifest is None and not more:
        what = "goes with a manifest alone, or an earlier run without checksums"
        raise SettingsError(what, roots.OPTION, "give --manifest too, or leave it out")
    if manifest is not None:
        sources += fleet.read_manifest(manifest, more_roots)
    sources = list(map(fleet.absolute, sources))
    if not sources:
        raise SettingsError("no image was given", "IMAGE", "name one or more memory images, or a manifest")
    choice = engines.choose(engine, address, 0)
    if choice.address is None:
        inline = engines.start(engines.choose("inline", None, 0))
        opened, left_out = _look_twice(inline, sources, more, settings, strict)
        clock.lap("open", f"{len(opened)} images", progress)
        nbytes = sum(one.info.pages for image in opened for one in (image, *image.earlier)) * settings.page_size
        choice = engines.choose(engine, address, nbytes, unpack_s=unpack_s(opened, settings.page_size))
    progress.engine(choice.name, choice.why)
    runner = engines.start(choice)
    clock.lap("start", choice.name, progress)
    try:
        if choice.address is not None:
            opened, left_out = _look_twice(runner, sources, more, settings, strict)
            clock.lap("open", f"{len(opened)} images", progress)
        yield opened, left_out, choice, runner
    finally:
        runner.close()


def packed_pages(opened: Sequence[Opened]) -> int:
    """Pages of images and of their earlier passes that lie compressed one by one."""
    every = (one.info for image in opened for one in (image, *image.earlier))
    return sum(info.pages for info in every if info.format == "kdump")


def unpack_s(opened: Sequence[Opened], page_size: int) -> float:
    """Seconds that one CPU needs to unpack these pages."""
    return packed_pages(opened) * page_size / (1 << 30) * UNPACK_S_PER_GIB


def _look_twice(
    runner: Engine, sources: Sequence[Source], more: Sequence[Source], settings: Settings, strict: bool
) -> tuple[list[Opened], list[tuple[str, str]]]:
    """Open every source where it is, then those of an earlier run that are here again, which become first passes."""
    opened, left_out = look(runner, sources, settings, strict)
    ids = {image.image_id for image in opened}
    again = [source for source in more if source.image_id in ids]
    if not again:
        return opened, left_out
    before, out_of_reach = look(runner, again, settings, strict)
    first = {image.image_id: image for image in before if image.reached}
    left_out += out_of_reach
    for image in before:
        if not image.reached:
            left_out.append((str(image.info.path), f"its node is not in the cluster: {image.image_id} is not compared"))
    return [_after(first.get(image.image_id), image) for image in opened], left_out


def _after(first: Opened | None, image: Opened) -> Opened:
    """An image with one more pass before all others."""
    if first is None or not image.reached:
        return image
    earlier = (first, *(replace(one, number=one.number + 1) for one in image.earlier))
    return replace(image, number=image.number + 1, earlier=earlier)


def look(
    runner: Engine, sources: Sequence[Source], settings: Settings, strict: bool
) -> tuple[list[Opened], list[tuple[str, str]]]:
    """Open every source where it is; passes of an image come together in its last one."""
    nodes = runner.machines().nodes
    missing = [source for source in sources if source.node and source.node not in nodes]
    if missing and strict:
        names = sorted({source.node for source in missing})
        raise EngineError(
            f"{len(missing)} images are on nodes that are not in the cluster: {', '.join(names[:10])}",
            missing[0].uri,
            "start Ray there, with the label ksmdist-host=NAME where it goes by another name, or leave --strict out",
        )
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
    every = [image for number in range(len(tasks)) for image in found[number].images]
    opened = [
        Opened("", source.node, _said(source, info), holes, number=source.pass_number or 1)
        for source, info, holes in _once(every)
    ]
    opened += [
        Opened("", source.node, _unknown(source, settings), reached=False, number=source.pass_number or 1)
        for source in missing
    ]
    if not opened:
        raise SettingsError("no image is left", sources[0].uri, "name the image files themselves")
    images_of_run = _last_passes(_named(opened), left_out)
    return _salted(sorted(images_of_run, key=lambda image: (image.info.scan_order, image.image_id))), left_out


def _salted(images_of_run: Sequence[Opened]) -> list[Opened]:
    """The images with numbers for their salts, in scan order, and no salts: what is written from now on has none."""
    numbers = {"": 0}
    salted = []
    for image in images_of_run:
        salt = numbers.setdefault(image.info.salt, len(numbers))
        earlier = tuple(replace(one, info=replace(one.info, salt="")) for one in image.earlier)
        salted.append(replace(image, info=replace(image.info, salt=""), salt=salt, earlier=earlier))
    return salted


def _once(
    found: Sequence[tuple[Source, ImageInfo, tuple[Hole, ...]]],
) -> list[tuple[Source, ImageInfo, tuple[Hole, ...]]]:
    """The images, without those that another of their files, named as well, has given already.

    Each piece of a split dump opens the whole of it, as a .vmss opens its .vmem.
    """
    named = {(source.node, source.pass_number, os.path.realpath(source.uri)) for source, _, _ in found}
    kept = []
    seen = set()
    for source, info, holes in found:
        if info.parts and os.path.realpath(info.path) != os.path.realpath(source.uri):
            image = (source.node, source.pass_number, os.path.realpath(info.path))
            if image in named or image in seen:
                continue
            seen.add(image)
        kept.append((source, info, holes))
    return kept


def _named(opened: Sequence[Opened]) -> list[Opened]:
    """The images with their names, which are unique in each pass."""
    named = []
    for number in sorted({image.number for image in opened}):
        of_pass = [image for image in opened if image.number == number]
        infos = [replace(image.info, path=_location(image.info.path, image.node)) for image in of_pass]
        named += [replace(image, image_id=i) for image, i in zip(of_pass, images.image_ids(infos), strict=True)]
    return named


def _last_passes(opened: Sequence[Opened], left_out: list[tuple[str, str]]) -> list[Opened]:
    """The last pass of each image, with those before it; a pass out of reach is added to left_out, unless the last."""
    by_id: dict[str, list[Opened]] = {}
    for image in opened:  # by number, ascending
        by_id.setdefault(image.image_id, []).append(image)
    last = []
    for passes in by_id.values():
        for image in passes[:-1]:
            if not image.reached:
                why = f"its node is not in the cluster: pass {image.number} of {image.image_id} is not compared"
                left_out.append((_location(image.info.path, image.node), why))
        earlier = tuple(image for image in passes[:-1] if image.reached)
        last.append(replace(passes[-1], earlier=earlier if passes[-1].reached else ()))
    return last


def _location(path: str, node: str) -> str:
    return f"node://{node}{path}" if node else path


def _said(source: Source, info: ImageInfo) -> ImageInfo:
    """An image's description, with what the manifest says instead of what the image says."""
    return replace(
        info,
        image_id=source.image_id or info.image_id,
        host=source.host or info.host,
        tenant=source.tenant or info.tenant,
        salt=source.salt or info.salt,
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
