"""What is shipped, what is public, and errors that survive a trip through a worker."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ksmdist
from ksmdist import errors
from ksmdist.digests import Digester
from ksmdist.shards import Shard, default_ranges, default_shard_pages, pack_shards, plan_shards

ROOT = Path(__file__).parents[1]


def _tree(kind: type[errors.KsmdistError]) -> list[type[errors.KsmdistError]]:
    return [kind] + [below for sub in kind.__subclasses__() for below in _tree(sub)]


@pytest.mark.parametrize("kind", _tree(errors.KsmdistError))
def test_errors_pickle_with_their_fields(kind: type[errors.KsmdistError]) -> None:
    error = kind(what="is broken", where="x.raw", hint="mend it")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.exit_code) == ("x.raw: is broken; mend it", kind.exit_code)
    assert kind.__name__ in (errors.__doc__ or "")


def test_the_public_names() -> None:
    assert sorted(ksmdist.__all__) == ["KsmdistError", "Run", "Settings", "__version__", "load", "run", "whatif"]


def test_the_wheel_holds_the_package_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert names == {"ksmdist", f"ksmdist-{ksmdist.__version__}.dist-info"}
    page = {f"ksmdist/report/page/{path.name}" for path in (ROOT / "ksmdist" / "report" / "page").iterdir()}
    assert page
    assert page <= set(zipfile.ZipFile(wheel).namelist())


def test_shards_are_a_function_of_the_input() -> None:
    shards = plan_shards([5, 0, 3], 2)
    assert shards == [Shard(0, 0, 2), Shard(0, 2, 4), Shard(0, 4, 5), Shard(2, 0, 2), Shard(2, 2, 3)]
    packed = pack_shards(plan_shards([1] * 10, 4), 4)
    assert [len(group) for group in packed] == [4, 4, 2]
    assert [shard for group in packed for shard in group] == plan_shards([1] * 10, 4)
    assert [default_shard_pages(n) for n in (0, 1 << 19, 1 << 28)] == [1 << 14, 1 << 16, 1 << 18]
    assert [default_ranges(n) for n in (0, 1 << 17, 1 << 19, 1 << 22, 1 << 40)] == [1, 1, 2, 8, 1024]


def test_the_digest_is_xxh3_128_as_published() -> None:
    # XXH3 128 bit, seed 0, of 4096 zero bytes, as `xxhsum -H2` prints it
    assert Digester().of_word(0, 4096).hex() == "3ee8dc4f9e7ee49593d76fe148c689ba"


def test_constraints_hold_names_versions_and_hashes_alone() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"https?:|file:|--(extra-|find|index)| @ ", text)
    wanted = re.findall(
        r"^([A-Za-z0-9_.-]+)==\S+ ?(?:;[^\\\n]*)?\\\n((?:    --hash=sha256:[0-9a-f]{64}.*\n)+)", text, re.M
    )
    assert len(wanted) == len(re.findall(r"^[A-Za-z0-9]", text, re.M))
    assert {"ray", "pyarrow", "numpy", "xxhash", "mmh3", "typer", "rich"} <= {name for name, _ in wanted}
