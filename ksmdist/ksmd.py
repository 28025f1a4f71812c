"""What ksmd does, scan by scan, with the mappings of one content: the kernel's procedure, exactly.

Contents do not meet in ksmd, so each is followed by itself. Only the zero content and those whose
frames fork shares need it: for all others counters.py has the sum in closed form.
Rules: mm/ksm.c of Linux 6.18, cmp_and_merge_page, stable_tree_search, should_skip_rmap_item.
Pages are static and all there before the first scan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["OWN_FRAMES", "Settled", "Stretch", "is_processed", "processed_scans", "settle"]

OWN_FRAMES = -1
"""Frame of a Stretch each of whose mappings has a frame that no other mapping of the content has."""

_EARLY = (1, 2, 3, 4, 6, 9, 14)


class Stretch(NamedTuple):
    """Neighbours in scan order, of one content and image.

    image:  number of the image
    region: number of the region of the last of them, -1 for none
    frame:  number of the frame they all map, or OWN_FRAMES
    pages:  mappings, 1 or more
    """

    image: int
    region: int
    frame: int
    pages: int


def is_processed(scan: int) -> bool:
    """Whether smart_scan looks at an unmerged page in this scan, counted from 1, its first.

    should_skip_rmap_item and skip_age (mm/ksm.c, 6.7): ages below 3 always, then 1, 2, 4 and at last
    8 skips between looks. All pages there before the first scan have one age, so one schedule.
    """
    return scan in _EARLY or (scan > 14 and (scan - 14) % 9 == 0)


def processed_scans(scans: int) -> int:
    """How many of the first `scans` scans smart_scan looks at an unmerged page in."""
    return sum(scan <= scans for scan in _EARLY) + max(0, scans - 14) // 9


@dataclass(slots=True)
class Settled:
    """A content after the scans asked for, or once nothing changes any more.

    nodes:         stable nodes (KSM pages)
    merged:        mappings on them, by image
    within:        nodes all of whose mappings are one image's, by image
    left:          the mappings on none, in scan order
    unshared:      of those, how many are in the unstable tree: 0 or 1
    frames:        distinct frames of those
    skipped:       visits that smart_scan left out
    scans:         the scan after which nothing changed
    """

    nodes: int = 0
    merged: dict[int, int] = field(default_factory=dict)
    within: dict[int, int] = field(default_factory=dict)
    left: list[Stretch] = field(default_factory=list)
    unshared: int = 0
    skipped: int = 0
    scans: int = 1

    @property
    def merged_pages(self) -> int:
        """Mappings on stable nodes."""
        return sum(self.merged.values())

    @property
    def left_pages(self) -> int:
        """Mappings on none."""
        return sum(stretch.pages for stretch in self.left)

    @property
    def frames(self) -> int:
        """Distinct frames of the mappings on none."""
        own = sum(stretch.pages for stretch in self.left if stretch.frame == OWN_FRAMES)
        return own + len({stretch.frame for stretch in self.left if stretch.frame != OWN_FRAMES})


def settle(
    stretches: Sequence[Stretch], max_page_sharing: int | None, full_scans: int | None = None, smart_scan: bool = False
) -> Settled:
    """Follow one content's mappings through `full_scans` scans, or until nothing changes.

    stretches: in scan order; max_page_sharing None: no limit. smart_scan needs full_scans.
    """
    limit = max_page_sharing or 1 + sum(stretch.pages for stretch in stretches)
    content = _Content(limit)
    pending: list[Stretch] = list(stretches)
    unshared = scan = 0
    while full_scans is None or scan < full_scans:
        scan += 1
        if scan == 1:  # the first visit records the checksum: nothing enters a tree
            continue
        before = content.count
        skip = smart_scan and not is_processed(scan)
        pending, unshared = content.scan(pending, skip)
        if content.count > before:
            content.done.scans = scan
        elif not skip:
            break
    done = content.finish()
    done.scans = max(done.scans, min(2, scan))
    done.left = pending
    if full_scans is None:
        done.unshared = unshared
        return done
    # What is left stays so, and meets nobody in the scans to come.
    at_last = full_scans >= 2 and not (smart_scan and not is_processed(full_scans))
    done.unshared = unshared if at_last else 0
    if smart_scan and scan < full_scans:
        looks = processed_scans(full_scans) - processed_scans(scan)
        done.skipped += done.left_pages * (full_scans - scan - looks)
    return done


@dataclass(slots=True)
class _Node:
    """A stable node; owner: the one image all its mappings are of, None once there are two."""

    length: int
    owner: int | None


class _Content:
    """The stable nodes of one content. At most one has room: a new one is made only where none has."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._nodes: list[_Node] = []
        self._of_frame: dict[int, _Node] = {}
        self._open: _Node | None = None
        self.count = 0  # mappings merged so far
        self.done = Settled()

    def scan(self, pending: Iterable[Stretch], skip: bool) -> tuple[list[Stretch], int]:
        """One full scan over the mappings not merged yet; those left, and how many are in the unstable tree."""
        left: list[Stretch] = []
        tree: Stretch | None = None  # the content's entry in the unstable tree, also the last of `left` it is in
        at = 0
        for stretch in pending:
            image, _, frame, pages = stretch
            while pages:
                node = self._of_frame.get(frame) if frame != OWN_FRAMES else None
                if node is not None:  # a forked KSM page: appended whatever the limit
                    self._append(node, image, pages)
                    pages = 0
                elif skip:
                    self.done.skipped += pages
                    left.append(stretch._replace(pages=pages))
                    pages = 0
                elif self._open is not None:
                    some = min(pages, self._limit - self._open.length)
                    self._append(self._open, image, some)
                    pages -= some
                elif tree is None:
                    if frame == OWN_FRAMES:
                        pages = self._fill(image, pages)
                        some = min(pages, 1)
                    else:
                        some = pages  # the first waits, the others find their own frame there
                    if some:
                        tree, at = stretch, len(left)
                        left.append(stretch._replace(pages=some))
                        pages -= some
                elif tree.frame == frame != OWN_FRAMES:
                    left.append(stretch._replace(pages=pages))
                    pages = 0
                else:
                    self._meet(tree, image, frame)
                    waiting = left[at]
                    left[at] = waiting._replace(pages=waiting.pages - 1)
                    tree = None
                    pages -= 1
        return [stretch for stretch in left if stretch.pages], int(tree is not None)

    def _fill(self, image: int, pages: int) -> int:
        """Whole nodes out of an image's own frames; the pages that are over."""
        nodes, rest = divmod(pages, self._limit)
        if nodes:
            self.done.nodes += nodes
            self.done.within[image] = self.done.within.get(image, 0) + nodes
            self._count(image, pages - rest)
        return rest

    def _meet(self, tree: Stretch, image: int, frame: int) -> None:
        """Two pages that found no room make a node on the scanned page's frame."""
        node = _Node(0, image)
        self._nodes.append(node)
        if frame != OWN_FRAMES:
            self._of_frame[frame] = node
        self._open = node
        self._append(node, tree.image, 1)
        self._append(node, image, 1)

    def _append(self, node: _Node, image: int, pages: int) -> None:
        node.length += pages
        if node.owner != image:
            node.owner = None
        self._count(image, pages)
        if node is self._open and node.length >= self._limit:
            self._open = None

    def _count(self, image: int, pages: int) -> None:
        self.count += pages
        self.done.merged[image] = self.done.merged.get(image, 0) + pages

    def finish(self) -> Settled:
        """The result, its nodes counted."""
        self.done.nodes += len(self._nodes)
        for node in self._nodes:
            if node.owner is not None:
                self.done.within[node.owner] = self.done.within.get(node.owner, 0) + 1
        return self.done
