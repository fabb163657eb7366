"""The LoRA cache: one file for each content, asked for once, checked before it is kept."""

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
    LoraNotAllowed,
    LoraNotFound,
    LoraTooLarge,
    LoraUnreachable,
    NotSafetensors,
)
from zlora.schema import Asset
from zlora_worker.fetch.cache import Cache

ONE, TWO, THREE = (lora_bytes(fill) for fill in (1, 2, 3))
SIZE = len(ONE)


def forget_failures(folder: Path) -> None:
    """Act as if the failures were some time ago."""
    for path in (folder / "loras/failed").iterdir():
        path.unlink()


# --- one file for each content


def test_a_file_is_kept_under_its_sha256(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        file = got(cache, Asset(url=f"{host.url}/a.safetensors?sig=s3cret#fr4g"))

    assert told(file) == (digest(ONE), SIZE, "network", ONE)
    assert file.source == f"{host.url}/a.safetensors"
    assert file.seconds > 0
    assert kept(tmp_path) == named(ONE)


def test_a_second_use_costs_one_conditional_request(tmp_path: Path) -> None:
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


def test_a_changed_file_is_downloaded_again(tmp_path: Path) -> None:
    contents = {"/a": ONE}
    with serving(by_path(contents)) as host, caching(tmp_path, host) as cache:
        got(cache, Asset(url=f"{host.url}/a"))
        contents["/a"] = TWO

        changed, again = (got(cache, Asset(url=f"{host.url}/a")) for _ in range(2))

    assert told(changed) == (digest(TWO), SIZE, "network", TWO)
    assert again.tier == "disk"
    assert kept(tmp_path) == named(ONE, TWO)


def test_a_source_without_etags_is_downloaded_each_time(tmp_path: Path) -> None:
    """Nothing tells whether the file is unchanged."""
    with serving(reply(ONE)) as host, caching(tmp_path, host) as cache:
        tiers = [got(cache, Asset(url=f"{host.url}/a")).tier for _ in range(2)]

    assert tiers == ["network", "network"]
    assert kept(tmp_path) == named(ONE)


def test_the_same_bytes_from_two_addresses_are_one_file(tmp_path: Path) -> None:
    with serving(by_path({"/a": ONE, "/b": ONE})) as host, caching(tmp_path, host) as cache:
        one, other = (got(cache, Asset(url=f"{host.url}/{name}")) for name in "ab")

    assert one.path == other.path
    assert kept(tmp_path) == named(ONE)


def test_addresses_with_different_queries_are_different_sources(tmp_path: Path) -> None:
    with serving(by_path({"/a?v=1": ONE, "/a?v=2": TWO})) as host, caching(tmp_path, host) as cache:
        digests = [
            got(cache, Asset(url=f"{host.url}/a?v={version}")).sha256 for version in (1, 2, 1)
        ]

    assert digests == [digest(ONE), digest(TWO), digest(ONE)]


def test_a_cached_file_of_the_hub_costs_one_head_request(tmp_path: Path) -> None:
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
def test_a_digest_from_a_redirect_target_of_the_hub_is_not_trusted(
    tmp_path: Path, is_here: bool, sends_on: bool
) -> None:
    """The storage could choose any cached file; the hub's bytes are downloaded instead."""

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
def test_a_file_of_hugging_face_has_the_digest_that_the_hub_names(
    tmp_path: Path, is_stale: bool
) -> None:
    """The GET is unconditional: a mirror may answer 304 for an old version."""
    named_now, bodies = [ONE], [ONE]

    def answer(request: Request) -> bytes:
        if request.method == "HEAD":
            return reply(X_Linked_ETag=f'"{digest(named_now[-1])}"')
        if "if-none-match" in request.headers:
            return reply(status=304, length=None)
        return reply(bodies[-1], ETag='"one"')

    with serving(answer) as host, caching(tmp_path, HF_ENDPOINT=host.url) as cache:
        asset = Asset(url="hf://owner/repo/x.safetensors", config_sha256="none")
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


def test_a_cached_file_with_a_pinned_sha256_costs_no_request(tmp_path: Path) -> None:
    """Whatever its address."""
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        got(cache, Asset(url=f"{host.url}/a"))

        file = got(cache, Asset(url="https://elsewhere.example/b?sig=s3cret", sha256=digest(ONE)))

        assert told(file) == (digest(ONE), SIZE, "disk", ONE)
        assert file.source == "https://elsewhere.example/b"
        assert host.asked == ["GET /a"]


def test_a_missing_file_with_a_pinned_sha256_is_downloaded(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        assert told(got(cache, Asset(url=f"{host.url}/a", sha256=digest(ONE)))) == (
            digest(ONE),
            SIZE,
            "network",
            ONE,
        )


def test_bytes_with_another_sha256_than_the_pinned_one_are_not_kept(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        with pytest.raises(LoraCorrupt) as raised:
            got(cache, Asset(url=f"{host.url}/a?sig=s3cret", sha256=digest(TWO)))

        assert all(
            part in str(raised.value) for part in (f"{host.url}/a", digest(ONE), digest(TWO))
        )
        assert "s3cret" not in str(raised.value)
        assert kept(tmp_path) == {}


def test_a_pinned_sha256_is_compared_with_an_unchanged_file_too(tmp_path: Path) -> None:
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
        (b"\x80\x02}q" + bytes(100), "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs"),
        (b"", "0 bytes"),
        (ONE[:-1], "bytes, but its header"),
        (tensor_file({"a": {"dtype": "F17", "shape": [1], "data_offsets": [0, 1]}}, b"x"), "F17"),
    ],
)
def test_a_file_that_is_not_safetensors_is_refused_and_not_kept(
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
    ],
)
def test_a_failed_download_leaves_no_files(
    tmp_path: Path, answer: bytes, kind: type[LoraError]
) -> None:
    with serving(answer) as host, caching(tmp_path, host) as cache, pytest.raises(kind):
        got(cache, Asset(url=f"{host.url}/a"))

    assert kept(tmp_path) == {}


