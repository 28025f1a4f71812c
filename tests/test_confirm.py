"""Equal digests are claims: what --verify does about digests that several contents have."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import ksmdist
from ksmdist import confirm, digests, pipeline, reads, scans
from ksmdist.digests import Digester
from ksmdist.settings import Settings

from .conftest import DIGESTER, PAGE, ZERO, page

CONTENTS = [ZERO, b"\x6b" * PAGE, *(page(word) for word in range(1, 600))]


def weak(bits: int) -> Callable[..., bytes]:
    """xxh3_128 cut to its leading bits."""
    keep = ((1 << bits) - 1) << (128 - bits)

    def digest(content: Any, seed: int = 0) -> bytes:
        return (xxhash.xxh3_128_intdigest(content, seed) & keep).to_bytes(16, "big")

    return digest


def digest_of(content: bytes) -> bytes:
    return DIGESTER.digest(np.frombuffer(content, np.uint8).reshape(1, -1)).tobytes()


@pytest.fixture
def eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_page_digest", weak(8))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three images of 2,000 pages, of 600 contents: more than eight bits can tell apart."""
    draw = random.Random(7)
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for number in range(3):
        path = folder / f"vm{number}.raw"
        path.write_bytes(b"".join(draw.choices(CONTENTS, [200, 40, *[2] * 599], k=2000)))
        paths.append(path)
    return paths


def counted(paths: Sequence[Path]) -> Counter[bytes]:
    """The slow way: copies by page bytes."""
    found: Counter[bytes] = Counter()
    for path in paths:
        data = path.read_bytes()
        found.update(data[at : at + PAGE] for at in range(0, len(data), PAGE))
    return found


def tables(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.parquet"))}


def copies(run: Path) -> list[tuple[str, int]]:
    found = []
    for path in sorted(run.glob("stable_tree/*.parquet")):
        rows = pq.read_table(path).to_pylist()
        found += [(row["kind"], row["copies"]) for row in rows]
        assert len({row["digest"] for row in rows}) == len(rows)
    return sorted(found)


def kind_of(content: bytes) -> str:
    return "zero" if content == ZERO else "same_filled" if content == content[:8] * (PAGE // 8) else "other"


@pytest.mark.usefixtures("eight_bits")
def test_eight_bits_are_enough_where_pages_are_compared(images: list[Path], tmp_path: Path) -> None:
    truth = counted(images)
    runs = []
    for number, (shard_pages, ranges) in enumerate(((1 << 14, 1), (100, 8), (7, 2))):
        chosen = Settings(shard_pages=shard_pages, ranges=ranges, verify="bytes", fan_in=16)
        done = ksmdist.run(images, tmp_path / str(number), chosen, engine="inline")
        assert copies(done.path) == sorted((kind_of(content), n) for content, n in truth.items() if n > 1)
        assert done.summary["contents"]["shared"] == sum(n > 1 and content != ZERO for content, n in truth.items())
        pages = done.summary["pages"]
        assert pages["duplicate"] == sum(n for content, n in truth.items() if n > 1 and content != ZERO)
        assert pages["zero"] == truth[ZERO]
        assert done.summary["verified"]["collided"] >= 150
        assert any("turned out to be of several contents" in caveat for caveat in done.caveats)
        runs.append({name: data for name, data in tables(done.path).items() if not name.startswith("stable_tree")})
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.usefixtures("eight_bits")
def test_a_second_hash_sees_what_two_pages_of_a_content_show(images: list[Path], tmp_path: Path) -> None:
    done = ksmdist.run(images, tmp_path / "out", Settings(shard_pages=7, fan_in=16), engine="inline")
    truth = counted(images)
    assert done.summary["verified"]["collided"] >= 150
    assert done.summary["pages"]["zero"] == truth[ZERO]
    assert copies(done.path) == sorted((kind_of(content), n) for content, n in truth.items() if n > 1)


def test_each_image_shows_a_page_though_one_task_scans_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_page_digest", weak(1))
    zero = digest_of(ZERO)  # of one bit, which the other half of all pages has
    one, other = [page(word) for word in range(20) if digest_of(page(word)) != zero][:2]
    images = []
    for number, content in enumerate((one, other, one)):
        images.append(tmp_path / f"vm{number}.raw")
        images[-1].write_bytes(content)
    done = ksmdist.run(images, tmp_path / "out", Settings(), engine="inline")
    assert done.summary["verified"] == {"verify": "hash", "contents": 1, "pages": 2, "unread": 0, "collided": 1}
    assert copies(done.path) == [("other", 2)]


@pytest.mark.usefixtures("eight_bits")
def test_none_believes_the_digest(images: list[Path], tmp_path: Path) -> None:
    done = ksmdist.run(images, tmp_path / "out", Settings(verify="none"), engine="inline")
    assert done.summary["contents"]["shared"] <= 256
    assert done.summary["verified"] == {"verify": "none", "contents": 0, "pages": 0, "unread": 0, "collided": 0}
    assert done.summary["pages"]["zero"] == counted(images)[ZERO]  # known by its bytes all the same


@pytest.mark.parametrize("verify", ["hash", "bytes"])
def test_the_whole_digest_collides_never_and_all_modes_agree(images: list[Path], tmp_path: Path, verify: Any) -> None:
    plain = ksmdist.run(images, tmp_path / "none", Settings(verify="none", shard_pages=500), engine="inline")
    done = ksmdist.run(images, tmp_path / verify, Settings(verify=verify, shard_pages=500), engine="inline")
    assert tables(plain.path) == tables(done.path)
    found = done.summary["verified"]
    assert found["collided"] == 0 == found["unread"]
    assert found["pages"] > 1000
    assert found["contents"] == sum(n > 1 and kind_of(content) == "other" for content, n in counted(images).items())


IMAGES = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=30), min_size=1, max_size=4)


