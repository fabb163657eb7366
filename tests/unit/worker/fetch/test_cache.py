"""LoRA files on disk: one file for each content, asked for once, checked before it is kept."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from support.servers import (
    Request,
    by_path,
    caching,
    digest,
    got,
    kept,
    lora_bytes,
    named,
    reply,
    serving,
    tensor_file,
    told,
    with_etag,
)
from zlora.errors import (
    CacheFull,
    InvalidSetting,
    JobRevoked,
    JobTimeout,
    LoraCorrupt,
    LoraError,
    LoraForbidden,
    LoraNotFound,
    LoraUnreachable,
    NotSafetensors,
)
from zlora.schema import Asset
from zlora_worker.fetch.cache import Cache

ONE, TWO, THREE = (lora_bytes(fill) for fill in (1, 2, 3))
SIZE = len(ONE)


def forget_failures(folder: Path) -> None:
    """As if they were a while ago."""
    for path in (folder / "loras/failed").iterdir():
        path.unlink()


# --- one file for each content


def test_a_file_is_kept_under_its_digest(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        file = got(cache, Asset(url=f"{host.url}/a.safetensors?sig=s3cret#fr4g"))

    assert told(file) == (digest(ONE), SIZE, "network", ONE)
    assert file.source == f"{host.url}/a.safetensors"
    assert file.seconds > 0
    assert kept(tmp_path) == named(ONE)


def test_the_second_use_costs_one_conditional_request(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        first, second = (got(cache, Asset(url=f"{host.url}/a")) for _ in range(2))

        assert (first.tier, second.tier) == ("network", "disk")
        assert second.path == first.path
        assert [request.headers.get("if-none-match") for request in host.requests] == [
            None,
            f'"{digest(ONE)}"',
        ]


def test_another_worker_of_the_machine_finds_the_file(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host:
        with caching(tmp_path, host) as cache:
            got(cache, Asset(url=f"{host.url}/a"))
        with caching(tmp_path, host) as cache:
            assert got(cache, Asset(url=f"{host.url}/a")).tier == "disk"


def test_a_file_that_changed_at_its_address_is_fetched_anew(tmp_path: Path) -> None:
    contents = {"/a": ONE}
    with serving(by_path(contents)) as host, caching(tmp_path, host) as cache:
        got(cache, Asset(url=f"{host.url}/a"))
        contents["/a"] = TWO

        changed, again = (got(cache, Asset(url=f"{host.url}/a")) for _ in range(2))

    assert told(changed) == (digest(TWO), SIZE, "network", TWO)
    assert again.tier == "disk"
    assert kept(tmp_path) == named(ONE, TWO)


def test_without_an_etag_a_file_is_fetched_each_time(tmp_path: Path) -> None:
    """Nothing says that it still is what it was."""
    with serving(reply(ONE)) as host, caching(tmp_path, host) as cache:
        tiers = [got(cache, Asset(url=f"{host.url}/a")).tier for _ in range(2)]

    assert tiers == ["network", "network"]
    assert kept(tmp_path) == named(ONE)


def test_the_same_bytes_under_two_addresses_are_one_file(tmp_path: Path) -> None:
    with serving(by_path({"/a": ONE, "/b": ONE})) as host, caching(tmp_path, host) as cache:
        one, other = (got(cache, Asset(url=f"{host.url}/{name}")) for name in "ab")

    assert one.path == other.path
    assert kept(tmp_path) == named(ONE)


def test_addresses_that_differ_in_their_query_are_two(tmp_path: Path) -> None:
    with serving(by_path({"/a?v=1": ONE, "/a?v=2": TWO})) as host, caching(tmp_path, host) as cache:
        digests = [
            got(cache, Asset(url=f"{host.url}/a?v={version}")).sha256 for version in (1, 2, 1)
        ]

    assert digests == [digest(ONE), digest(TWO), digest(ONE)]


def test_a_hub_s_file_that_is_here_costs_a_head(tmp_path: Path) -> None:
    def answer(request: Request) -> bytes:
        return reply(
            b"" if request.method == "HEAD" else ONE, length=SIZE, X_Cozy_SHA256=digest(ONE)
        )

    with serving(answer) as host, caching(tmp_path, COZY_HUB_URL=host.url) as cache:
        first, second = (got(cache, Asset(cozy_ref="loras/anime-v1")) for _ in range(2))

        assert (first.tier, second.tier) == ("network", "disk")
        assert [line.partition(" ")[0] for line in host.asked] == ["HEAD", "GET", "HEAD"]
        assert first.source == "cozy://loras/anime-v1"


@pytest.mark.parametrize("is_here", [True, False])
@pytest.mark.parametrize("sends_on", [True, False])
def test_what_a_storage_names_where_a_hub_sends_on_is_not_believed(
    tmp_path: Path, is_here: bool, sends_on: bool
) -> None:
    """It could choose any file that is here; the bytes are fetched, and are the hub's."""

    def storage_answer(request: Request) -> bytes:
        return reply(
            b"" if request.method == "HEAD" else ONE, length=SIZE, X_Cozy_SHA256=digest(TWO)
        )

    with serving(storage_answer) as storage, serving(with_etag(TWO)) as elsewhere:

        def hub(request: Request) -> bytes:
            if sends_on or request.method == "HEAD":
                return reply(status=307, Location=f"{storage.url}/b")
            return reply(ONE, X_Cozy_SHA256=digest(ONE))

        with (
            serving(hub) as host,
            caching(tmp_path, storage, elsewhere, COZY_HUB_URL=host.url) as cache,
        ):
            if is_here:
                got(cache, Asset(url=f"{elsewhere.url}/a"))

            assert told(got(cache, Asset(cozy_ref="loras/x"))) == (
                digest(ONE),
                SIZE,
                "network",
                ONE,
            )
            assert [line.partition(" ")[0] for line in host.asked] == ["HEAD", "GET"]


