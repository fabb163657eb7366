"""Serve any number of LoRAs over HTTP on loopback, as slowly as a far server.

`python -m benchmarks.lora_server FILE SECONDS_OF_DELAY BYTES_A_SECOND`. The first line of its
output is its port. `/17` is the file with other last bytes, as is each other number, so that the
server needs no disk and the LoRAs have different checksums.
"""

import sys
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

import numpy as np

PIECE: Final = 2**18  # bytes sent at once


def numbered(payload: bytes, number: int) -> bytes:
    """Return a LoRA whose last tensor ends with a number of its own; numbers are below 2,048."""
    own = np.array([number / 2048], dtype=np.float16).tobytes()  # exact in fp16
    return payload[: -len(own)] + own


class Handler(BaseHTTPRequestHandler):
    """Serves LoRAs by their number."""

    payload: bytes
    delay: float  # seconds until the answer
    rate: float  # bytes a second of one connection

    def do_GET(self) -> None:
        """Send one LoRA."""
        time.sleep(self.delay)
        body = memoryview(numbered(self.payload, int(self.path.removeprefix("/"))))
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        start = time.monotonic()
        for first in range(0, len(body), PIECE):
            time.sleep(max(0.0, start + first / self.rate - time.monotonic()))
            self.wfile.write(body[first : first + PIECE])

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def main(file: str, delay: str, rate: str) -> None:
    """Serve until the process is ended."""
    Handler.payload, Handler.delay, Handler.rate = (
        Path(file).read_bytes(),
        float(delay),
        float(rate),
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        print(server.server_port, flush=True)  # noqa: T201 - for the process that started this one
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
