"""CRIU checkpoints: the pages of one process, or of memory that processes share, and whether KSM may merge them.

An image is a pagemap-PID.img or pagemap-shmem-ID.img; its pages, its parents and its mappings are in files beside it
(pagemaps, vmas). Eligible are the pages of private mappings that are marked MADV_MERGEABLE, as in what `ksmdist
capture` writes; without mm-PID.img nothing says which are, and all count as eligible. Pages of shared, hugetlb and
special mappings are flagged `file`: KSM never merges them. A page that another file should hold and does not is a
hole: that file is `missing`, or `truncated`; missing are also pages that were to be sent lazily and are not here.

Raises ImageError: see pagemaps and vmas.
"""

from __future__ import annotations

import posixpath
import re
from contextlib import ExitStack
from dataclasses import replace

import numpy as np

from ksmdist.images.base import Format, Hole, Image, ImageInfo, joined_ranges
from ksmdist.images.extents import Extents, extent_image
from ksmdist.images.files import ImageFile
from ksmdist.images.pagemaps import MISSING, PAGEMAP, TRUNCATED, CheckpointPages, PlacedRuns, read_pages
from ksmdist.images.uris import local_path, parse_uri
from ksmdist.images.vmas import Vmas, command_of, read_vmas
from ksmdist.tables import PAGE_FLAGS

__all__ = ["CRIU", "is_checkpoint_part"]

_FILTER = "CRIU: pages mapped to the zero page and unchanged pages of files are not in a checkpoint"
_NO_MM = (
    "mm-{}.img is not beside it, so that nothing says which of its mappings are shared, and which mergeable: "
    "all its pages count as mergeable"
)
_NONE_MARKED = "none of its mappings is marked mergeable: --eligible all counts as if they were"
_SHMEM = "is memory that processes share: KSM never merges it, and no page of it counts"
_PUNCHED = (
    "{} has holes, in which {} of the pages lie: these count as zero pages; `criu dedup` leaves a hole where a later "
    "checkpoint has the page, a copying tool where it is zeros"
)
_BEHIND = "pages-*.img has {} pages more than its pagemap names: these are not counted"

_PAGEMAP_NAME = re.compile(r"(pagemap-(?:(\d+)|shmem-\d+)\.img)")
_REASONS = ((MISSING, "missing"), (TRUNCATED, "truncated"))

# criu/image-desc.c, but for the pagemaps.
_PARTS = re.compile(
    r"(?:inventory|reg-files|ext-files|ns-files|eventfd|eventpoll|eventpoll-tfd|signalfd|inotify|inotify-wd|fanotify"
    r"|fanotify-mark|pipes|pipes-data|fifo|fifo-data|pstree|unixsk|inetsk|packetsk|netlinksk|sk-queues|itimers"
    r"|remap-fpath|memfd|binfmt-misc|tty|tty-info|tty-data|filelocks|tunfile|cgroup|timerfd|cpuinfo|seccomp|files"
    r"|bpfmap-file|bpfmap-data|apparmor|pidfd|irmap-cache"
    r"|(?:fdinfo|core|ids|mm|vmas|sigacts|itimers|posix-timers|creds|utsns|ipcns-(?:var|shm|msg|sem)|fs|ghost-file"
    r"|tcp-stream|mountpoints|netdev|netns|ifaddr|route6?|rule|ip6?tables|nftables|autofs|binfmt-misc|rlimit"
    r"|pages(?:-shmem)?|signal-[sp]|userns|netns-(?:ct|exp)|timens|pidns)-[0-9a-f]+"
    r"|tmpfs-(?:dev-)?\d+\.tar\.gz)\.img"
    r"|stats-(?:dump|restore)|irmap-cache"
)


def is_checkpoint_part(name: str) -> bool:
    """Whether a file of this name, in a folder of images, belongs to a CRIU checkpoint and is no image itself."""
    return _PARTS.fullmatch(name) is not None


