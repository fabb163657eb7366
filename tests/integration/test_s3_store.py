"""Results in a real S3 server."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier, Event
from typing import Any, Final

import msgspec
import pytest
import requests
from support import seaweed
from support.figures import Tally
from support.processes import unlinked, wait_until, worker
from support.s3_proxy import S3Proxy
from support.scene import TESTS
from support.seaweed import BUCKET, client, keys, uploads
from zlora import Client, GenerateResult, JobState
from zlora.errors import StoreFailed, ZloraError
from zlora.schema import image_key, manifest_key
from zlora_worker.results.manifest import load_end, read_result, write_result
from zlora_worker.results.store import Store

LIFECYCLE: Final = Path(__file__).parents[2] / "deploy" / "s3" / "lifecycle.json"
SMALL: Final = {"prompt": "a city at night", "num_inference_steps": 2, "seed": 1}
PART: Final = 8 * 2**20  # bytes
LARGE: Final = PART + 1_000_001  # bytes: two parts
JSON: Final = "application/json"
PNG: Final = "image/png"
OPTIONS: Final = {
    "CacheControl": "max-age=60",
    "Metadata": {"team": "a"},
    "StorageClass": "STANDARD_IA",
}

OpenStore = Callable[..., Store]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a SeaweedFS on loopback."""
    with seaweed.seaweed(tmp_path_factory.mktemp("seaweed")) as found:
        yield found


@pytest.fixture(scope="module")
def public(port: int) -> Iterator[str]:
    """URL of the server by another name and port, as from outside its network."""
    with S3Proxy(port, Tally()) as proxy:
        yield f"http://localhost:{proxy.port}"


@pytest.fixture(scope="module")
def open_store(port: int) -> OpenStore:
    """Return a function that opens a worker's store under a prefix."""
    return lambda prefix="team/a", **variables: seaweed.store(port, prefix, **variables)


@pytest.fixture(scope="module")
def store(open_store: OpenStore, public: str) -> Store:
    return open_store(ZLORA_S3_PUBLIC_ENDPOINT=public)


def large(fill: int) -> bytes:
    """Return random bytes that are uploaded in parts."""
    return bytes([fill]) * PART + os.urandom(LARGE - PART)


def test_a_worker_stores_under_the_prefix_and_its_urls_work_from_outside(
    worker_environ: dict[str, str], port: int, public: str, tmp_path: Path
) -> None:
    environ = worker_environ | seaweed.ENVIRON
    environ |= {
        "ZLORA_STORE": f"s3://{BUCKET}/team/w",
        "ZLORA_S3_ENDPOINT": f"http://127.0.0.1:{port}",
        "ZLORA_S3_PUBLIC_ENDPOINT": public,
    }
    with worker(environ, tmp_path / "log") as running:
        running.wait_ready()
        result = running.client.submit(SMALL, job_id="s3-1").result(timeout=60)

    (image,) = result.images
    assert image.url is not None
    assert image.url.startswith(f"{public}/{BUCKET}/team/w/runs/s3-1/outputs/0.png?")
    answer = requests.get(image.url, timeout=10)
    assert (answer.status_code, answer.headers["content-type"]) == (200, PNG)
    assert hashlib.sha256(answer.content).hexdigest() == image.sha256
    manifest = client(port).get_object(Bucket=BUCKET, Key="team/w/runs/s3-1/manifest.json")
    assert manifest["ContentType"] == JSON
    assert msgspec.json.decode(manifest["Body"].read(), type=GenerateResult) == unlinked(result)
    assert sorted(keys(port, "team/w")) == [
        "team/w/runs/s3-1/manifest.json",
        "team/w/runs/s3-1/outputs/0.png",
    ]


# --- objects


def test_an_object_stays_until_it_is_deleted(store: Store) -> None:
    key = manifest_key("stays")
    store.delete(key)
    assert store.get(key) is None

    assert store.put_new(key, b"first", JSON) is True
    assert store.put_new(key, b"second", JSON) is False
    assert store.get(key) == b"first"

    store.delete(key)
    assert store.get(key) is None
    assert store.put_new(key, b"", JSON) is True
    assert store.get(key) == b""