@pytest.mark.parametrize("is_stale", [True, False])
def test_a_file_of_hugging_face_is_the_one_that_it_names(tmp_path: Path, is_stale: bool) -> None:
    """What is asked for by its digest is not asked about by its version: an old one may be what a mirror answers."""
    named_now, bodies = [ONE], [ONE]

    def answer(request: Request) -> bytes:
        if request.method == "HEAD":
            return reply(X_Linked_ETag=f'"{digest(named_now[-1])}"')
        if "if-none-match" in request.headers:
            return reply(status=304, length=None)
        return reply(bodies[-1], ETag='"one"')

    with serving(answer) as host, caching(tmp_path, HF_ENDPOINT=host.url) as cache:
        asset = Asset(url="hf://owner/repo/x.safetensors")
        assert got(cache, asset).path.read_bytes() == ONE
        named_now.append(TWO)
        bodies.append(ONE if is_stale else TWO)

        if is_stale:
            with pytest.raises(LoraCorrupt):
                got(cache, asset)
        else:
            assert told(got(cache, asset)) == (digest(TWO), SIZE, "network", TWO)
        assert [request.method for request in host.requests] == ["HEAD", "GET", "HEAD", "GET"]
        assert kept(tmp_path) == (named(ONE) if is_stale else named(ONE, TWO))


# --- pins


def test_a_pinned_file_that_is_here_costs_no_request(tmp_path: Path) -> None:
    """From wherever it came."""
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        got(cache, Asset(url=f"{host.url}/a"))

        file = got(cache, Asset(url="https://elsewhere.example/b?sig=s3cret", sha256=digest(ONE)))

        assert told(file) == (digest(ONE), SIZE, "disk", ONE)
        assert file.source == "https://elsewhere.example/b"
        assert host.asked == ["GET /a"]


def test_a_pinned_file_that_is_not_here_is_fetched(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        assert told(got(cache, Asset(url=f"{host.url}/a", sha256=digest(ONE)))) == (
            digest(ONE),
            SIZE,
            "network",
            ONE,
        )


def test_bytes_that_are_not_those_of_the_pin_are_corrupt_and_not_kept(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        with pytest.raises(LoraCorrupt) as raised:
            got(cache, Asset(url=f"{host.url}/a?sig=s3cret", sha256=digest(TWO)))

        assert all(
            part in str(raised.value) for part in (f"{host.url}/a", digest(ONE), digest(TWO))
        )
        assert "s3cret" not in str(raised.value)
        assert kept(tmp_path) == {}


def test_a_pin_holds_for_a_file_that_the_source_says_has_not_changed(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        got(cache, Asset(url=f"{host.url}/a"))

        with pytest.raises(LoraCorrupt):
            got(cache, Asset(url=f"{host.url}/a", sha256=digest(TWO)))

        assert kept(tmp_path) == named(ONE)


# --- what is not kept


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01." + bytes(100), "pickle"),
        (b"PK\x03\x04" + bytes(100), "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs"),
        (b"", "0 bytes"),
        (ONE[:-1], "bytes, but its header"),
        (tensor_file({"a": {"dtype": "F17", "shape": [1], "data_offsets": [0, 1]}}, b"x"), "F17"),
    ],
)
def test_what_is_no_safetensors_file_is_refused_by_its_source_and_not_kept(
    tmp_path: Path, data: bytes, word: str
) -> None:
    with serving(with_etag(data)) as host, caching(tmp_path, host) as cache:
        for _ in range(2):
            with pytest.raises(NotSafetensors, match=word) as raised:
                got(cache, Asset(url=f"{host.url}/a?sig=s3cret"))

            assert str(raised.value).startswith(f"{host.url}/a: ")
            assert "s3cret" not in f"{raised.value} {raised.value.details}"
            assert kept(tmp_path) == {}
        assert list((tmp_path / "loras/index").iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (reply(status=404), LoraNotFound),
        (reply(ONE[:-1], length=SIZE), LoraUnreachable),
        (b"", LoraUnreachable),
    ],
)
def test_a_fetch_that_fails_leaves_nothing(
    tmp_path: Path, answer: bytes, kind: type[LoraError]
) -> None:
    with serving(answer) as host, caching(tmp_path, host) as cache, pytest.raises(kind):
        got(cache, Asset(url=f"{host.url}/a"))

    assert kept(tmp_path) == {}


