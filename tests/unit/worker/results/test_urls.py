"""URLs of stored results, as the operator and the request have them."""

import base64
import functools
import hashlib
import time
from pathlib import Path
from typing import Any

import pytest
from support.fakes import MemoryStore, a_request
from zlora.errors import InvalidRequest, InvalidSetting, StoreFailed
from zlora.schema import GenerateResult, ImageRef
from zlora_worker.results.store import FolderStore, Store, open_store
from zlora_worker.results.urls import ImageUrls
from zlora_worker.settings import Settings

KEYS = ("runs/job/outputs/0.png", "runs/job/outputs/1.png")
S3 = {"ZLORA_STORE": "s3://bucket/team a", "ZLORA_S3_ENDPOINT": "http://10.0.0.5:8333"}
CDN = {"ZLORA_PUBLIC_URL": "https://cdn.example.com/images"}


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"):
        monkeypatch.setenv(f"AWS_{name}", "us-east-1" if name == "DEFAULT_REGION" else "key")


@functools.cache  # a client of S3 takes a while to make
def s3_store(endpoint: str, public_endpoint: str, addressing: str) -> Store:
    return open_store(
        Settings.from_env(
            S3
            | {
                "ZLORA_S3_ENDPOINT": endpoint,
                "ZLORA_S3_PUBLIC_ENDPOINT": public_endpoint,
                "ZLORA_S3_ADDRESSING": addressing,
            }
        )
    )


def image_urls(variables: dict[str, str], store: Store | None = None) -> ImageUrls:
    """Return the URLs of a worker with these settings, by default those of its own store."""
    settings = Settings.from_env(variables)
    if store is None and settings.store == S3["ZLORA_STORE"]:
        store = s3_store(settings.s3_endpoint, settings.s3_public_endpoint, settings.s3_addressing)
    return ImageUrls(store or open_store(settings), settings)


def result(**fields: Any) -> GenerateResult:
    images = [
        ImageRef(
            key=key,
            width=64,
            height=64,
            content_type="image/png",
            size=3,
            sha256=hashlib.sha256(b"xxx").hexdigest(),
            seed=index,
        )
        for index, key in enumerate(KEYS)
    ]
    return GenerateResult(
        job_id="job",
        images=tuple(images),
        loras=(),
        seed=0,
        timings={},
        base_intact=True,
        model="m",
        versions={},
        request=a_request(**fields),
    )


def urls(made: ImageUrls, **fields: Any) -> list[str | None]:
    """Return the URLs of a new job's result."""
    made.require(a_request(**fields))
    return [image.url for image in made.with_urls(result(**fields)).images]


# --- policies


def test_images_in_a_folder_have_file_urls(tmp_path: Path) -> None:
    made = image_urls({}, FolderStore(tmp_path))

    assert (
        urls(made) == urls(made, url_policy="file") == [(tmp_path / key).as_uri() for key in KEYS]
    )


def test_images_in_s3_have_signed_urls_with_their_end() -> None:
    made = image_urls(S3 | {"ZLORA_URL_SECONDS": "600"})

    before = time.time()
    first, second = made.with_urls(result()).images
    after = time.time()

    for image in (first, second):
        assert image.url is not None
        assert image.url.startswith(f"http://10.0.0.5:8333/bucket/team%20a/{image.key}?")
        assert "X-Amz-Expires=600" in image.url
        assert image.url_expires_at is not None
        assert before + 600 <= image.url_expires_at <= after + 600


def test_urls_are_signed_for_the_public_endpoint() -> None:
    (url, _) = urls(image_urls(S3 | {"ZLORA_S3_PUBLIC_ENDPOINT": "https://s3.example.com"}))

    assert url is not None
    assert url.startswith("https://s3.example.com/bucket/team%20a/runs/job/outputs/0.png?")
    assert "10.0.0.5" not in url


