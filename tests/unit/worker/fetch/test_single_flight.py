"""Whose turn it is to bring a file: nobody is held up for long by whoever is slow, stopped or dead."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

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
from zlora.schema import Asset
from zlora_worker.fetch import single_flight
from zlora_worker.fetch.file_lock import alone

ONE = lora_bytes(1)
SIZE = len(ONE)


@pytest.mark.parametrize("drips", [True, False])
def test_the_same_pin_at_another_address_waits_for_a_slow_source_no_longer_than_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drips: bool
) -> None:
    """Whoever names a source that never ends does not hold up those who name a good one; both have one file."""
    monkeypatch.setattr(single_flight, "_SAME", 0.3)
    begun, enough = Event(), Event()

    def slowly(_request: Request) -> Iterator[bytes]:
        whole = reply(ONE)
        rest = iter(whole[1000:])
        yield whole[:1000]
        begun.set()
        while not enough.wait(0.05):
            yield bytes([next(rest)]) if drips else b""
        yield bytes(rest)

    with serving(slowly) as slow, serving(with_etag(ONE)) as good, ThreadPoolExecutor(1) as pool:
        try:
            with caching(tmp_path, slow) as one, caching(tmp_path, good) as other:
                first = pool.submit(got, one, Asset(url=f"{slow.url}/a", sha256=digest(ONE)))
                assert begun.wait(30)
                second = got(other, Asset(url=f"{good.url}/b", sha256=digest(ONE)))

                assert told(second) == (digest(ONE), SIZE, "network", ONE)
                assert 0.3 <= second.seconds < 5
                assert not first.done()
                enough.set()
                assert first.result(30).path == second.path
        finally:
            enough.set()
    assert kept(tmp_path) == named(ONE)


def test_a_process_that_is_stopped_over_a_download_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lives, so that the kernel keeps its lock, and its draft does not grow."""
    monkeypatch.setattr(single_flight, "_STALLED", 0.3)
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        asset = Asset(url=f"{host.url}/a")
        with alone(*cache._turn(asset).locks) as mine:
            assert mine
            cache._turn(asset).draft.write_bytes(ONE[:1000])
            assert told(got(cache, asset)) == (digest(ONE), SIZE, "network", ONE)
            cache._turn(asset).draft.unlink()

        assert got(cache, asset, since=1.0).tier == "disk"
    assert kept(tmp_path) == named(ONE)


def test_the_same_pin_at_another_address_is_one_download_where_that_is_quick(
    tmp_path: Path,
) -> None:
    begun = Event()

    def soon(_request: Request) -> Iterator[bytes]:
        whole = reply(ONE)
        yield whole[:1000]
        begun.set()
        Event().wait(0.2)
        yield whole[1000:]

    with serving(soon) as host, serving(with_etag(ONE)) as good, ThreadPoolExecutor(1) as pool:
        with caching(tmp_path, host) as one, caching(tmp_path, good) as other:
            first = pool.submit(got, one, Asset(url=f"{host.url}/a", sha256=digest(ONE)))
            assert begun.wait(30)

            assert got(other, Asset(url=f"{good.url}/b", sha256=digest(ONE))).tier == "disk"
            assert first.result(30).tier == "network"
        assert good.connections == 0