def _open(file: ImageFile, page_size: int) -> Image:
    local = local_path(file.path)
    base = posixpath.basename(parse_uri(file.path).path if local is None else local)
    named = _PAGEMAP_NAME.match(base)
    name, pid = (named[1], named[2]) if named else ("", None)
    with ExitStack() as opened:
        found = read_pages(file, name, page_size, opened)
        vmas = read_vmas(file, pid, page_size) if pid else None
        command = command_of(file, pid) if pid else ""
        extents, absent = _extents(found.runs, vmas, page_size, shared=bool(name) and not pid)
        holes = []
        for source, reason in _REASONS:
            lost = found.runs.some(found.runs.source == source)
            spans = joined_ranges(lost.first, lost.last).tolist()
            holes += [Hole(first * page_size, last - first, reason) for first, last in spans]
        parts = [*((pages.path, pages.fingerprint) for pages in found.files), *found.parts]
        info = ImageInfo.of(
            file,
            "criu",
            "process",
            page_size,
            extents.pages,
            absent,
            producer=f"CRIU ({command})" if command else "CRIU",
            filter_level=_FILTER,
            caveats=_caveats(found, vmas, name, pid, page_size),
            parts=tuple(parts if vmas is None else [*parts, vmas.part]),
            regions=() if vmas is None else vmas.names,
        )
        info = replace(info, nbytes=info.nbytes + found.nbytes + sum(pages.disk_nbytes for pages in found.files))
        image = extent_image(found.files, info, extents, tuple(sorted(holes, key=lambda hole: hole.address)))
        opened.pop_all()
    file.close()  # all of it has been read
    return image


def _extents(runs: PlacedRuns, vmas: Vmas | None, page_size: int, shared: bool) -> tuple[Extents, int]:
    """Runs that can be read, with what their mappings say of them; pages of mappings that are not in `runs`.

    shared: it is all memory that processes share. Pages that lie in no mapping have no flags.
    """
    flags = np.full(len(runs.first), PAGE_FLAGS["file" if shared else "eligible"], np.uint32)
    region, absent = np.full(len(flags), -1, np.int32), 0
    if vmas is not None:
        mapped, which = runs.cut(vmas.first, vmas.last)
        absent = int((vmas.last - vmas.first).sum()) - mapped.pages
        gaps = runs.outside(mapped.first, mapped.last)
        rest, _ = runs.cut(gaps[:, 0], gaps[:, 1])
        order = np.argsort(np.concatenate((mapped.first, rest.first)), kind="stable")
        flags = np.concatenate((vmas.flags[which], np.zeros(len(rest.first), np.uint32)))[order]
        region = np.concatenate((vmas.region[which], np.full(len(rest.first), -1, np.int32)))[order]
        runs = PlacedRuns(
            *(
                np.concatenate((getattr(mapped, name), getattr(rest, name)))[order]
                for name in ("first", "last", "source", "place")
            )
        )
    here = runs.source >= 0
    found = runs.some(here)
    return Extents(
        found.first,
        found.last - found.first,
        found.place * page_size,
        file=found.source,
        flags=flags[here],
        region=None if vmas is None else region[here],
    ), absent


def _caveats(found: CheckpointPages, vmas: Vmas | None, name: str, pid: str | None, page_size: int) -> tuple[str, ...]:
    """What the counts do not show."""
    caveats = []
    if name and not pid:
        caveats.append(_SHMEM)
    elif vmas is None:
        caveats.append(_NO_MM.format(pid or "PID"))
    elif not vmas.mergeable:
        caveats.append(_NONE_MARKED)
    if found.behind:
        caveats.append(_BEHIND.format(found.behind))
    for number, pages in enumerate(found.files):
        punched = _punched(found.runs.some(found.runs.source == number), pages.data_extents(), page_size)
        if punched:
            caveats.append(_PUNCHED.format(posixpath.basename(pages.path), punched))
    return tuple(caveats)


def _punched(runs: PlacedRuns, data: np.ndarray, page_size: int) -> int:
    """How many pages of runs that are all in one file lie in holes of it; others are in a hole for good reason: those
    of a parent that a later checkpoint has. data: byte ranges that are none, int64[n, 2], ascending."""
    held = PlacedRuns.of(runs.place, runs.place + runs.last - runs.first, 0)
    low, high = data[:, 0] // page_size, -(-data[:, 1] // page_size)
    low[1:] = np.maximum(low[1:], high[:-1])  # a page with an end of one range and the start of the next
    empty = held.outside(low[low < high], high[low < high])
    return int((empty[:, 1] - empty[:, 0]).sum())


CRIU = Format("criu", lambda head: head.startswith(PAGEMAP), _open)
"""CRIU's pagemaps."""
