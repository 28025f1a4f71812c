"""Files that `virsh save` writes: a header, the domain's XML, and QEMU's migration stream behind it.

Rules: libvirt, src/qemu/qemu_saveimage.h (virQEMUSaveHeader, in the byte order of the host that wrote it) and
qemu_saveimage.c (qemuSaveImageReadHeader; the codecs are those of qemuSaveFormat).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

import numpy as np

from ksmdist.errors import ImageError
from ksmdist.images.files import ImageFile
from ksmdist.images.packed import PackedFile, codec_of

__all__ = ["LIBVIRT", "SavedDomain", "WindowFile", "saved_domain"]

LIBVIRT = (b"LibvirtQemudSave", b"LibvirtQemudPart")
"""The first bytes of such a file, and of one whose saving has not ended."""

_HEADER_BYTES = 92
_VERSION = 2
_RAW, _SPARSE = "raw", "sparse"
_FORMATS = (_RAW, "gzip", "bzip2", "xz", "lzop", "zstd", _SPARSE)
_XML_BYTES = 1 << 16  # the name is among the first elements of a domain
_NAME = re.compile(rb"<name>([^<>\0]{1,200})</name>")


class WindowFile:
    """The bytes of a file from `start` on, as a file; it takes the file over."""

    unpacked = 0

    def __init__(self, file: ImageFile, start: int) -> None:
        self._file, self._start = file, start
        self.path, self.fingerprint, self.disk_nbytes = file.path, file.fingerprint, file.disk_nbytes
        self.nbytes = max(0, file.nbytes - start)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes from `offset` on: `nbytes`, or as many as there are."""
        return self._file.read(self._start + offset, nbytes)

    def data_extents(self) -> np.ndarray:
        """Byte ranges that are not holes: int64[n, 2], ascending."""
        data = np.maximum(self._file.data_extents() - self._start, 0)
        return np.asarray(data[data[:, 1] > 0], np.int64)

    def checked(self) -> None:
        """As of the file it is in."""
        self._file.checked()

    def close(self) -> None:
        """Let it go."""
        self._file.close()


@dataclass(frozen=True, slots=True)
class SavedDomain:
    """The stream of a saved domain: `file` from byte `start` on. name: of the domain; ended: saving has ended."""

    file: ImageFile
    start: int
    name: str
    ended: bool


def saved_domain(file: ImageFile) -> SavedDomain:
    """Find the stream in a file that begins with one of LIBVIRT; raises ImageError."""
    path = file.path
    head = file.read(0, _HEADER_BYTES)
    if len(head) < _HEADER_BYTES:
        raise ImageError(
            f"truncated: the header of a saved domain has {_HEADER_BYTES} bytes, it has {len(head)}",
            path,
            "copy it again, or save the domain again",
        )
    version, data_bytes, _, format, cookie = struct.unpack_from("<5I", head, 16)
    if version > _VERSION:
        version, data_bytes, _, format, cookie = struct.unpack_from(">5I", head, 16)
    if version > _VERSION:
        raise ImageError(f"is a saved domain of an unknown version ({version})", path, "dump the domain as ELF instead")
    start = _HEADER_BYTES + data_bytes
    if data_bytes == 0 or start >= file.nbytes:
        raise ImageError(
            f"truncated: its header has {data_bytes} bytes of XML, and the stream would begin behind them at byte "
            f"{start} of {file.nbytes}",
            path,
            "copy it again, or save the domain again",
        )
    xml = file.read(_HEADER_BYTES, min(data_bytes, cookie or data_bytes, _XML_BYTES))
    found = _NAME.search(xml)
    name = found.group(1).decode("utf-8", "replace") if found else ""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    if version == _VERSION and format >= len(_FORMATS):
        raise ImageError(f"is a saved domain compressed in an unknown way ({format})", path, "save it raw")
    known = _FORMATS[format] if version == _VERSION else _RAW
    stream = file
    if known not in (_RAW, _SPARSE):
        packed = file.read(start, 64)
        if known not in ("gzip", "xz", "zstd"):
            raise ImageError(
                f"is a saved domain, compressed with {known}, which is not read",
                path,
                f"unpack its stream: tail -c +{start + 1} FILE | {known} -dc > STREAM, and scan that",
            )
        if codec_of(packed) != known:
            raise ImageError(
                f"is a saved domain whose header says {known}, which the bytes behind it are not",
                path,
                "copy it again, or save the domain again",
            )
        stream, start = PackedFile(WindowFile(file, start), known), 0
    return SavedDomain(stream, start, name, head.startswith(LIBVIRT[0]))