def test_a_failed_download_keeps_the_earlier_file(tmp_path: Path) -> None:
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
def test_an_address_that_is_not_a_url_is_a_lora_error(tmp_path: Path, address: str) -> None:
    """JSON can carry half a surrogate pair and UTF-8 cannot; urllib refuses others."""
    with caching(tmp_path) as cache:
        for _ in range(2):
            with pytest.raises(LoraError):
                got(cache, Asset(url=address))


# --- progress


def test_progress_is_reported_for_downloads_only(tmp_path: Path) -> None:
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
    )  # once for each request to the source
    assert heard[-2] == (SIZE, SIZE)
    assert sum(received == SIZE for received, _ in heard) == 1


@pytest.mark.parametrize(
    "error",
    [JobRevoked("cancelled"), JobTimeout(), RuntimeError("any"), KeyboardInterrupt()],
)
def test_an_exception_from_the_progress_callback_ends_the_download(
    tmp_path: Path, error: BaseException
) -> None:
    """Nothing is kept or remembered: the next use downloads the file."""

    def end(_received: int, _expected: int) -> None:
        raise error

    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        with pytest.raises(BaseException) as raised:  # noqa: PT011 - which one is looked at below
            got(cache, Asset(url=f"{host.url}/a"), on_bytes=end)
        assert kept(tmp_path) == {}
        assert list((tmp_path / "loras/index").iterdir()) == []

        assert told(got(cache, Asset(url=f"{host.url}/a"))) == (digest(ONE), SIZE, "network", ONE)
    assert raised.value is error


# --- changes from outside


