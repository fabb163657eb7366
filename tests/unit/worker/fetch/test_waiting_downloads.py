"""Waiting for another process's download, and not for long if it is slow or stopped."""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

import pytest
from support.servers import (
    Request,
    caching,
    digest,
    got,
    kept,
    lora_bytes,
    named,
    reply,
    serving,
    told,
    with_etag,
)
from zlora.errors import LoraUnreachable
from zlora.schema import Asset
from zlora_worker.fetch import cache as cache_module
from zlora_worker.fetch.cache import CachedFile
from zlora_worker.fetch.file_lock import try_lock
from zlora_worker.fetch.transfer import Fetched

ONE = lora_bytes(1)
SIZE = len(ONE)


def test_a_slow_source_delays_the_same_content_from_a_good_source_only_briefly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both jobs get the same file in the end."""
    monkeypatch.setattr(cache_module, "_SAME_CONTENT", 0.2)
    begun, enough = Event(), Event()

    def slowly(_request: Request) -> Iterator[bytes]:
        whole = reply(ONE)
        rest = iter(whole[1000:])
        yield whole[:1000]
        begun.set()
        while not enough.wait(0.05):
            yield bytes([next(rest)])
        yield bytes(rest)

    with serving(slowly) as slow, serving(with_etag(ONE)) as good, ThreadPoolExecutor(1) as pool:
        try:
            with caching(tmp_path, slow) as one, caching(tmp_path, good) as other:
                first = pool.submit(got, one, Asset(url=f"{slow.url}/a", sha256=digest(ONE)))
                assert begun.wait(30)
                second = got(other, Asset(url=f"{good.url}/b", sha256=digest(ONE)))

                assert told(second) == (digest(ONE), SIZE, "network", ONE)
                assert 0.2 <= second.seconds < 5
                assert not first.done()
                enough.set()
                assert first.result(30).path == second.path
        finally:
            enough.set()
    assert kept(tmp_path) == named(ONE)


def test_the_same_content_from_two_quick_sources_is_one_download(tmp_path: Path) -> None:
    begun, go_on = Event(), Event()

    def in_two(_request: Request) -> Iterator[bytes]:
        whole = reply(ONE)
        yield whole[:1000]
        begun.set()
        go_on.wait(30)
        yield whole[1000:]

    with serving(in_two) as host, serving(with_etag(ONE)) as good, ThreadPoolExecutor(1) as pool:
        with caching(tmp_path, host) as one, caching(tmp_path, good) as other:
            first = pool.submit(got, one, Asset(url=f"{host.url}/a", sha256=digest(ONE)))
            assert begun.wait(30)
            asset = Asset(url=f"{good.url}/b", sha256=digest(ONE))

            assert got(other, asset, on_bytes=lambda *_: go_on.set()).tier == "disk"
            assert first.result(30).tier == "network"
        assert good.connections == 0


def test_a_process_that_looks_just_after_a_download_does_not_repeat_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look comes at once after the file has its name, before the downloader goes on."""
    second: list[Future[CachedFile]] = []
    with (
        serving(with_etag(ONE)) as host,
        caching(tmp_path, host) as one,
        caching(tmp_path, host) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        asset, replace = Asset(url=f"{host.url}/a"), os.replace

        def rename(source: Path, target: Path) -> None:
            replace(source, target)
            if source.parent.name == "drafts" and not second:
                second.append(pool.submit(got, other, asset, since=1.0))
                wait(second, timeout=0.5)

        monkeypatch.setattr(os, "replace", rename)
        assert got(one, asset, since=1.0).tier == "network"
        assert second[0].result(30).tier == "disk"
        assert host.connections == 1


def test_a_download_that_does_not_move_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process keeps its lock, and its draft does not grow."""
    monkeypatch.setattr(cache_module, "_STALLED", 0.2)
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        asset = Asset(url=f"{host.url}/a")
        with try_lock(cache._draft(asset)) as descriptor:
            assert descriptor is not None
            cache._draft(asset).write_bytes(ONE[:1000])
            assert told(got(cache, asset)) == (digest(ONE), SIZE, "network", ONE)

        assert got(cache, asset, since=1.0).tier == "disk"
    assert kept(tmp_path) == named(ONE)


def test_a_download_that_was_taken_over_still_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are those of the file that the other process has kept meanwhile."""
    monkeypatch.setattr(cache_module, "_STALLED", 0.2)
    begun, go_on = Event(), Event()
    with (
        serving(with_etag(ONE)) as host,
        caching(tmp_path, host) as stopped,
        caching(tmp_path, host) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        fetch = stopped._fetcher.fetch

        def stop(address: str, file: BinaryIO, **options: Any) -> Fetched:
            begun.set()
            go_on.wait(30)
            return fetch(address, file, **options)

        stopped._fetcher.fetch = stop  # type: ignore[method-assign]
        asset = Asset(url=f"{host.url}/a")
        first = pool.submit(got, stopped, asset)
        try:
            assert begun.wait(30)
            assert got(other, asset).tier == "network"
        finally:
            go_on.set()

        assert first.result(30).path.read_bytes() == ONE
    assert kept(tmp_path) == named(ONE)


def test_a_wait_reports_progress_and_ends_at_the_deadline(tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    with serving(reply(ONE)) as host, caching(tmp_path, host, ZLORA_LORA_DEADLINE="1") as cache:
        asset = Asset(url=f"{host.url}/a?sig=s3cret")
        with (cache._draft(asset)).open("wb") as draft, try_lock(cache._draft(asset)) as descriptor:
            assert descriptor is not None

            def grow(received: int, expected: int) -> None:
                progress.append((received, expected))
                draft.write(bytes(4096))
                draft.flush()

            with pytest.raises(LoraUnreachable, match="another process") as raised:
                got(cache, asset, on_bytes=grow)
        assert "s3cret" not in str(raised.value)
        assert progress[0] == (0, 0)
        assert progress[-1][0] == progress[-1][1] > 4096
        assert host.requests == []
