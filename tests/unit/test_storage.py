"""The store folder, and which store a URL means. S3 is tried on a real server in tests/integration."""

import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from servers import settings, untimed
from zlora.errors import StoreFailed
from zlora_worker.storage import FolderStore, S3Store, image_key, manifest_key, open_store


def stored(folder: Path) -> list[str]:
    """All files under a folder, drafts included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def read(url: str) -> bytes:
    parts = urlsplit(url)
    assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("file", "", "", "")
    return Path(unquote(parts.path)).read_bytes()


# --- keys


def test_keys_lie_under_the_job_s_own_prefix() -> None:
    assert image_key("job-1", 3, "webp") == "runs/job-1/outputs/3.webp"
    assert manifest_key("job-1") == "runs/job-1/manifest.json"


# --- the folder


def test_what_is_put_is_read_back_under_its_url(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "a store, 100% é?#")

    url = store.put("runs/job-1/outputs/0.png", b"picture", "image/png")

    assert read(url) == b"picture"
    assert stored(tmp_path / "a store, 100% é?#") == ["runs/job-1/outputs/0.png"]


@hypothesis_settings(untimed, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.binary(max_size=100), second=st.binary(max_size=100))
def test_a_second_put_replaces_the_first(tmp_path: Path, first: bytes, second: bytes) -> None:
    """A job that is drawn again after a redelivery stores the same keys."""
    store = FolderStore(tmp_path)

    urls = [store.put("runs/job-1/outputs/0.png", data, "image/png") for data in (first, second)]

    assert urls[0] == urls[1]
    assert read(urls[0]) == second
    assert stored(tmp_path) == ["runs/job-1/outputs/0.png"]


def test_a_reader_of_the_old_file_keeps_it_whole(tmp_path: Path) -> None:
    """The new file takes the name, and the old one's bytes are never written to."""
    store = FolderStore(tmp_path)
    url = store.put("key", b"old", "image/png")

    with Path(unquote(urlsplit(url).path)).open("rb") as reader:
        store.put("key", b"longer and new", "image/png")
        assert reader.read() == b"old"


def test_others_may_read_what_is_stored(tmp_path: Path) -> None:
    """A draft is private to the worker's user; a web server runs as another."""
    FolderStore(tmp_path).put("runs/x.png", b"picture", "image/png")

    assert stat.S_IMODE((tmp_path / "runs/x.png").stat().st_mode) == 0o644


def test_a_file_in_the_place_of_the_folder_is_a_failed_store(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("not a folder")

    with pytest.raises(StoreFailed, match=r"runs/x\.png") as raised:
        FolderStore(tmp_path / "store").put("runs/x.png", b"picture", "image/png")

    assert raised.value.retryable
    assert (tmp_path / "store").read_text() == "not a folder"


def test_a_folder_in_the_place_of_the_file_is_a_failed_store_and_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "runs/x.png").mkdir(parents=True)

    with pytest.raises(StoreFailed):
        FolderStore(tmp_path).put("runs/x.png", b"picture", "image/png")

    assert stored(tmp_path) == []


def test_a_disk_that_takes_no_more_is_a_failed_store_and_leaves_no_draft(tmp_path: Path) -> None:
    """Else each job of a full disk takes a bit more of it."""
    store = FolderStore(tmp_path)
    store.put("key", b"old", "image/png")

    with files_of_at_most(1000), pytest.raises(StoreFailed, match="File too large"):
        store.put("key", bytes(100_000), "image/png")

    assert stored(tmp_path) == ["key"]
    assert (tmp_path / "key").read_bytes() == b"old"


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full for this process: the kernel refuses each write past `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- which store


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    store = open_store(settings(tmp_path, ZLORA_STORE=(tmp_path / "a b").as_uri()))

    assert read(store.put("key", b"x", "image/png")) == b"x"
    assert stored(tmp_path) == ["a b/key"]


def test_the_default_store_is_in_the_data_folder(tmp_path: Path) -> None:
    open_store(settings(tmp_path)).put("key", b"x", "image/png")

    assert stored(tmp_path) == ["store/key"]


def test_an_s3_url_is_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    assert isinstance(open_store(settings(tmp_path, ZLORA_STORE="s3://bucket/prefix")), S3Store)