def test_the_bucket_may_be_part_of_the_host() -> None:
    (url, _) = urls(
        image_urls(
            S3 | {"ZLORA_S3_ENDPOINT": "https://s3.example.com", "ZLORA_S3_ADDRESSING": "virtual"}
        )
    )

    assert url is not None
    assert url.startswith("https://bucket.s3.example.com/team%20a/runs/")


@pytest.mark.parametrize("store", [S3, {}], ids=["s3", "folder"])
def test_a_public_url_is_the_default_if_it_is_set(store: dict[str, str], tmp_path: Path) -> None:
    """Prefix and key follow it, quoted; there is neither a signature nor an end."""
    made = image_urls(store | CDN, None if store else FolderStore(tmp_path))

    prefix = "team%20a/" if store else ""
    assert urls(made) == [f"https://cdn.example.com/images/{prefix}{key}" for key in KEYS]
    assert made.with_urls(result()).images[0].url_expires_at is None


def test_any_store_gives_keys_without_urls(tmp_path: Path) -> None:
    for made in (image_urls({}, FolderStore(tmp_path)), image_urls(S3), image_urls(S3 | CDN)):
        assert urls(made, url_policy="key") == [None, None]


def test_a_request_chooses_a_policy_of_the_operator_and_the_first_is_the_default() -> None:
    made = image_urls(S3 | CDN | {"ZLORA_URLS": "public, presigned"})

    assert urls(made) == urls(made, url_policy="public")
    (url, _) = urls(made, url_policy="presigned")
    assert url is not None
    assert "X-Amz-Signature" in url


def test_an_operator_may_give_keys_only() -> None:
    assert urls(image_urls(S3 | {"ZLORA_URLS": "key"})) == [None, None]


@pytest.mark.parametrize("policy", ["presigned", "file", "public"])
def test_another_policy_is_refused_by_name(policy: str) -> None:
    made = image_urls(S3 | {"ZLORA_URLS": "key"})

    with pytest.raises(InvalidRequest, match=r"\$\.url_policy: Expected one of key; the value is"):
        made.require(a_request(url_policy=policy))


def test_an_old_result_gets_urls_by_the_present_settings() -> None:
    """The settings at the time of the job may have been wrong."""
    old: dict[str, Any] = {"url_policy": "presigned", "url_expires_in": 604_800}

    assert [
        image.url
        for image in image_urls(S3 | {"ZLORA_URLS": "key"}).with_urls(result(**old)).images
    ] == [None, None]
    (image, _) = image_urls(S3 | {"ZLORA_URL_SECONDS": "60"}).with_urls(result(**old)).images
    assert image.url is not None
    assert "X-Amz-Expires=60&" in image.url
    (image, _) = image_urls(S3 | CDN).with_urls(result(**old)).images
    assert image.url == f"https://cdn.example.com/images/team%20a/{KEYS[0]}"


def test_an_old_result_of_another_store_gets_urls_of_this_store(tmp_path: Path) -> None:
    made = image_urls({}, FolderStore(tmp_path))

    for policy in ("presigned", "public"):
        (image, _) = made.with_urls(result(url_policy=policy)).images
        assert (image.url, image.url_expires_at) == ((tmp_path / KEYS[0]).as_uri(), None)


# --- how long


def test_a_request_may_shorten_the_time_of_a_url() -> None:
    made = image_urls(S3 | {"ZLORA_URL_SECONDS": "600"})

    (url, _) = urls(made, url_expires_in=60)
    assert url is not None
    assert "X-Amz-Expires=60&" in url
    with pytest.raises(InvalidRequest, match=r"\$\.url_expires_in: Expected up to 600"):
        made.require(a_request(url_expires_in=601))