@pytest.mark.parametrize("size", [PART, PART + 1], ids=["one piece", "parts"])
def test_a_large_object_is_created_whole_and_once(
    open_store: OpenStore, port: int, size: int
) -> None:
    store, key, data = open_store("large"), f"runs/{size}/outputs/0.png", os.urandom(size)

    assert store.put_new(key, data, PNG) is True
    assert store.put_new(key, large(2), PNG) is False

    assert store.get(key) == data
    assert uploads(port, "large") == []
    head = client(port).head_object(Bucket=BUCKET, Key=f"large/{key}")
    assert (head["ContentLength"], head["ContentType"]) == (size, PNG)
    assert head["ETag"].endswith('-2"') is (size > PART)


@pytest.mark.parametrize("size", [10, LARGE], ids=["one piece", "parts"])
def test_an_object_is_stored_with_the_put_arguments(
    open_store: OpenStore, port: int, size: int
) -> None:
    store, key = open_store("put", ZLORA_S3_PUT=json.dumps(OPTIONS)), f"runs/{size}/outputs/0.png"

    assert store.put_new(key, bytes(size), PNG)

    head: Any = client(port).head_object(Bucket=BUCKET, Key=f"put/{key}")
    assert {name: head[name] for name in OPTIONS} == OPTIONS


# --- concurrent writers


def test_exactly_one_of_several_writers_creates_an_object(
    store: Store,
) -> None:
    writers, rounds = 3, 4
    start = Barrier(writers)

    def write(writer: int) -> list[bool]:
        created = []
        for index in range(rounds):
            start.wait(60)
            created.append(
                store.put_new(image_key("race", index, "png"), bytes([writer]) * 100_000, PNG)
            )
        return created

    with ThreadPoolExecutor(writers) as pool:
        created = list(pool.map(write, range(writers)))

    for index, outcomes in enumerate(zip(*created, strict=True)):
        assert sum(outcomes) == 1
        assert store.get(image_key("race", index, "png")) == bytes([outcomes.index(True)]) * 100_000


def test_one_of_two_uploads_in_parts_becomes_the_object(open_store: OpenStore, port: int) -> None:
    """The other leaves no parts.

    Both may be answered with success: SeaweedFS checks the condition before it completes an upload.
    A put in one piece, as of a manifest, has one winner there too.
    """
    store, key, start = open_store("two"), image_key("job", 0, "png"), Barrier(2)
    datas = [large(1), large(2)]

    def write(data: bytes) -> bool:
        start.wait(60)
        return store.put_new(key, data, PNG)

    with ThreadPoolExecutor(2) as pool:
        created = list(pool.map(write, datas))

    assert store.get(key) in [data for data, mine in zip(datas, created, strict=True) if mine]
    assert uploads(port, "two") == []


def a_result(job_id: str, attempt: int) -> GenerateResult:
    return GenerateResult(
        job_id=job_id,
        images=(),
        loras=(),
        seed=1,
        timings={},
        base_intact=True,
        model="demo",
        versions={},
        attempt=attempt,
        request_sha256="digest",
    )


def test_two_workers_with_one_job_return_one_result(
    open_store: OpenStore,
) -> None:
    stores, rounds, start = [open_store(), open_store()], 8, Barrier(2)

    def write(writer: int) -> list[GenerateResult | ZloraError]:
        answers = []
        for index in range(rounds):
            start.wait(60)
            answers.append(write_result(stores[writer], a_result(f"published-{index}", writer)))
        return answers

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(write, range(2))

    assert one == other == [read_result(stores[0], f"published-{index}") for index in range(rounds)]