@given(drawn=IMAGES, bits=st.integers(0, 10), shard_pages=st.sampled_from([1, 3, 100]), ranges=st.sampled_from([1, 4]))
@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_equal_the_oracle_whatever_the_digest(
    drawn: list[list[int]], bits: int, shard_pages: int, ranges: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    paths = []
    for number, contents in enumerate(drawn):
        path = folder / f"vm{number}.raw"
        path.write_bytes(b"".join(CONTENTS[content] for content in contents))
        paths.append(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "_page_digest", weak(bits))
        patch.setattr(confirm, "_CHUNK_CONTENTS", 3)
        chosen = Settings(verify="bytes", shard_pages=shard_pages, ranges=ranges)
        done = ksmdist.run(paths, folder / "out", chosen, engine="inline")
    truth = counted(paths)
    assert copies(done.path) == sorted((kind_of(content), n) for content, n in truth.items() if n > 1)


def test_pages_of_other_nodes_are_shipped(images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that are all this machine: what is compared, and where, is as on several."""
    manifest = tmp_path / "fleet.yaml"
    nodes = ("localhost", "here", "there")
    manifest.write_text("".join(f"- {{uri: {p}, host: {h}}}\n" for p, h in zip(images, nodes, strict=True)))
    shipped: list[int] = []
    whole = confirm.ship

    def ship(*arguments: Any) -> confirm.Shipped:
        found = whole(*arguments)
        shipped.append(len(found.place))
        return found

    from ksmdist.engines.base import Machines
    from ksmdist.engines.inline import InlineEngine

    monkeypatch.setattr(InlineEngine, "machines", lambda self: Machines(frozenset(nodes), 1, 1 << 30))
    monkeypatch.setattr(confirm, "ship", ship)
    monkeypatch.setattr(digests, "_page_digest", weak(8))
    chosen, roots = Settings(verify="bytes"), [images[0].parent]
    done = ksmdist.run([], tmp_path / "out", chosen, engine="inline", manifest=str(manifest), manifest_roots=roots)
    assert sum(shipped) > 100
    assert copies(done.path) == sorted((kind_of(content), n) for content, n in counted(images).items() if n > 1)


@pytest.mark.usefixtures("eight_bits")
def test_a_run_is_taken_up_in_the_middle_of_telling_apart(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = Settings(verify="bytes", shard_pages=300, ranges=2)
    whole = ksmdist.run(images, tmp_path / "whole", chosen, engine="inline")
    combine = scans.combine_all

    def stop(*arguments: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(scans, "combine_all", stop)
    with pytest.raises(KeyboardInterrupt):
        ksmdist.run(images, tmp_path / "out", chosen, engine="inline")
    state = json.loads((tmp_path / "out.partial" / "work" / "confirmed.json").read_text())
    assert len(state["collided"]) >= 150
    monkeypatch.setattr(scans, "combine_all", combine)
    done = pipeline.resume(tmp_path / "out", engine="inline")
    assert tables(done.path) == tables(whole.path)
    assert done.summary["verified"] == whole.summary["verified"]


def test_a_page_that_cannot_be_read_again_is_not_confirmed(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = reads.read_again

    def some(*arguments: Any) -> Iterator[Any]:
        for number, found in enumerate(again(*arguments)):
            if number:
                yield found

    monkeypatch.setattr(confirm, "read_again", some)
    done = ksmdist.run(images, tmp_path / "out", Settings(), engine="inline")
    assert done.summary["verified"]["unread"] > 0
    assert any("is not confirmed" in caveat for caveat in done.caveats)


def test_what_collided_gets_names_of_its_own() -> None:
    rows = [page(1), page(2), page(1)]
    pages = np.frombuffer(b"".join(rows), np.uint8).reshape(3, PAGE)
    plain = Digester(7, 9)
    names = [row.tobytes() for row in plain.digest(pages)]
    told = Digester(7, 9, frozenset(names[:1]))
    found = [row.tobytes() for row in told.digest(pages)]
    assert found[0] == found[2] != names[0]
    assert found[0][:8] == names[0][:8]
    assert found[1] == names[1]
    again = [row.tobytes() for row in Digester(7, 9, frozenset((names[0], found[0]))).digest(pages)]
    assert again[0] not in (names[0], found[0])
    assert "7" not in repr(plain)
    groups: defaultdict[bytes, int] = defaultdict(int)
    for row in plain.witness(pages):
        groups[row.tobytes()] += 1
    assert sorted(groups.values()) == [1, 2]
