"""Files beside that of an image, which may or may not be there."""

from __future__ import annotations

import os

from ksmdist.errors import ImageError
from ksmdist.images.files import ImageFile, LocalFile, open_file, path_beside
from ksmdist.images.folders import folders_of
from ksmdist.images.roots import check_beside
from ksmdist.images.stores import StoredFile
from ksmdist.images.uris import local_path

__all__ = ["open_sibling", "read_whole"]


def open_sibling(file: ImageFile, name: str) -> LocalFile | StoredFile | None:
    """Open `name`, a relative path, in the folder of `file`; None if nothing is there.

    Raises ImageReadError: what is there and cannot be opened, or is a link out of the folder (roots.check_beside()).
    """
    path = path_beside(file.path, name)
    check_beside(path, file.path)
    local = local_path(path)
    if local is not None and "/" in name:  # one link at a time: the kernel follows 40 of a path
        path = os.path.join(os.path.realpath(os.path.dirname(local)), os.path.basename(name))
    folders = folders_of(path)
    return None if folders.entry(folders.path) is None else open_file(path)


def read_whole(file: ImageFile, most: int) -> bytes:
    """All bytes of a small file. Raises ImageError where it has more than `most`."""
    if file.nbytes > most:
        raise ImageError(f"has {file.nbytes} bytes, more than such a file ever has", file.path, "check what it is")
    return file.read(0, file.nbytes)
