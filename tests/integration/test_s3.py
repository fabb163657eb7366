"""Results in a real S3 server."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event
from typing import TYPE_CHECKING

import boto3
import msgspec
import pytest
import requests
from botocore.config import Config
from processes import free_port, wait_until, worker
from zlora import GenerateResult
from zlora.errors import StoreFailed
from zlora_worker.settings import Settings
from zlora_worker.storage import Store, open_store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

SMALL = {"prompt": "a city at night", "num_inference_steps": 2, "seed": 1}
MAY = ("Read:pictures", "List:pictures", "Write:pictures")


def user(name: str, *actions: str) -> dict[str, object]:
    credentials = {"accessKey": f"{name}-key", "secretKey": f"{name}-secret"}
    return {"name": name, "credentials": [credentials], "actions": list(actions)}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A SeaweedFS with one user, on free ports of loopback."""
    folder = tmp_path_factory.mktemp("seaweed")
    (folder / "s3.json").write_text(json.dumps({"identities": [user("admin", "Admin"), user("worker", *MAY)]}))
    ports = {name: low_port() for name in ("master", "volume", "filer", "s3")}
    command = [
        str(Path(sys.executable).with_name("weed")),
        "server",
        "-dir",
        str(folder),
        "-ip",
        "127.0.0.1",
        "-ip.bind",
        "127.0.0.1",
        "-s3",
        "-filer",
    ]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    command += ["-master.telemetry=false", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += [f"-s3.config={folder / 's3.json'}", "-volume.max=20", "-master.volumeSizeLimitMB=64"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{ports['s3']}"
        wait_until(lambda: is_healthy(url), "SeaweedFS is healthy")
        yield url
    finally:
        server.kill()  # its clean end takes 16 s, and nothing of it is kept
        server.wait(10)


def low_port() -> int:
    """A free port whose companion 10,000 above, where SeaweedFS speaks gRPC, is a port too."""
    return wait_until(lambda: port if (port := free_port()) < 55_000 else None, "a port below 55,000")


def is_healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/healthz", timeout=2).ok
    except requests.ConnectionError:
        return False


@pytest.fixture(scope="module")
def s3(endpoint: str) -> "S3Client":
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="admin-key",
        aws_secret_access_key="admin-secret",
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )
    wait_until(lambda: client.create_bucket(Bucket="pictures"), "the bucket is made")
    return client


@pytest.fixture
def s3_environ(worker_environ: dict[str, str], endpoint: str) -> dict[str, str]:
    return worker_environ | {
        "ZLORA_STORE": "s3://pictures/team/a",
        "ZLORA_S3_ENDPOINT": endpoint,
        "AWS_ACCESS_KEY_ID": "worker-key",
        "AWS_SECRET_ACCESS_KEY": "worker-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def test_pictures_and_manifest_lie_under_the_prefix(s3_environ: dict[str, str], s3: "S3Client", tmp_path: Path) -> None:
    with worker(s3_environ, tmp_path / "log") as running:
        running.wait_ready()
        result = running.client.submit(SMALL, job_id="s3-1").result(timeout=60)

    (image,) = result.images
    assert image.url == "s3://pictures/team/a/runs/s3-1/outputs/0.png"
    answer = s3.get_object(Bucket="pictures", Key="team/a/runs/s3-1/outputs/0.png")
    assert answer["ContentType"] == "image/png"
    assert answer["Body"].read().startswith(b"\x89PNG")
    manifest = s3.get_object(Bucket="pictures", Key="team/a/runs/s3-1/manifest.json")["Body"].read()
    assert msgspec.json.decode(manifest, type=GenerateResult) == result


@pytest.fixture
def store(s3_environ: dict[str, str], s3: "S3Client", monkeypatch: pytest.MonkeyPatch) -> Store:  # noqa: ARG001 - the bucket
    return opened(s3_environ, monkeypatch)


def opened(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store of these variables; boto3 looks for its own in the environment of the process."""
    for name, value in environ.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    return open_store(Settings.from_env(environ))


def test_what_is_there_stays_until_it_is_deleted(store: Store) -> None:
    key = "runs/stays/manifest.json"
    store.delete(key)
    assert store.get(key) is None

    assert store.put_new(key, b"first", "application/json") is True
    assert store.put_new(key, b"second", "application/json") is False
    assert store.get(key) == b"first"

    store.delete(key)
    assert store.get(key) is None
    assert store.put_new(key, b"", "application/json") is True
    assert store.get(key) == b""


def test_of_many_writers_exactly_one_creates_the_object_and_its_bytes_are_there(store: Store) -> None:
    hands, rounds = 4, 8
    start = Barrier(hands)

    def write(hand: int) -> list[bool]:
        created = []
        for index in range(rounds):
            start.wait(60)
            created.append(store.put_new(f"runs/race/outputs/{index}.png", bytes([hand]) * 100_000, "image/png"))
        return created

    with ThreadPoolExecutor(hands) as pool:
        created = list(pool.map(write, range(hands)))

    for index, answers in enumerate(zip(*created, strict=True)):
        assert sum(answers) == 1
        assert store.get(f"runs/race/outputs/{index}.png") == bytes([answers.index(True)]) * 100_000


def test_a_reader_sees_nothing_or_the_whole_object(store: Store) -> None:
    key, looked, done = "runs/read/outputs/0.png", Event(), Event()
    whole, seen = bytes(range(256)) * 8_000, set()

    def look() -> None:
        while not done.is_set():
            if (found := store.get(key)) is not None:
                seen.add(found)
                looked.set()

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(look)
        try:
            for _ in range(20):
                looked.clear()
                assert store.put_new(key, whole, "image/png")
                assert looked.wait(60)
                store.delete(key)
        finally:
            done.set()
        reader.result()

    assert seen == {whole}


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize(
    "fault", [{"ZLORA_STORE": "s3://of-others/x"}, {"AWS_SECRET_ACCESS_KEY": "wrong"}], ids=["bucket", "secret"]
)
def test_a_server_that_refuses_is_a_failed_store(
    s3_environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, fault: dict[str, str]
) -> None:
    """Nor is it taken for one that has nothing."""
    store, key = opened(s3_environ | fault, monkeypatch), "runs/x/manifest.json"

    with pytest.raises(StoreFailed, match="cannot be stored"):
        store.put_new(key, b"{}", "application/json")
    with pytest.raises(StoreFailed, match="cannot be read"):
        store.get(key)
    with pytest.raises(StoreFailed, match="cannot be deleted"):
        store.delete(key)
