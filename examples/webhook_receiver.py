"""A receiver of webhooks in the standard library: what is signed has one effect, however often it comes.

It listens on the port that it is given, and writes pictures and failures into `webhooks.db`, or the file that the
variable `RECEIVER_DATABASE` names. From the folder of the clone:

    python examples/webhook_receiver.py 8000

Beside it runs a worker that may send to this machine, and something is submitted with the receiver's address:

    ZLORA_ALLOW_HOSTS=127.0.0.1:8000 zlora up
    zlora submit "a lighthouse at dusk" --webhook-url http://127.0.0.1:8000/

Elsewhere `ZLORA_WEBHOOK_SECRET` is the same for both; `zlora up` has one by itself, and the receiver finds it.
"""

import os
import sqlite3
import sys
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from zlora.errors import InvalidWebhook
from zlora.webhook import Event, Verifier

DATABASE = os.environ.get("RECEIVER_DATABASE", "webhooks.db")
LARGEST = 10_000_000  # bytes of a message; a usual one has some 3,000
TABLE = (
    "CREATE TABLE IF NOT EXISTS ended (event TEXT PRIMARY KEY, job TEXT, picture TEXT, error TEXT)"
)


class Receiver(BaseHTTPRequestHandler):
    """204: it is done, and no worker sends it again; 400: it is not believed."""

    verifier: Verifier  # one for all requests: it remembers what it has heard
    timeout = 10  # seconds that a sender may be silent

    def do_POST(self) -> None:
        """Verify the bytes as they came, then do what they ask for."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST:
            return self._answer(413)
        try:
            event = self.verifier.verify(self.rfile.read(int(length)), dict(self.headers))
        except InvalidWebhook as error:
            self.log_error("%s", error)
            return self._answer(400)
        if record(event):
            self.log_message("job %s has ended: %s", event.job_id, event.type)
        return self._answer(204)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.end_headers()


def record(event: Event) -> bool:
    """Write the job's end down; False where this event was heard before. What it pays, do in the same transaction."""
    picture = event.result.images[0].url if event.result else None
    row = (event.id, event.job_id, picture, event.error.code if event.error else None)
    with closing(sqlite3.connect(DATABASE)) as database, database:
        database.execute(TABLE)
        return (
            database.execute("INSERT OR IGNORE INTO ended VALUES (?, ?, ?, ?)", row).rowcount == 1
        )


if __name__ == "__main__":
    Receiver.verifier = Verifier.from_env()
    with ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Receiver) as server:
        print(f"listening on http://127.0.0.1:{server.server_port}/", flush=True)
        server.serve_forever()
