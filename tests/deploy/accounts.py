"""Make accounts of SeaweedFS's S3 by its administration, gRPC on the port 10,000 above S3's port.

The message is `PutIdentityRequest` of SeaweedFS's `s3.proto`, the service `SeaweedS3IamCache`.
"""

import subprocess
from pathlib import Path
from typing import Final

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

_METHOD: Final = "/messaging_pb.SeaweedS3IamCache/PutIdentity"
_GRPC: Final = ("-H", "Content-Type: application/grpc", "-H", "TE: trailers")
_HTTP2: Final = {"http": "--http2-prior-knowledge", "https": "--http2"}


def is_made(place: str, name: str, scratch: Path, *, key: str | None = None) -> bool:
    """Return whether the server accepts a new administrator; `key` has key and certificate."""
    body = scratch / "identity"
    body.write_bytes(_message(name))
    command = ["curl", "--silent", "--insecure", "--include", "--max-time", "10", *_GRPC]
    command += [
        _HTTP2[place.partition(":")[0]],
        "--data-binary",
        f"@{body}",
        *(("--cert", key) if key else ()),
    ]
    done = subprocess.run([*command, place + _METHOD], capture_output=True, check=False)
    return done.returncode == 0 and b"grpc-status: 0" in done.stdout.lower()


def own_key(scratch: Path) -> str:
    """Make a key and certificate with the store's subject that are not the store's."""
    made = scratch / "own_key"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/CN=nobody",
        "-keyout",
        "/dev/stdout",
    ]
    made.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
    return str(made)


def is_known(port: int, name: str) -> bool:
    """Return whether S3 knows the account."""
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=_access(name),
        aws_secret_access_key=_secret(name),
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )
    try:
        client.list_buckets()
    except ClientError as error:
        return error.response["Error"]["Code"] != "InvalidAccessKeyId"
    return True


def _access(name: str) -> str:
    return f"key-of-{name}"


def _secret(name: str) -> str:
    return f"secret-of-{name}"


def _message(name: str) -> bytes:
    """Return the request in gRPC's frame: no compression, and the length."""
    credential = _field(1, _access(name).encode()) + _field(2, _secret(name).encode())
    identity = _field(1, name.encode()) + _field(2, credential) + _field(3, b"Admin")
    request = _field(1, identity)
    return b"\0" + len(request).to_bytes(4, "big") + request


def _field(number: int, value: bytes) -> bytes:
    """Return a field of Protocol Buffers with a length below 128."""
    assert len(value) < 128
    return bytes([number << 3 | 2, len(value)]) + value