def test_a_time_is_refused_if_urls_are_not_signed(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no URL is signed"):
        image_urls({}, FolderStore(tmp_path)).require(a_request(url_expires_in=60))


def test_each_read_of_a_result_has_fresh_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest has no URLs, so a year later it gives URLs that hold."""
    made, stored = image_urls(S3), result()
    now = time.time()

    first = made.with_urls(stored).images[0].url_expires_at
    monkeypatch.setattr(time, "time", lambda: now + 31_536_000)
    later = made.with_urls(stored).images[0].url_expires_at

    assert first is not None
    assert later is not None
    assert later - first > 31_000_000


# --- inline


def filled(size: int = 3) -> MemoryStore:
    store = MemoryStore()
    for key in KEYS:
        store.put_new(key, b"x" * size, "image/png")
    return store


def test_small_images_are_inlined_if_the_request_says_so() -> None:
    made = image_urls({"ZLORA_INLINE_BYTES": "6"}, filled())

    for image in made.with_urls(result(inline=True)).images:
        assert image.data_uri == f"data:image/png;base64,{base64.b64encode(b'xxx').decode()}"
        assert image.url == f"memory:///{image.key}"


@pytest.mark.parametrize(
    ("room", "fields"), [("5", {"inline": True}), ("0", {"inline": True}), ("6", {})]
)
def test_larger_images_and_those_of_other_requests_are_not_inlined(
    room: str, fields: dict[str, bool]
) -> None:
    """The bound is for all images of a job, since one result carries them."""
    made = image_urls({"ZLORA_INLINE_BYTES": room}, filled())

    assert [image.data_uri for image in made.with_urls(result(**fields)).images] == [None, None]


def test_a_store_that_is_away_or_wrong_costs_a_result_only_its_inline_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise a job would fail after its images are stored; other bytes are no images of it."""
    gone, away, other = MemoryStore(), filled(), filled(size=4)

    def fail(_key: str) -> bytes:
        raise StoreFailed("the store is away")

    monkeypatch.setattr(away, "get", fail)

    for store in (gone, away, other):
        shown = image_urls({}, store).with_urls(result(inline=True))
        assert [(image.data_uri, image.url) for image in shown.images] == [
            (None, f"memory:///{key}") for key in KEYS
        ]


# --- the operator's mistakes


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"ZLORA_URLS": "presigned"}, "ZLORA_URLS=presigned"),
        (S3 | {"ZLORA_URLS": "key, file"}, "ZLORA_URLS=file"),
        ({"ZLORA_URLS": "public"}, "ZLORA_PUBLIC_URL is not set"),
        ({"ZLORA_URLS": "secret"}, "ZLORA_URLS='secret'"),
        ({"ZLORA_URL_SECONDS": "604801"}, "seven days"),
        ({"ZLORA_PUBLIC_URL": "cdn.example.com"}, "ZLORA_PUBLIC_URL"),
        (
            {"ZLORA_PUBLIC_URL": "https://cdn.example.com/x?y=1"},
            "ZLORA_PUBLIC_URL.*without user, query and fragment",
        ),
        (
            {"ZLORA_PUBLIC_URL": "https://u:p@cdn.example.com"},
            "ZLORA_PUBLIC_URL.*without user, query and fragment",
        ),
        (S3 | {"ZLORA_S3_PUT": "STANDARD_IA"}, "ZLORA_S3_PUT=.*JSON object"),
        (S3 | {"ZLORA_S3_ADDRESSING": "host"}, "ZLORA_S3_ADDRESSING"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    variables: dict[str, str], named: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidSetting, match=named):
        image_urls({"ZLORA_HOME": str(tmp_path)} | variables)


def test_put_arguments_are_never_shown() -> None:
    """Neither by `repr` nor by an error: they may hold secrets."""
    settings = Settings.from_env(S3 | {"ZLORA_S3_PUT": '{"Metadata": {"a": ["s3cret"]}}'})

    assert "s3cret" not in repr(settings)
    with pytest.raises(InvalidSetting, match="ZLORA_S3_PUT: Metadata: not of the type") as raised:
        open_store(settings)
    assert "s3cret" not in repr(raised.value)