def test_images_without_a_manifest_are_no_result(store: Store, port: int) -> None:
    """Nor are the parts of an upload, also of the manifest itself, that a killed worker left."""
    begun = [f"team/a/{image_key('orphan', 1, 'png')}", f"team/a/{manifest_key('orphan')}"]
    for key in begun:
        upload = client(port).create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
        client(port).upload_part(Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=1, Body=b"{}")
    assert store.put_new(image_key("orphan", 0, "png"), b"content", PNG)

    assert read_result(store, "orphan") is load_end(store, "orphan", "digest") is None
    assert keys(port, "team/a/runs/orphan") == [f"team/a/{image_key('orphan', 0, 'png')}"]
    assert sorted(uploads(port, "team/a/runs/orphan")) == sorted(begun)

    made = write_result(store, a_result("orphan", 2))
    assert read_result(store, "orphan") == load_end(store, "orphan", "digest") == made


def test_a_reader_sees_nothing_or_the_whole_object(store: Store) -> None:
    key, looked, done = image_key("read", 0, "png"), Event(), Event()
    whole, seen = bytes(range(256)) * 8_000, set()

    def look() -> None:
        while not done.is_set():
            if (found := store.get(key)) is not None:
                seen.add(found)
                looked.set()

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(look)
        try:
            for _ in range(8):
                looked.clear()
                assert store.put_new(key, whole, PNG)
                assert looked.wait(60)
                store.delete(key)
        finally:
            done.set()
        reader.result()

    assert seen == {whole}


# --- URLs


def test_a_presigned_url_works_from_outside(open_store: OpenStore, public: str) -> None:
    store, key = (
        open_store("a b/ä+%", ZLORA_S3_PUBLIC_ENDPOINT=public),
        image_key("shown", 0, "png"),
    )
    store.put_new(key, b"content", PNG)

    url = store.url(key, 60)
    assert url.startswith(f"{public}/{BUCKET}/")
    assert requests.get(url, timeout=10).content == b"content"
    assert requests.get(url.partition("?")[0], timeout=10).status_code == 403
    assert requests.put(url, b"mine", timeout=10).status_code == 403
    assert store.get(key) == b"content"


def test_an_expired_url_is_refused(store: Store) -> None:
    key = image_key("expired", 0, "png")
    store.put_new(key, b"content", PNG)

    url = store.url(key, 1)
    # The server counts in whole seconds.
    wait_until(lambda: requests.get(url, timeout=10).status_code == 403, "the URL has expired")


def test_a_changed_url_is_refused(store: Store) -> None:
    for job in ("mine", "other"):
        store.put_new(image_key(job, 0, "png"), b"content", PNG)
    url = store.url(image_key("mine", 0, "png"), 60)
    assert requests.get(url, timeout=10).status_code == 200

    for part, changed in (
        ("/mine/outputs", "/other/outputs"),
        ("X-Amz-Expires=60", "X-Amz-Expires=600000"),
        ("X-Amz-Signature=", "X-Amz-Signature=0"),
        ("X-Amz-Credential=worker-key", "X-Amz-Credential=key"),
        ("//localhost", "//127.0.0.1"),
    ):
        assert url.count(part) == 1
        assert requests.get(url.replace(part, changed), timeout=10).status_code == 403


# --- servers that refuse


@pytest.mark.parametrize(
    "fault",
    [
        {"ZLORA_STORE": "s3://of-others/x"},
        {"AWS_SECRET_ACCESS_KEY": "wrong"},
        {"AWS_ACCESS_KEY_ID": "unknown"},
    ],
    ids=["bucket", "secret", "key"],
)
def test_a_refusal_fails_the_store(open_store: OpenStore, fault: dict[str, str]) -> None:
    """It is not taken for an absent object."""
    store, key = open_store(**fault), manifest_key("x")

    for data in (b"{}", bytes(LARGE)):
        with pytest.raises(StoreFailed, match="cannot be stored"):
            store.put_new(key, data, JSON)
    with pytest.raises(StoreFailed, match="cannot be read"):
        store.get(key)
    with pytest.raises(StoreFailed, match="cannot be deleted"):
        store.delete(key)


