"""A receiver of webhooks in the standard library: a repeated event has no second effect.

It listens on the given port, and records images and failures in `webhooks.db`, or in the file that
the variable `RECEIVER_DATABASE` names. From the folder of the clone:

    python examples/webhook_receiver.py 8000

It needs a worker that is allowed to send to this machine, and a job with the receiver's address:

    ZLORA_ALLOW_HOSTS=127.0.0.1:8000 zlora up
    zlora submit "a lighthouse at dusk" --webhook-url http://127.0.0.1:8000/

`zlora up` makes a secret that the receiver finds on this machine. On other machines, set
`ZLORA_WEBHOOK_SECRET` to the same value for both.
"""

import os
import sqlite3
import sys
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from zlora.errors import InvalidWebhook
from zlora.webhook import Event, Verifier

DATABASE = os.environ.get("RECEIVER_DATABASE", "webhooks.db")
LARGEST = 10_000_000  # bytes of a message; most have about 3,000
TABLE = (
    "CREATE TABLE IF NOT EXISTS ended (event TEXT PRIMARY KEY, job TEXT, image TEXT, error TEXT)"
)


class Receiver(BaseHTTPRequestHandler):
    """Answers 204 for an event that is recorded, and 400 for one that is not signed."""

    verifier: Verifier  # shared by all requests: it remembers the events
    timeout = 10  # seconds without data from a sender

    def do_POST(self) -> None:
        """Verify the unchanged bytes, then record the event."""
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
    """Record the end of a job; return False for a repeated event.

    Do whatever the event causes in the same transaction.
    """
    image = event.result.images[0].url if event.result else None
    row = (event.id, event.job_id, image, event.error.code if event.error else None)
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
