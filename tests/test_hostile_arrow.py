"""Memory images in Arrow from anyone: only what is right, or an error that says what to do; never a crash.

pyarrow takes a buffer's offsets on trust where it is not told to look, and reads where they lead: so what is changed
is read in a process of its own, of which a fault of the memory would be seen.
"""

from __future__ import annotations

import json
import random
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ksmdist.errors import ImageError, KsmdistError
from ksmdist.images import ipc
from ksmdist.images.arrow import StoredArrowImage
from ksmdist.images.files import LocalFile
from ksmdist.tables import MEMORY_IMAGE

from .conftest import PAGE, arrow_image, eligible, in_a_process, page
from .readers import checked_pages, exercise, pages_of

ROWS = [(n * PAGE, page(n % 5), eligible(), n, ("heap", "stack")[n % 2], 0) for n in range(7)]
KEYS = {"ksmdist.table": "memory_image", "ksmdist.version": "1", "ksmdist.page_size": str(PAGE)}


def rewritten(path: Path, to: Path, compression: str | None = None, stream: bool = False) -> Path:
    """The same image, compressed, or in the form of a stream."""
    with pa.ipc.open_file(path) as reader:
        options = pa.ipc.IpcWriteOptions(compression=compression)
        new = pa.ipc.new_stream if stream else pa.ipc.new_file
        with pa.OSFile(str(to), "wb") as sink, new(sink, reader.schema, options=options) as writer:
            for number in range(reader.num_record_batches):
                writer.write_batch(reader.get_batch(number))
    return to


class Held(LocalFile):
    """A local file that is read as an object of a store is."""

    block_bytes = 4 * PAGE

    def read_exactly(self, offset: int, nbytes: int, stop: Event | None = None) -> bytes:
        data = self.read(offset, nbytes)
        if len(data) < nbytes:
            raise ImageError("is cut off", self.path, "copy it again")
        return data

    def read_spans(self, spans: Sequence[tuple[int, int]], stop: Event | None = None) -> list[pa.Buffer]:
        return [pa.py_buffer(self.read_exactly(*span)) for span in spans]

    def in_order(self, tasks: Iterable[Callable[[Event], Any]], most: int | None = None) -> Iterator[Any]:
        return (task(Event()) for task in tasks)


def stored(path: Path) -> object:
    """What the reader of objects makes of it, checked like exercise()."""
    image = StoredArrowImage(Held(str(path)), PAGE)  # type: ignore[arg-type]
    try:
        return checked_pages(image)
    finally:
        image.close()


def local(path: Path) -> object:
    return pages_of(path)


def flip(folder: Path, seeds: range) -> None:
    """What a child does: reads images of which some bytes are changed, most of them no page's."""
    whole = arrow_image(folder / "whole", ROWS)
    forms = {
        "file": whole,
        "lz4": rewritten(whole, folder / "lz4", "lz4"),
        "zstd": rewritten(whole, folder / "zstd", "zstd"),
        "stream": rewritten(whole, folder / "stream", stream=True),
    }
    path = folder / "changed"
    ended = {form: {"read": 0, "refused": 0} for form in forms}
    for seed in seeds:
        rng = random.Random(seed)
        form = sorted(forms)[seed % len(forms)]
        data = forms[form].read_bytes()
        content = page(1)[:16]
        other = [at for at in range(0, len(data), 8) if data[at : at + 16] not in content * 2]
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.choice(other) + rng.randrange(8) if rng.random() < 0.9 else rng.randrange(len(changed))
            at = min(at, len(changed) - 1)
            changed[at] = rng.choice((0, 1, 127, 128, 255, changed[at] ^ 1 << rng.randrange(8)))
        if rng.random() < 0.3:
            at = min(rng.choice(other), len(changed) - 8)
            numbers = (-1, 5 * PAGE, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63), 1 << 20 | 5 << 32)
            changed[at : at + 8] = struct.pack("<q", rng.choice(numbers))
        if rng.random() < 0.1:
            del changed[rng.randrange(len(changed)) :]
        path.write_bytes(changed)
        for read in (local, stored) if form != "stream" else (local,):
            try:
                read(path)
                ended[form]["read"] += 1
            except KsmdistError:
                ended[form]["refused"] += 1
            except BaseException:
                print(seed, form, read.__name__, file=sys.stderr)
                raise
    print(json.dumps(ended))


def test_other_bytes_are_refused_or_read(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from tests.test_hostile_arrow import flip; "
    code += "flip(Path(sys.argv[1]), range(1200))"
    ended = in_a_process(code, tmp_path)
    for form in ("file", "lz4", "zstd"):
        assert min(ended[form].values()) > 20, ended
    # A stream has no footer, and is no image; cut off after whole pages it is raw memory like any file.
    assert ended["stream"]["read"] <= 1


def built(path: Path, names: pa.Array, content: pa.Array, codes: Sequence[int]) -> Path:
    """An image of two rows with these names of regions and contents, as they are."""
    schema = pa.schema([(column.name, column.type) for column in MEMORY_IMAGE.columns], metadata=KEYS)
    columns = {
        "address": pa.array([0, PAGE], pa.uint64()),
        "content": content,
        "flags": pa.array([eligible()] * 2, pa.uint32()),
        "numa_node": pa.array([0, 0], pa.int16()),
        "frame": pa.array([None, None], pa.uint64()),
        "region": pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), names, safe=False),
    }
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema))
    return path


def binary(kind: pa.DataType, offsets: Sequence[int], data: bytes) -> pa.Array:
    buffers = [None, pa.py_buffer(np.array(offsets, np.int32)), pa.py_buffer(data)]
    return pa.Array.from_buffers(kind, len(offsets) - 1, buffers)