def test_a_deleted_file_is_downloaded_again(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        got(cache, Asset(url=f"{host.url}/a")).path.unlink()

        assert told(got(cache, Asset(url=f"{host.url}/a"))) == (digest(ONE), SIZE, "network", ONE)
        got(cache, Asset(url=f"{host.url}/a")).path.unlink()
        assert got(cache, Asset(url=f"{host.url}/a", sha256=digest(ONE))).tier == "network"


@pytest.mark.parametrize(
    "data", [TWO, b"", ONE[:-1] + b"\xff"], ids=["another", "empty", "one byte"]
)
@pytest.mark.parametrize("restarted", [False, True])
def test_a_file_whose_bytes_changed_is_downloaded_again(
    tmp_path: Path, data: bytes, restarted: bool
) -> None:
    """While the worker runs, or before it started: a receipt's digest is that of the bytes."""
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
def test_a_deleted_cache_folder_is_created_again(tmp_path: Path, pin: dict[str, str]) -> None:
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
def test_a_folder_that_cannot_be_written_raises_cache_full(tmp_path: Path, folder: str) -> None:
    """The same request may succeed on another worker, so the error is retryable."""
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        (tmp_path / "loras" / folder).rmdir()
        (tmp_path / "loras" / folder).touch()

        with pytest.raises(CacheFull) as raised:
            got(cache, Asset(url=f"{host.url}/a"))

    assert raised.value.retryable


def test_a_cache_folder_that_cannot_be_created_is_an_invalid_setting(tmp_path: Path) -> None:
    (tmp_path / "loras").touch()

    with pytest.raises(InvalidSetting, match="ZLORA_LORA_CACHE"), caching(tmp_path):
        pass


def test_locks_and_drafts_of_killed_processes_do_not_hinder_a_download(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        asset = Asset(url=f"{host.url}/a", sha256=digest(ONE))
        (tmp_path / "loras/locks" / digest(ONE)).touch()
        cache._draft(asset).write_bytes(bytes(2 * SIZE))

        assert told(got(cache, asset)) == (digest(ONE), SIZE, "network", ONE)
        assert kept(tmp_path) == named(ONE)


def test_a_file_deleted_during_its_conditional_request_is_not_replaced_by_an_empty_one(
    tmp_path: Path,
) -> None:
    """The source answers 304 and sends no bytes."""
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


def test_a_draft_that_lost_its_name_is_not_kept(tmp_path: Path) -> None:
    """An operator clears the cache during a download; another process begins a new draft."""
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        asset = Asset(url=f"{host.url}/a")

        def clear(_received: int, _expected: int) -> None:
            cache._draft(asset).unlink()
            cache._draft(asset).write_bytes(b"half of a file")

        with pytest.raises(CacheFull):
            got(cache, asset, on_bytes=clear)

        assert list((tmp_path / "loras/files").iterdir()) == []
        assert told(got(cache, asset)) == (digest(ONE), SIZE, "network", ONE)
        assert kept(tmp_path) == named(ONE)


@pytest.mark.parametrize(
    "other", [{"COZY_TENANT_ID": "b"}, {"COZY_HUB_TOKEN": "b"}, {"HF_TOKEN": "b"}]
)
def test_a_file_fetched_with_one_credential_does_not_answer_for_another(
    tmp_path: Path, other: dict[str, str]
) -> None:
    """Workers with different credentials may share a folder; each asks the source itself."""
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


# --- peft's configuration beside a file

CONFIG, OTHER = b'{"r": 4}', b'{"r": 8}'
FOLDER = "/owner/repo/resolve/main/folder"
ON_HUB = Asset(url="hf://owner/repo/folder/x.safetensors")


def with_config(data: bytes | None) -> dict[str, bytes]:
    """Return the files of a hub, which may be changed."""
    files = {f"{FOLDER}/x.safetensors": ONE, f"{FOLDER}/y.safetensors": TWO}
    return files if data is None else {**files, f"{FOLDER}/adapter_config.json": data}


def test_the_configuration_beside_a_file_of_the_hub_comes_with_it(tmp_path: Path) -> None:
    """It is found by the address of a page, too, and is asked for as the file is."""
    files = with_config(CONFIG)
    with serving(by_path(files)) as host, caching(tmp_path, HF_ENDPOINT=host.url) as cache:
        page = Asset(url=f"{host.url}/owner/repo/blob/main/folder/y.safetensors")
        for asset in (ON_HUB, page, ON_HUB):
            file = got(cache, asset)
            assert (file.config, file.config_sha256) == (CONFIG, digest(CONFIG))
        assert kept(tmp_path) == named(ONE, TWO, CONFIG)

        files |= with_config(OTHER)
        assert got(cache, ON_HUB).config == OTHER


def test_a_file_of_a_folder_has_the_configuration_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(ONE)
    asset = Asset(url=(folder / "adapter_model.safetensors").as_uri())
    with caching(tmp_path, ZLORA_LORA_ROOTS=str(tmp_path)) as cache:
        assert (got(cache, asset).config, got(cache, asset).config_sha256) == (None, "none")

        forget_failures(tmp_path)
        (folder / "adapter_config.json").write_bytes(CONFIG)
        assert got(cache, asset).config == CONFIG


def test_the_configuration_is_read_under_the_same_guard(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "x.safetensors").write_bytes(ONE)
    (tmp_path / "secret.json").write_bytes(CONFIG)
    (folder / "adapter_config.json").symlink_to(tmp_path / "secret.json")
    with caching(tmp_path, ZLORA_LORA_ROOTS=str(folder)) as cache, pytest.raises(LoraNotAllowed):
        got(cache, Asset(url=(folder / "x.safetensors").as_uri()))


def test_a_pinned_configuration_costs_no_request_and_stays_the_same(tmp_path: Path) -> None:
    """So a replay has the configuration of the recorded job, or its absence."""
    files = with_config(CONFIG)
    with serving(by_path(files)) as host, caching(tmp_path, HF_ENDPOINT=host.url) as cache:
        got(cache, ON_HUB)
        files |= with_config(OTHER)
        asked = len(host.requests)

        for pin, config in ((digest(CONFIG), CONFIG), ("none", None)):
            asset = Asset(url=ON_HUB.url, sha256=digest(ONE), config_sha256=pin)
            file = got(cache, asset)
            assert (file.config, file.config_sha256) == (config, pin)

        assert len(host.requests) == asked
        with pytest.raises(LoraCorrupt, match="adapter_config"):
            got(cache, Asset(url=ON_HUB.url, config_sha256="0" * 64))


def test_only_a_file_that_needs_it_is_looked_at_for_a_configuration(tmp_path: Path) -> None:
    """Others have an alpha, or a source whose files do not belong together."""
    header = {"unet.a.alpha": {"dtype": "F16", "shape": [], "data_offsets": [0, 2]}}
    files = with_config(CONFIG) | {f"{FOLDER}/x.safetensors": tensor_file(header, b"\0\0")}
    with (
        serving(by_path(files)) as host,
        caching(tmp_path, host, HF_ENDPOINT=host.url) as cache,
        serving(by_path({"/a/x.safetensors": ONE, "/a/adapter_config.json": CONFIG})) as other,
        caching(tmp_path, other) as plain,
    ):
        assert got(cache, ON_HUB).config_sha256 is None
        assert got(plain, Asset(url=f"{other.url}/a/x.safetensors")).config_sha256 is None
        assert not [line for line in (*host.asked, *other.asked) if "adapter_config" in line]


def test_of_another_file_of_the_cache_only_the_beginning_is_read_as_a_configuration(
    tmp_path: Path,
) -> None:
    """A request may name the checksum of any file; the reader refuses what is too long."""
    large = lora_bytes(4, size=2**21)
    files = with_config(CONFIG) | {f"{FOLDER}/large.safetensors": large}
    with serving(by_path(files)) as host, caching(tmp_path, HF_ENDPOINT=host.url) as cache:
        got(cache, Asset(url="hf://owner/repo/folder/large.safetensors", config_sha256="none"))

        file = got(cache, Asset(url=ON_HUB.url, config_sha256=digest(large)))

    assert file.config is not None
    assert len(file.config) == 2**20 + 1


def test_an_exception_of_the_progress_ends_the_download_of_a_configuration(tmp_path: Path) -> None:
    def cancelled(*_: int) -> None:
        raise JobRevoked("cancelled")

    with (
        serving(by_path(with_config(CONFIG))) as host,
        caching(tmp_path, HF_ENDPOINT=host.url) as cache,
    ):
        got(cache, Asset(url=ON_HUB.url, config_sha256="none"))
        with pytest.raises(JobRevoked):
            got(cache, Asset(url=ON_HUB.url, sha256=digest(ONE)), on_bytes=cancelled)


def test_a_configuration_of_many_bytes_is_not_downloaded(tmp_path: Path) -> None:
    files = with_config(b" " * (2**20 + 1))
    with (
        serving(by_path(files)) as host,
        caching(tmp_path, HF_ENDPOINT=host.url) as cache,
        pytest.raises(LoraTooLarge),
    ):
        got(cache, ON_HUB)
