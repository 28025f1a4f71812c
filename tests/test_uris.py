"""URIs of images: what they name, which are refused, with no server and no connection.

The file systems of gs, abfss and hdfs have no server here: of them it is tested that their URIs are understood.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ksmdist import images
from ksmdist.errors import ImageReadError, SettingsError
from ksmdist.images import ImageInfo, image_ids
from ksmdist.images.stores import store_of
from ksmdist.images.uris import parse_uri

from .conftest import PAGE


@pytest.mark.parametrize(
    ("uri", "kind", "path"),
    [
        ("s3://bucket/a/b.raw?region=eu-west-1", "S3FileSystem", "bucket/a/b.raw"),
        ("gs://bucket/a/b.raw", "GcsFileSystem", "bucket/a/b.raw"),
        ("abfss://container@account.dfs.core.windows.net/a/b.raw", "AzureFileSystem", "container/a/b.raw"),
    ],
)
def test_each_store_has_its_file_system(uri: str, kind: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made with no connection: there is none to be had for these."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    system, found = store_of(parse_uri(uri))
    assert (type(system).__name__, found) == (kind, path)


def test_hdfs_without_its_client_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Hadoop file system is made by libhdfs, which is not here: that it is asked for is what can be tested."""
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(ImageReadError, match="Hadoop's native client"):
        images.open_image("hdfs://127.0.0.1:1/a.raw")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://host/x.raw", "unknown scheme 'http'"),
        ("s3:///x.raw", "names no bucket"),
        ("file://host/x.raw", "write node://host/x.raw"),
        ("node://host/x.raw", "is on a node of a cluster"),
        ("s3://bucket/x.raw?endpoint=127.0.0.1", "unknown query key endpoint"),
        ("s3://key:hidden@bucket/x.raw", "has a password or key in it"),
        ("s3://hidden@bucket/x.raw", "has a password or key in it"),
        ("abfss://:hidden@account.dfs.core.windows.net/c/x.raw", "has a password or key in it"),
        ("abfss://c@account.dfs.core.windows.net/x.raw?client_secret=hidden", "has a password or key in it"),
        ("gs://bucket/x.raw?access_token=hidden", "has a password or key in it"),
        ("hdfs://user:hidden@host/x.raw", "has a password or key in it"),
        ("gs://bucket/x.raw?X-Goog-Signature=hidden&X-Goog-Date=1", "has a password or key in it"),
        ("hdfs://user@host/x.raw?api-key=hidden", "has a password or key in it"),
        ("s3://bucket/x.raw?endpoint_override=https://key:hidden@host:9000", "has a password or key in it"),
    ],
)
def test_uris_that_are_refused(uri: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        images.open_image(uri)
    assert "hidden" not in str(caught.value)


def info(path: str, image_id: str = "") -> ImageInfo:
    return ImageInfo(path, "raw", "guest", PAGE, 1, 0, PAGE, "", image_id)


def test_ids_of_images_in_stores() -> None:
    uris = ["s3://b/one/vm.raw?region=x", "s3://b/two/vm.raw?region=x", "s3://b/vm1.raw?endpoint_override=h:1"]
    assert image_ids([info(uri) for uri in uris]) == ["one/vm.raw", "two/vm.raw", "vm1"]
    assert image_ids([info("node://a/d/vm.raw"), info("node://b/d/vm.raw")]) == ["a/d/vm.raw", "b/d/vm.raw"]
    with pytest.raises(SettingsError, match="is given twice"):
        image_ids([info("s3://b/vm.raw"), info("s3://b/vm.raw?region=x")])