GOOD_NAMES = binary(pa.string(), [0, 4, 9], b"heapstack")
GOOD_PAGES = binary(pa.binary(), [0, PAGE, 2 * PAGE], page(1) + page(2))


@pytest.mark.parametrize("read", [local, stored])
@pytest.mark.parametrize(
    ("names", "content", "codes"),
    [
        pytest.param(binary(pa.string(), [0, 1 << 30, 9], b"heapstack"), GOOD_PAGES, [0, 1], id="a name far outside"),
        pytest.param(binary(pa.string(), [0, -9, 9], b"heapstack"), GOOD_PAGES, [0, 1], id="a name before the start"),
        pytest.param(binary(pa.string(), [0, 4, 9], b"heap\xff\xfe\xfd__"), GOOD_PAGES, [0, 1], id="no UTF-8"),
        pytest.param(GOOD_NAMES, GOOD_PAGES, [0, 2], id="a region that is none"),
        pytest.param(GOOD_NAMES, GOOD_PAGES, [-7, 1], id="a region below 0"),
        pytest.param(
            GOOD_NAMES, binary(pa.binary(), [0, 1 << 30, 2 * PAGE], page(1) * 2), [0, 1], id="a page far outside"
        ),
        pytest.param(GOOD_NAMES, binary(pa.binary(), [0, -PAGE, 2 * PAGE], page(1) * 2), [0, 1], id="pages fall"),
        pytest.param(
            GOOD_NAMES, binary(pa.binary(), [0, 16, 2 * PAGE], page(1) * 2), [0, 1], id="pages of other lengths"
        ),
    ],
)
def test_what_lies_outside_of_its_buffer_is_refused(
    tmp_path: Path, read: Callable[[Path], object], names: pa.Array, content: pa.Array, codes: list[int]
) -> None:
    assert read(built(tmp_path / "good", GOOD_NAMES, GOOD_PAGES, [0, 1])) == {0: page(1), PAGE: page(2)}
    with pytest.raises(ImageError):
        read(built(tmp_path / "bad", names, content, codes))


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("said", [1 << 40, 1 << 32, -2, (1 << 63) - 1])
@pytest.mark.parametrize("read", [local, stored])
def test_a_compressed_buffer_unpacks_to_no_more_than_can_be(
    tmp_path: Path, codec: str, said: int, read: Callable[[Path], object]
) -> None:
    path = rewritten(arrow_image(tmp_path / "a", ROWS, batch=7), tmp_path / "b", codec)
    assert len(pages_of(path)) == 7
    data = bytearray(path.read_bytes())
    sizes = [at for at in range(0, len(data) - 8, 8) if data[at : at + 8] == struct.pack("<q", 7 * PAGE)]
    data[sizes[-1] : sizes[-1] + 8] = struct.pack("<q", said)
    path.write_bytes(data)
    with pytest.raises(ImageError, match="of no size that can be"):
        read(path)


def test_what_unpacks_to_less_than_it_says_is_refused() -> None:
    """pyarrow would give what the memory had before for the rest: another tenant's pages, or a key."""
    short = pa.compress(page(1), "lz4", asbytes=True)
    batch = ipc.RowBatch(7, np.zeros(6, np.int64), np.array([0]), np.array([8 + len(short)]), "lz4")
    for said in (PAGE, PAGE + 8, PAGE - 8, 7 * PAGE):
        packed = struct.pack("<q", said) + short

        def read(spans: Sequence[tuple[int, int]], packed: bytes = packed) -> list[pa.Buffer]:
            return [pa.py_buffer(packed[at : at + nbytes]) for at, nbytes in spans]

        if said == PAGE:
            assert ipc.unpacked(batch, read)[0].length.tolist() == [PAGE]
            continue
        with pytest.raises(ValueError, match="does not unpack to"):
            ipc.unpacked(batch, read)


def test_a_batch_that_is_listed_again_is_refused(tmp_path: Path) -> None:
    path = arrow_image(tmp_path / "a", ROWS, batch=7)
    data, nbytes = path.read_bytes(), path.stat().st_size
    at, length = ipc.footer_span(data, nbytes)
    _, batches = ipc.blocks_of(data[at : at + length], nbytes)
    block = struct.pack("<q", int(batches.offset[0]))
    listed = data.rindex(block)
    # The footer lists the batch's block once; it is made to say that there is one more, over what follows.
    footer = bytearray(data[at : at + length])
    assert footer.count(block) == 1
    counted = listed - at - 4
    assert footer[counted : counted + 4] == struct.pack("<I", 1)
    long = data[:at] + bytes(footer[:counted]) + struct.pack("<I", 64) + data[listed : listed + 24] * 64
    long += bytes(footer[counted + 28 :])
    path.write_bytes(long + struct.pack("<i", len(long) - at) + b"ARROW1")
    assert isinstance(exercise(path), ImageError)


def test_other_metadata_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = arrow_image(tmp_path / "a", ROWS)
    for name, few in (("_MOST_FOOTER", 16), ("_MOST_METADATA", 16)):
        with monkeypatch.context() as patched:
            patched.setattr(ipc, name, few)
            for read in (local, stored):
                with pytest.raises(ImageError, match="damaged Arrow file"):
                    read(path)
    monkeypatch.setattr("ksmdist.images.arrow._MOST_REGIONS", 1)
    for read in (local, stored):
        with pytest.raises(ImageError, match="2 names of regions"):
            read(path)
    monkeypatch.undo()
    assert len(pages_of(path)) == 7
