"""Options and arguments that several commands have: type, name and help, once; and settings made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ksmdist.errors import SettingsError
from ksmdist.images import FORMATS
from ksmdist.settings import KERNELS, Settings

__all__ = [
    "Address",
    "Base",
    "Engine",
    "FanIn",
    "Format",
    "FullScans",
    "Image",
    "Json",
    "Kernel",
    "KeyFile",
    "Manifest",
    "ManifestRoot",
    "MaxPageSharing",
    "MergeAcrossNodes",
    "NoKey",
    "PageSize",
    "PagesToScan",
    "Quiet",
    "Ranges",
    "RunDirectory",
    "ShardPages",
    "SleepMillisecs",
    "SmartScan",
    "Sources",
    "TaskMemory",
    "UseZeroPages",
    "with_knobs",
]

Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="IMAGE...",
        help="Memory images, in any format of docs/images.md, compressed too: paths, globs, directories, URIs "
        "(s3://, gs://, abfss://, hdfs://), or node://NAME/path for what one node of the cluster has.",
    ),
]
Base = Annotated[
    list[str] | None,
    typer.Option(
        "--base",
        metavar="FILE",
        help="Raw images are Diff snapshots over this file: a hole is unchanged memory. Again: laid over the last.",
    ),
]
Manifest = Annotated[
    str | None,
    typer.Option("--manifest", metavar="FLEET", help="A YAML or Parquet file that names images; docs/clusters.md."),
]
ManifestRoot = Annotated[
    list[str] | None,
    typer.Option(
        "--manifest-root",
        metavar="DIR",
        help="Where a manifest's images, or those of --previous, may lie besides its own folder: a folder, "
        "node://NAME/dir, s3://bucket/prefix, or / for anywhere. Again for more.",
    ),
]
TaskMemory = Annotated[
    int | None,
    typer.Option("--task-memory", metavar="MIB", help="Most memory of a task, in MiB. [default: by the machines]"),
]
ShardPages = Annotated[
    int | None, typer.Option("--shard-pages", help="Pages in a shard. [default: by the size of the input]")
]
Ranges = Annotated[
    int | None, typer.Option("--ranges", help="Digest ranges, a power of two. [default: by the size of the input]")
]
FanIn = Annotated[
    int,
    typer.Option("--fan-in", metavar="N", help="Most results of scans that a merge reads; more are combined first."),
]
PageSize = Annotated[int, typer.Option("--page-size", help="Bytes in a page.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format", help=f"Force the format: {', '.join(known.name for known in FORMATS)}. [default: by magic]"
    ),
]
KeyFile = Annotated[
    str | None,
    typer.Option(
        "--key-file",
        metavar="FILE",
        help="The key that hashes are seeded with: 64 hexadecimal digits. [default: KSMDIST_KEY, or the user's]",
    ),
]
NoKey = Annotated[bool, typer.Option("--no-key", help="Hash without a key, as anybody could: for test vectors.")]
Engine = Annotated[str, typer.Option("--engine", help="auto, inline or ray.")]
Address = Annotated[str | None, typer.Option("--address", help="A running Ray cluster. [default: RAY_ADDRESS, if set]")]
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
UseZeroPages = Annotated[
    bool | None,
    typer.Option("--use-zero-pages/--no-use-zero-pages", help="As /sys/kernel/mm/ksm/use_zero_pages."),
]
MaxPageSharing = Annotated[
    str | None,
    typer.Option("--max-page-sharing", metavar="N", help="As /sys/kernel/mm/ksm/max_page_sharing; or unlimited."),
]
MergeAcrossNodes = Annotated[
    bool | None,
    typer.Option("--merge-across-nodes/--no-merge-across-nodes", help="As /sys/kernel/mm/ksm/merge_across_nodes."),
]
Kernel = Annotated[
    str | None, typer.Option("--kernel", help=f"Whose rules and counters: {', '.join(KERNELS)}. [default: 6.18]")
]
FullScans = Annotated[
    int | None,
    typer.Option("--full-scans", metavar="N", help="Counters after N scans. [default: once nothing changes]"),
]
SmartScan = Annotated[
    bool | None,
    typer.Option("--smart-scan/--no-smart-scan", help="With --full-scans: skip pages as smart_scan does."),
]
PagesToScan = Annotated[
    int | None, typer.Option("--pages-to-scan", help="As the kernel's, for the estimate of time. [default: 100]")
]
SleepMillisecs = Annotated[
    int | None, typer.Option("--sleep-millisecs", help="As the kernel's, for the estimate of time. [default: 20]")
]
Image = Annotated[str | None, typer.Option("--image", metavar="ID", help="This image alone.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


def with_knobs(settings: Settings, **knobs: object) -> Settings:
    """The settings with these instead, None left as it is; raises SettingsError."""
    given = {name: value for name, value in knobs.items() if value is not None}
    limit = given.get("max_page_sharing")
    if limit is not None:
        text = str(limit)
        if text != "unlimited" and not (text.isascii() and text.isdecimal()):
            raise SettingsError(f"{text!r} is not a number", "max_page_sharing", "use 2 or more, or unlimited")
        given["max_page_sharing"] = None if text == "unlimited" else int(text)
    return replace(settings, **given)  # type: ignore[arg-type]  # Settings checks them
