"""What the kernel's own tests and LTP's lay out in memory, and what they expect KSM to count, as a table.

Of tests that act on memory in phases each phase is a row: where nothing but the end state of a phase
is checked, that state from scratch counts the same. Left out, as no layout can show them:
- ksm_functional_tests.c: test_unmerge*, test_prot_none, test_prctl* beyond their layout: they check
  that MADV_UNMERGEABLE and prctl give back private pages.
- LTP ksm05, the race of CVE-2011-2183: a process dies of SIGSEGV while ksmd looks at its page; what
  is expected is that the host lives.
- ksm_tests.c -P, -D, -H as timings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ksmdist.layouts import Experiment, Process

__all__ = ["EDGES", "FORKS", "HUGE", "SCENARIOS", "Scenario"]

HUGE_PAGES = 512
LTP_PAGES = 256
LTP_ALL = 3 * LTP_PAGES


@dataclass(frozen=True)
class Scenario:
    """An experiment and the counters its source expects; `nodes`: NUMA nodes it needs."""

    name: str
    experiment: Experiment
    expected: Mapping[str, int] = field(default_factory=dict)
    nodes: int = 1


def sharing(shared: int, sharing: int, unshared: int = 0, **more: int) -> dict[str, int]:
    return {"pages_shared": shared, "pages_sharing": sharing, "pages_unshared": unshared, "pages_volatile": 0} | more


def alone(layout: str, **knobs: Any) -> Experiment:
    return Experiment((Process(layout),), **knobs)


def ltp(*layouts: str) -> Experiment:
    """ksm_test.h, create_same_memory: three processes, here of 1 MiB each where LTP has 128."""
    return Experiment(tuple(map(Process, layouts)), max_page_sharing=LTP_ALL, full_scans=3)


def filled(letter: str, pages: int = LTP_PAGES) -> str:
    return letter * pages


def merged_10(nodes: int, **knobs: Any) -> Experiment:
    """LTP ksm06: 100 pages of one content on each node."""
    return Experiment(
        tuple(Process(filled("a", 100), locked=True, node=node) for node in range(nodes)), 100 * nodes, **knobs
    )


SCENARIOS = [
    # tools/testing/selftests/mm/ksm_tests.c
    Scenario("ksm_tests -M -p 10", alone("x" * 10), sharing(1, 9)),
    Scenario("ksm_tests -U, merged", alone("xx"), sharing(1, 1)),
    Scenario("ksm_tests -U, written to", alone("UU"), sharing(0, 0, 2)),
    Scenario("ksm_tests -Z -p 10 -z 0", alone("0" * 10), sharing(1, 9, ksm_zero_pages=0)),
    Scenario("ksm_tests -Z -p 10 -z 1", alone("0" * 10, use_zero_pages=True), sharing(0, 0, ksm_zero_pages=10)),
    Scenario("ksm_tests -N -m 1", Experiment((Process("x", node=0), Process("x", node=1))), sharing(1, 1), nodes=2),
    Scenario(
        "ksm_tests -N -m 0",
        Experiment((Process("x", node=0), Process("x", node=1)), merge_across_nodes=False),
        sharing(0, 0, 2),
        nodes=2,
    ),
    Scenario(
        "ksm_tests -C, of 50 pairs",
        alone("".join(2 * letter for letter in "abcdefghijklmnopqstuvwxyzABCDEFGHIJKLMNOPQRSTVWXYZ")),
        sharing(50, 50),
    ),
    Scenario("ksm_tests -H -s 2", Experiment((Process("x" * HUGE_PAGES, huge=True),)), sharing(2, 510)),
    # tools/testing/selftests/mm/ksm_functional_tests.c
    Scenario("test_unmerge", alone("x" * HUGE_PAGES), sharing(2, 510)),
    Scenario(
        "test_unmerge_zero_pages",
        alone("0" * HUGE_PAGES, use_zero_pages=True),
        sharing(0, 0, ksm_zero_pages=HUGE_PAGES),
    ),
    Scenario(
        "test_unmerge_zero_pages, first half given back",
        alone("." * (HUGE_PAGES // 2) + "0" * (HUGE_PAGES // 2), use_zero_pages=True),
        sharing(0, 0, ksm_zero_pages=HUGE_PAGES // 2),
    ),
    Scenario("test_unmerge_discarded", alone("." * 256 + "x" * 256), sharing(1, 255)),
    Scenario(
        "test_fork_ksm_merging_page_count, scanned after the fork",
        Experiment((Process("x" * HUGE_PAGES), Process("-" * HUGE_PAGES, forked_from=0))),
    ),
    # LTP testcases/kernel/mem/ksm; ksm02 to ksm04 are ksm01 in a cpuset, in a memory cgroup, in both
    Scenario("ltp ksm01 1", ltp(filled("c"), filled("a"), filled("a")), sharing(2, LTP_ALL - 2)),
    Scenario("ltp ksm01 2", ltp(filled("c"), filled("b"), filled("a")), sharing(3, LTP_ALL - 3)),
    Scenario("ltp ksm01 3", ltp(filled("d"), filled("d"), filled("d")), sharing(1, LTP_ALL - 1)),
    Scenario(
        "ltp ksm01 4", ltp(filled("d"), filled("d", LTP_PAGES - 1) + "U", filled("d")), sharing(1, LTP_ALL - 2, 1)
    ),
    Scenario("ltp ksm06, merge_across_nodes 1", merged_10(2), sharing(1, 199), nodes=2),
    Scenario("ltp ksm06, merge_across_nodes 0", merged_10(2, merge_across_nodes=False), sharing(2, 198), nodes=2),
    Scenario("ltp ksm06, one node", merged_10(1), sharing(1, 99)),
    # ksm07 asks that half of the visits or more are skipped; the schedule of skip_age() says 22 of 30
    Scenario("ltp ksm07", alone("a", smart_scan=True, full_scans=30), {"pages_skipped": 22}),
]

EDGES = [
    Scenario(
        f"{copies} copies, max_page_sharing {limit}",
        alone("x" * copies, max_page_sharing=limit),
        sharing(nodes, copies - nodes - lone, lone)
        | ({"stable_node_chains": 1, "stable_node_dups": nodes} if nodes > 1 else {"stable_node_chains": 0}),
    )
    for limit, copies, nodes, lone in [
        (limit, times * limit + over, times + (over == 2), int(over == 1))
        for limit in (2, 3, 10, 256)
        for times in (1, 2)
        for over in (0, 1, 2)
        if over < limit
    ]
]
"""A content with as many copies as fit, one more (it stays lone), two more (they make a node)."""


def family(layout: str, children: int = 1, huge: bool = False, at: int = 0) -> tuple[Process, ...]:
    """A process, the one at `at`, and children that leave all pages as they are."""
    child = Process("-" * len(layout), forked_from=at, huge=huge)
    return (Process(layout, huge=huge), *(child for _ in range(children)))


def forked(*families: tuple[Process, ...], **knobs: Any) -> Experiment:
    return Experiment(tuple(process for processes in families for process in processes), **knobs)


FORKS = [
    Scenario("twins of one frame wait", forked(family("UUUUU")), sharing(0, 0, 5) | {"pages_volatile": 5}),
    Scenario("two frames, four mappings, all fit", forked(family("xx"), max_page_sharing=4), sharing(1, 3)),
    Scenario(
        "two frames, four mappings, two fit: a twin follows its frame over the limit",
        forked(family("xx"), max_page_sharing=2),
        sharing(1, 2, 1),
    ),
    Scenario(
        "two frames, eight mappings, two fit",
        forked(family("xx", 3), max_page_sharing=2),
        sharing(1, 4, 1) | {"pages_volatile": 2},
    ),
    # Frames pair up once a scan where all mappings of one are neighbours: 2 + log2(16) scans.
    Scenario(
        "sixteen frames of eight mappings still meet in the sixth scan",
        forked(*(family("x", 7, at=8 * number) for number in range(16)), max_page_sharing=2, full_scans=6),
        sharing(15, 109, 1) | {"pages_volatile": 3},
    ),
]


def huge(*layouts: str, small: str = "", locked: bool = False, **knobs: Any) -> Experiment:
    """Processes of one huge page each, filled up with unique pages, then one with small pages."""
    processes = [Process(layout.ljust(HUGE_PAGES, "U"), huge=True, locked=locked) for layout in layouts]
    return Experiment((*processes, *([Process(small)] if small else [])), full_scans=6, **knobs)


def ones(*experiments: tuple[str, Experiment, tuple[int, int, int, int], tuple[int, int, int, int]]) -> list[Scenario]:
    """Scenarios with use_zero_pages 0 and 1, and (shared, sharing, unshared, ksm_zero_pages) of each."""
    return [
        Scenario(
            f"{name}, use_zero_pages {zeros}",
            replace(experiment, use_zero_pages=bool(zeros)),
            sharing(*counts[:3], ksm_zero_pages=counts[3]),
        )
        for name, experiment, *both in experiments
        for zeros, counts in enumerate(both)
    ]


HUGE = ones(
    ("unique", huge(""), (0, 0, 512, 0), (0, 0, 512, 0)),
    ("256 zeros", huge("0" * 256), (0, 0, 256, 0), (0, 0, 256, 0)),
    ("256 zeros, locked", huge("0" * 256, locked=True), (1, 255, 256, 0), (0, 0, 256, 256)),
    ("a zero", huge("0"), (0, 0, 512, 0), (0, 0, 511, 0)),
    ("a zero in each of two", huge("0", "0"), (0, 0, 1023, 0), (0, 0, 1022, 0)),
    ("a zero in each of three", huge("0", "0", "0"), (0, 0, 1534, 0), (0, 0, 1533, 0)),
    ("a zero in each of two, locked", huge("0", "0", locked=True), (1, 1, 1022, 0), (0, 0, 1022, 2)),
    ("two zeros, then one", huge("00", "0"), (0, 0, 1022, 0), (0, 0, 1021, 0)),
    ("a zero, and a small one", huge("0", small="0"), (0, 0, 512, 0), (0, 0, 511, 1)),
    ("a zero, and two small ones", huge("0", small="00"), (1, 1, 511, 0), (0, 0, 511, 2)),
    ("two copies", huge("aa"), (1, 1, 510, 0), (1, 1, 510, 0)),
    ("five copies where two fit", huge("aaaaa", max_page_sharing=2), (2, 2, 508, 0), (2, 2, 508, 0)),
    ("two copies and ten zeros", huge("aa" + "0" * 10), (1, 1, 500, 0), (1, 1, 500, 0)),
)
"""A merge attempt splits a huge page, and splitting makes its zeros mappings of the shared zero page (6.12)."""
