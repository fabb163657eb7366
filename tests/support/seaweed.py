"""A real S3 server, SeaweedFS."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pytest
import requests
from botocore.config import Config
from support.processes import free_port, wait_until
from zlora_worker.results.store import Store, open_store
from zlora_worker.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BUCKET = "pictures"
_ATTEMPTS = 3
_HIGHEST = 55_000
_GRPC = 10_000  # added to each port is another one, on which SeaweedFS speaks gRPC
_ADMIN = {
    "name": "all",
    "credentials": [{"accessKey": "key", "secretKey": "secret"}],
    "actions": ["Admin"],
}
_WORKER = {
    "name": "worker",
    "credentials": [{"accessKey": "worker-key", "secretKey": "worker-secret"}],
    "actions": [f"{right}:{BUCKET}" for right in ("Read", "List", "Write")],
}
_OPTIONS = (
    "-ip",
    "127.0.0.1",
    "-ip.bind",
    "127.0.0.1",
    "-s3",
    "-filer",
    "-master.telemetry=false",
    "-s3.iam=false",
)
_SMALL = (
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-volume.max=20",
    "-master.volumeSizeLimitMB=64",
)
# Credentials of a worker, with no more rights than it needs.
ENVIRON = {
    "AWS_ACCESS_KEY_ID": "worker-key",
    "AWS_SECRET_ACCESS_KEY": "worker-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def seaweed(folder: Path) -> Iterator[int]:
    """Run a server with an empty bucket, and yield the port of S3; taken ports are replaced."""
    for attempt in range(_ATTEMPTS):
        ports = dict(zip(("master", "volume", "filer", "s3"), free_ports(4), strict=True))
        server, port = _started(folder / str(attempt), ports), ports["s3"]
        try:
            wait_until(
                partial(_has_ended_or_is_healthy, server, port),
                "SeaweedFS is healthy, or has ended",
            )
            if server.poll() is None or attempt == _ATTEMPTS - 1:
                wait_until(partial(client(port).create_bucket, Bucket=BUCKET), "the bucket exists")
                yield port
                return
        finally:
            server.kill()  # a clean end takes 16 s, and no data is kept
            server.wait(10)
            _remove_sockets(ports.values())


def _started(folder: Path, ports: Mapping[str, int]) -> "subprocess.Popen[bytes]":
    folder.mkdir()
    (folder / "s3.json").write_text(json.dumps({"identities": [_ADMIN, _WORKER]}))
    command = [
        str(Path(sys.executable).with_name("weed")),
        "server",
        "-dir",
        str(folder),
        *_OPTIONS,
        *_SMALL,
    ]
    command += [f"-{name}.port={port}" for name, port in ports.items()] + [
        f"-s3.config={folder / 's3.json'}"
    ]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            command, env=os.environ | {"TMPDIR": str(folder)}, stdout=log, stderr=log
        )


def _remove_sockets(ports: Iterable[int]) -> None:
    """Remove sockets of a killed server, which lie in /tmp whatever TMPDIR says."""
    for port in ports:
        for own in (port, port + _GRPC):
            for path in Path("/tmp").glob(f"seaweedfs-*-{own}.sock"):
                path.unlink(missing_ok=True)


def client(port: int) -> "S3Client":
    """Return a client with all rights."""
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )


def keys(port: int, prefix: str = "") -> list[str]:
    """Return the keys of the bucket under a prefix."""
    return [
        item["Key"]
        for item in client(port).list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    ]


def uploads(port: int, prefix: str = "") -> list[str]:
    """Return the keys of unfinished multipart uploads under a prefix."""
    return [
        item["Key"]
        for item in client(port)
        .list_multipart_uploads(Bucket=BUCKET, Prefix=prefix)
        .get("Uploads", [])
    ]


def store(port: int, prefix: str, **variables: str) -> Store:
    """Open a worker's store on any port, with boto3's variables in this process."""
    settings = {
        "ZLORA_STORE": f"s3://{BUCKET}/{prefix}",
        "ZLORA_S3_ENDPOINT": f"http://127.0.0.1:{port}",
        **variables,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRON | variables).items():
            if name.startswith("AWS_"):
                patch.setenv(name, value)
        return open_store(Settings.from_env(settings))


def free_ports(count: int) -> list[int]:
    """Return free ports whose gRPC ports are free too."""
    found: list[int] = []
    while len(found) < count:
        port = free_port()
        if port < _HIGHEST and not {port, port + _GRPC} & {
            *found,
            *(other + _GRPC for other in found),
        }:
            found += [port] if _is_free(port + _GRPC) else []
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _has_ended_or_is_healthy(server: "subprocess.Popen[bytes]", port: int) -> bool:
    if server.poll() is not None:
        return True
    try:
        return requests.get(f"http://127.0.0.1:{port}/healthz", timeout=2).ok
    except requests.ConnectionError:
        return False