def test_a_failed_fetch_costs_the_earlier_file_nothing(tmp_path: Path) -> None:
    contents = {"/a": ONE}
    with serving(by_path(contents)) as host, caching(tmp_path, host) as cache:
        got(cache, Asset(url=f"{host.url}/a"))
        contents["/a"] = b"<html>down for maintenance</html>"
        with pytest.raises(NotSafetensors):
            got(cache, Asset(url=f"{host.url}/a"))
        contents["/a"] = ONE
        forget_failures(tmp_path)

        assert got(cache, Asset(url=f"{host.url}/a")).tier == "disk"


@pytest.mark.parametrize(
    "address", ["https://example.com/\ud800", "https://a/?sig=\ud800&b=\ud800", "https://[::1", "?"]
)
def test_an_address_that_no_url_can_say_is_a_lora_error(tmp_path: Path, address: str) -> None:
    """JSON can carry half of a surrogate pair, UTF-8 cannot; and urllib refuses some in words of its own."""
    with caching(tmp_path) as cache:
        for _ in range(2):
            with pytest.raises(LoraError):
                got(cache, Asset(url=address))


# --- a download that is watched


def test_a_download_is_heard_of_and_a_cached_file_is_not(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        for _ in range(2):
            got(cache, Asset(url=f"{host.url}/a"), on_bytes=lambda *piece: heard.append(piece))
        got(
            cache,
            Asset(url=f"{host.url}/a", sha256=digest(ONE)),
            on_bytes=lambda *piece: heard.append(piece),
        )

    assert (heard[0], heard[-1], heard.count((0, 0))) == (
        (0, 0),
        (0, 0),
        2,
    )  # each time that the source is asked
    assert heard[-2] == (SIZE, SIZE)
    assert sum(received == SIZE for received, _ in heard) == 1


@pytest.mark.parametrize(
    "error",
    [JobRevoked("cancelled"), JobTimeout(), RuntimeError("any"), KeyboardInterrupt()],
)
def test_what_a_watcher_raises_ends_the_download_and_arrives_as_it_is(
    tmp_path: Path, error: BaseException
) -> None:
    """Nothing is left and nothing remembered: the next use fetches the file."""

    def end(_received: int, _expected: int) -> None:
        raise error

    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        with pytest.raises(BaseException) as raised:  # noqa: PT011 - which one is looked at below
            got(cache, Asset(url=f"{host.url}/a"), on_bytes=end)
        assert kept(tmp_path) == {}
        assert list((tmp_path / "loras/index").iterdir()) == []

        assert told(got(cache, Asset(url=f"{host.url}/a"))) == (digest(ONE), SIZE, "network", ONE)
    assert raised.value is error


# --- a folder that others have touched


def test_a_file_that_somebody_deleted_is_fetched_anew(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        got(cache, Asset(url=f"{host.url}/a")).path.unlink()

        assert told(got(cache, Asset(url=f"{host.url}/a"))) == (digest(ONE), SIZE, "network", ONE)
        got(cache, Asset(url=f"{host.url}/a")).path.unlink()
        assert got(cache, Asset(url=f"{host.url}/a", sha256=digest(ONE))).tier == "network"


@pytest.mark.parametrize(
    "data", [ONE[:-1], TWO, b"", ONE[:-1] + b"\xff"], ids=["cut", "another", "empty", "one byte"]
)
@pytest.mark.parametrize("restarted", [False, True])
def test_a_file_that_is_not_what_its_name_says_is_fetched_anew(
    tmp_path: Path, data: bytes, restarted: bool
) -> None:
    """Changed while the worker runs, or before it started: no receipt names a digest that the bytes do not have."""
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        for pin in ({}, {"sha256": digest(ONE)}):
            got(cache, Asset(url=f"{host.url}/a", **pin)).path.write_bytes(data)
            fetcher = cache._fetcher
            user = (
                Cache(tmp_path / "loras", max_bytes=10**9, free_bytes=0, fetcher=fetcher)
                if restarted
                else cache
            )

            assert told(got(user, Asset(url=f"{host.url}/a", **pin))) == (
                digest(ONE),
                SIZE,
                "network",
                ONE,
            )

        assert kept(tmp_path) == named(ONE)


@pytest.mark.parametrize("pin", [{}, {"sha256": digest(ONE)}])
def test_a_cache_that_somebody_cleared_is_filled_anew(tmp_path: Path, pin: dict[str, str]) -> None:
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        got(cache, Asset(url=f"{host.url}/a", **pin))
        shutil.rmtree(tmp_path / "loras")

        assert told(got(cache, Asset(url=f"{host.url}/a", **pin))) == (
            digest(ONE),
            SIZE,
            "network",
            ONE,
        )


@pytest.mark.parametrize("folder", ["drafts", "files", "index"])
def test_a_folder_that_cannot_be_written_is_a_typed_error(tmp_path: Path, folder: str) -> None:
    """A disk error is an error of this worker: the same request may succeed on another."""
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        (tmp_path / "loras" / folder).rmdir()
        (tmp_path / "loras" / folder).touch()

        with pytest.raises(CacheFull) as raised:
            got(cache, Asset(url=f"{host.url}/a"))

    assert raised.value.retryable


def test_a_cache_that_cannot_be_made_is_a_setting_without_sense(tmp_path: Path) -> None:
    (tmp_path / "loras").touch()

    with pytest.raises(InvalidSetting, match="ZLORA_LORA_CACHE"), caching(tmp_path):
        pass


def test_a_lock_or_a_draft_that_somebody_left_is_no_hindrance(tmp_path: Path) -> None:
    """Of a process that was killed in mid-download: its lock is the kernel's to let go of."""
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        asset = Asset(url=f"{host.url}/a", sha256=digest(ONE))
        for path in cache._turn(asset).locks:
            path.touch()
        cache._turn(asset).draft.write_bytes(bytes(2 * SIZE))

        assert told(got(cache, asset)) == (digest(ONE), SIZE, "network", ONE)
        assert kept(tmp_path) == named(ONE)


def test_a_file_that_is_deleted_while_its_source_is_asked_gets_no_empty_one_for_it(
    tmp_path: Path,
) -> None:
    """The source says that it has not changed, and nothing comes."""
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        asset = Asset(url=f"{host.url}/a")
        path, answer = got(cache, asset).path, host.answer

        def delete(request: Request) -> bytes | Iterable[bytes]:
            path.unlink(missing_ok=True)
            return answer(request)

        host.answer = delete
        with pytest.raises(CacheFull):
            got(cache, asset)
        assert kept(tmp_path) == {}

        assert told(got(cache, asset)) == (digest(ONE), SIZE, "network", ONE)


def test_a_draft_that_is_another_s_gets_no_name(tmp_path: Path) -> None:
    """Whoever clears the cache lets a second process begin where a first has not ended."""
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        asset = Asset(url=f"{host.url}/a")

        def clear(_received: int, _expected: int) -> None:
            cache._turn(asset).draft.unlink()
            cache._turn(asset).draft.write_bytes(b"half of a file")

        with pytest.raises(CacheFull):
            got(cache, asset, on_bytes=clear)

        assert kept(tmp_path) == {}
        assert told(got(cache, asset)) == (digest(ONE), SIZE, "network", ONE)


@pytest.mark.parametrize(
    "other", [{"COZY_TENANT_ID": "b"}, {"COZY_HUB_TOKEN": "b"}, {"HF_TOKEN": "b"}]
)
def test_what_a_worker_was_told_is_not_another_s_with_other_credentials(
    tmp_path: Path, other: dict[str, str]
) -> None:
    """They may share a folder; what a source lets one have, and why it refuses, is for each to hear."""
    asset = Asset(cozy_ref="loras/x")
    ours: dict[str, Any] = {"COZY_TENANT_ID": "a", "COZY_HUB_TOKEN": "a"}
    answers = [
        reply(X_Cozy_SHA256=digest(ONE)),
        reply(ONE, X_Cozy_SHA256=digest(ONE)),
        reply(status=403),
    ]
    with serving(lambda _: answers.pop(0)) as host:
        hub: dict[str, Any] = {"COZY_HUB_URL": host.url}
        with caching(tmp_path, host, **hub, **ours) as cache:
            got(cache, asset)
        with (
            caching(tmp_path, host, **hub, **(ours | other)) as cache,
            pytest.raises(LoraForbidden),
        ):
            got(cache, asset, since=1.0)
        with caching(tmp_path, host, **hub, **ours) as cache:
            assert got(cache, asset, since=1.0).tier == "disk"
    assert answers == []
