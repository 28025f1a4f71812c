"""Commands on image files: info, import, export."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, BinaryIO, TypeVar

import typer

from ksmdist import fleet, images, options, report
from ksmdist.errors import EXIT_HOLES, ImageError, RunDirectoryError, SettingsError
from ksmdist.images import Hole, Image, ImageInfo
from ksmdist.images.description import describe
from ksmdist.images.export import Exported, export_elf, export_raw
from ksmdist.report.terminal import MAX_ROWS

__all__ = ["export_command", "import_command", "info_command"]

T = TypeVar("T")


def info_command(
    sources: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Memory images: paths, globs, folders, URIs.")
    ],
    base: options.Base = None,
    format: options.Format = None,
    page_size: options.PageSize = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array, an object an image.")] = False,
) -> None:
    """Say what images are: format, producer, pages, address ranges, what was left out. No page is read."""
    found = []
    code = 0
    for source in sources:
        with _told() as failed:
            for path in _files_of(source):
                with _told() as broken, _opened([path], page_size, format, base) as (image,):
                    found.append(describe(image))
                code = code or broken[-1]
        code = code or failed[-1]
    # A piece of a split dump opens the whole of it.
    found = list({(one["path"], one["page_size"]): one for one in found}.values())
    if as_json:
        print(json.dumps(found))
    else:
        for number, one in enumerate(found):
            if number:
                print()
            report.render_info(one, sys.stdout)
    if code or any(one["holes"] for one in found):
        raise typer.Exit(code or EXIT_HOLES)


def _files_of(source: str) -> list[str]:
    parsed = fleet.parse(source)
    if parsed.node:
        raise SettingsError("is on a node of a cluster", source, "ask there, by its path")
    expanded = fleet.expand(parsed)
    for name, why in expanded.left_out:
        print(report.printable(f"{name}: {why}"), file=sys.stderr)
    return [one.uri for one in expanded.sources]


@contextmanager
def _told() -> Iterator[list[int]]:
    """Errors about an image are told, and its exit code kept, so that the next image has its turn."""
    codes = [0]
    try:
        yield codes
    except ImageError as error:
        print(report.printable(f"ksmdist: {error}"), file=sys.stderr)
        codes.append(error.exit_code)


@contextmanager
def _opened(
    paths: Sequence[str], page_size: int, format: str | None, base: Sequence[str] | None
) -> Iterator[list[Image]]:
    with ExitStack() as stack:
        opened = []
        for path in paths:
            opened.append(images.open_image(path, page_size, format, base or ()))
            stack.callback(opened[-1].close)
        yield opened


def import_command(
    sources: Annotated[list[str], typer.Argument(metavar="SRC...", help="Memory images in any format.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="X.arrow", help="The Arrow file to write; or a directory, for one each."),
    ],
    image_id: Annotated[str, typer.Option("--id", help="Name of the image. [default: the file's name]")] = "",
    tenant: Annotated[str, typer.Option("--tenant", help="Its owner. [default: as the image says]")] = "",
    host: Annotated[str, typer.Option("--host", help="The host it was taken on. [default: as the image says]")] = "",
    base: options.Base = None,
    format: options.Format = None,
    page_size: options.PageSize = 4096,
) -> None:
    """Write memory images as Arrow (table memory_image): several sources as one image, by address."""
    names = {"--id": image_id, "--tenant": tenant, "--host": host}
    for option, name in names.items():
        if not (name.isprintable() and len(name) <= 255):
            raise SettingsError(f"{name!r} cannot be", option, "give a text of a line, of 255 characters at most")
    with _opened([path for source in sources for path in _files_of(source)], page_size, format, base) as opened:
        holes = 0
        for group, target, name in _targets(_once(opened), out, image_id):
            write = partial(images.write_image, group, image_id=name, host=host, tenant=tenant)
            lost = _write_new(target, lambda path, write=write: write(path=str(path)))  # type: ignore[misc]
            known = sum(hole.pages for image in group for hole in image.holes)
            _say_lost(lost)
            missing = sum(hole.pages for _, hole in lost)
            pages = sum(image.info.pages for image in group) - missing + known
            print(f"{target}: image {report.printable(name)}, {pages:,} pages")
            report.render_filtered(
                [_filtered(name, image.info) for image in group if image.info.filter_level], sys.stdout
            )
            holes += missing
    if holes:
        raise typer.Exit(EXIT_HOLES)


def _say_lost(lost: Sequence[tuple[str, Hole]]) -> None:
    """What could not be read and is left out, (path, hole) each: a cut off image may have a million such."""
    for path, hole in lost[:MAX_ROWS]:
        said = f"{path}: {hole.pages:,} pages at {hole.address:#x} {hole.reason}: left out"
        print(report.printable(said), file=sys.stderr)
    if len(lost) > MAX_ROWS:
        pages = sum(hole.pages for _, hole in lost)
        more = f"... and {len(lost) - MAX_ROWS:,} holes more, {pages:,} pages in all"
        print(f"{more}: holes.parquet of a `ksmdist run` lists them", file=sys.stderr)


def _filtered(name: str, info: ImageInfo) -> dict[str, object]:
    return {"image_id": name, "filter_level": info.filter_level, "excluded": info.pages_excluded}


def _once(opened: Sequence[Image]) -> list[Image]:
    """Each image once: every piece of a split dump opens the whole of it, as a .vmss opens its .vmem."""
    kept: list[Image] = []
    whole = set()
    for image in opened:
        key = (os.path.realpath(image.info.path), image.info.parts)
        if not image.info.parts or key not in whole:
            kept.append(image)
        whole.add(key)
    return kept


def _targets(opened: Sequence[Image], out: Path, image_id: str) -> list[tuple[list[Image], Path, str]]:
    """What is written: images, file, name. Into a folder, one each; else all as one."""
    infos = [image.info for image in opened]
    if not out.is_dir():
        name = image_id or (infos[0].image_id or Path(infos[0].path).stem if len(infos) == 1 else out.stem)
        return [(list(opened), out, name)]
    if image_id and len(opened) > 1:
        raise SettingsError("names one image, and there are several", "--id", "import them one by one")
    ids = [image_id] if image_id else images.image_ids(infos)
    return [([image], out / f"{name.replace('/', '_')}.arrow", name) for image, name in zip(opened, ids, strict=True)]


def _write_new(target: Path, write: Callable[[Path], T]) -> T:
    """Write a file that is not there yet, 0600, under another name until it is whole; what `write` returns."""
    if target.exists():
        raise RunDirectoryError("exists", str(target), "choose another name with -o, or remove it")
    partial_path = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        os.close(os.open(partial_path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        done = write(partial_path)
        os.replace(partial_path, target)
        return done
    except OSError as error:
        raise RunDirectoryError(
            f"cannot be written: {os.strerror(error.errno) if error.errno else error}", str(target), "choose another -o"
        ) from None
    finally:
        partial_path.unlink(missing_ok=True)


_ENDINGS: dict[str, Callable[[Image, BinaryIO], Exported]] = {".raw": export_raw, ".elf": export_elf}


def export_command(
    source: Annotated[
        str, typer.Argument(metavar="IMAGE", help="A memory image in any format; a folder that holds one.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="X.raw|X.elf", help="The file to write, its format by its ending.")
    ],
    base: options.Base = None,
    format: options.Format = None,
    page_size: options.PageSize = 4096,
) -> None:
    """Write a memory image as a raw file (of a guest) or an ELF core."""
    if out.suffix not in _ENDINGS:
        raise SettingsError(f"ends in {out.suffix or 'nothing'!r}", str(out), f"use {' or '.join(_ENDINGS)}")
    with _opened(_files_of(source), page_size, format, base) as opened:
        image, *others = _once(opened)
        if others:
            raise SettingsError(
                f"is {1 + len(others)} images, and {out.name} can hold one", source, "export them one by one"
            )

        def write(path: Path) -> Exported:
            with open(path, "r+b") as sink:
                return _ENDINGS[out.suffix](image, sink)

        done = _write_new(out, write)
        print(f"{out}: {done.pages:,} pages")
        if done.without_bytes:
            print(f"{done.without_bytes:,} pages more have no bytes of their own (swapped, zero page): not in it")
        if image.info.filter_level:
            report.render_filtered([_filtered(images.image_ids([image.info])[0], image.info)], sys.stdout)
        if image.info.kind != "guest":
            print("its mappings, and which of its pages KSM may merge, are not in it: a run on it counts them all")
        _say_lost([(image.info.path, hole) for hole in done.holes])
    if done.holes:
        raise typer.Exit(EXIT_HOLES)
