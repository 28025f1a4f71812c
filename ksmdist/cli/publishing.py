"""The command that hands a run on: publish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ksmdist import options

__all__ = ["publish_command"]


def publish_command(
    run: options.RunDirectory,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The directory to make.")],
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            metavar="WHAT,...",
            help="Keep names of images, hosts, tenants, or the order of the images. [default: nothing]",
        ),
    ] = "",
    names: Annotated[
        Path | None,
        typer.Option(
            "--names",
            metavar="FILE",
            help="Keep the numbers of names here, for the next publication, and to look them up. Not to be handed on.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write a copy of a run that is fit to hand on: no digests, no addresses, no names."""
    from ksmdist.publish import publish  # pyarrow.compute takes 20 ms to import

    said = publish(run, out, [word.strip() for word in keep.split(",") if word.strip()], names)
    if as_json:
        print(json.dumps(said))
        return
    kept = ", ".join(said["kept"]) or "none"
    print(f"publication: {out}")
    print(f"tables: {len(said['tables'])}, of {said['images']:,} images; names kept: {kept}")
    if names is not None:
        print(f"numbers of names, not to be handed on: {names}")
    if said["caveats"]:
        print(f"note: the run has {said['caveats']:,} caveats; their texts name images and are left out")
    print("Sizes and counts are as they were, and may tell what an image is: docs/publish.md")
