"""Serve files over HTTP on loopback: `python -m benchmarks.file_server FOLDER SECONDS_OF_DELAY`.

The first line of its output is its port. The bytes go from the page cache to the socket by
sendfile(2).
"""

import sys
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    """Serves the files of one folder by name."""

    folder: Path
    delay: float  # seconds

    def do_GET(self) -> None:
        """Send one file, or 404."""
        time.sleep(self.delay)
        path = self.folder / Path(self.path).name
        if not path.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()
        self.wfile.flush()
        with path.open("rb") as file:
            self.connection.sendfile(file)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def main(folder: str, delay: str) -> None:
    """Serve until the process is ended."""
    Handler.folder, Handler.delay = Path(folder), float(delay)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        print(server.server_port, flush=True)  # noqa: T201 - for the process that started this one
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