def test_a_worker_whose_store_refuses_ends_with_one_line_and_takes_no_job(
    worker_environ: dict[str, str], port: int, tmp_path: Path
) -> None:
    environ = worker_environ | seaweed.ENVIRON
    environ |= {
        "ZLORA_STORE": f"s3://{BUCKET}/wrong",
        "ZLORA_S3_ENDPOINT": f"http://127.0.0.1:{port}",
        "ZLORA_QUEUE": "wrong-store",
        "AWS_SECRET_ACCESS_KEY": "wrong",
        # The fake model starts sooner, since it needs no torch.
        "PYTHONPATH": os.pathsep.join([str(TESTS / "faults" / "engines"), str(TESTS)]),
    }

    with Client.from_env(environ) as producer:
        handle = producer.submit(SMALL)
        with worker(environ, tmp_path / "log") as failing:
            assert failing.process.wait(60) == 70

        (line,) = failing.lines("CRITICAL")
        assert re.search(r"ZLORA_STORE: runs/\.probe-\w+ .*\(SignatureDoesNotMatch\)", line)
        assert not failing.lines("Traceback")
        assert handle.status().state is JobState.PENDING


def test_concurrent_probes_leave_nothing(open_store: OpenStore, port: int) -> None:
    stores = [open_store("probed") for _ in range(2)]
    start = Barrier(len(stores))

    def probe(store: Store) -> None:
        start.wait(60)
        store.probe()

    with ThreadPoolExecutor(len(stores)) as pool:
        list(pool.map(probe, stores))

    assert keys(port, "probed") == uploads(port, "probed") == []


def test_a_missing_bucket_fails_the_store(open_store: OpenStore) -> None:
    """It is not taken for an absent object; with all rights, S3 answers that it is missing."""
    admin = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}

    with pytest.raises(StoreFailed, match="NoSuchBucket"):
        open_store(ZLORA_STORE="s3://absent", **admin).get(manifest_key("x"))


def test_a_bucket_policy_holds_and_may_make_results_public(
    open_store: OpenStore, port: int
) -> None:
    """Public results are for `ZLORA_PUBLIC_URL`."""
    opened, closed, key = open_store("opened"), open_store("closed"), image_key("x", 0, "png")
    opened.put_new(key, b"content", PNG)
    url = f"http://127.0.0.1:{port}/{BUCKET}/{opened.name(key)}"
    assert requests.get(url, timeout=10).status_code == 403

    with policy(port, allow=("s3:GetObject", "opened"), deny=("s3:PutObject", "closed")):
        assert requests.get(url, timeout=10).content == b"content"
        assert requests.get(url.replace(key, "runs/y"), timeout=10).status_code in (403, 404)
        for data in (b"content", bytes(LARGE)):
            with pytest.raises(StoreFailed, match="AccessDenied"):
                closed.put_new(key, data, PNG)
    assert closed.get(key) is None
    assert uploads(port, "closed") == []


@contextmanager
def policy(port: int, *, allow: tuple[str, str], deny: tuple[str, str]) -> Iterator[None]:
    """Allow everyone an action under one prefix, and deny one under another."""
    statements = [
        {
            "Effect": effect,
            "Principal": "*",
            "Action": action,
            "Resource": f"arn:aws:s3:::{BUCKET}/{prefix}/*",
        }
        for effect, (action, prefix) in (("Allow", allow), ("Deny", deny))
    ]
    document = json.dumps({"Version": "2012-10-17", "Statement": statements})
    client(port).put_bucket_policy(Bucket=BUCKET, Policy=document)
    try:
        yield
    finally:
        client(port).delete_bucket_policy(Bucket=BUCKET)


# --- rules of the bucket


def test_s3_accepts_the_lifecycle_rules(port: int) -> None:
    """In a bucket of their own, so that no other object expires."""
    rules, admin = json.loads(LIFECYCLE.read_text()), client(port)
    admin.create_bucket(Bucket="ruled")

    admin.put_bucket_lifecycle_configuration(Bucket="ruled", LifecycleConfiguration=rules)

    kept: Any = admin.get_bucket_lifecycle_configuration(Bucket="ruled")["Rules"]
    assert kept == rules["Rules"]
    assert {rule["Filter"]["Prefix"] for rule in kept} == {
        manifest_key("job").partition("/")[0] + "/"
    }
