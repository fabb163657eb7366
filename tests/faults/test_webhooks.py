"""A webhook through a real worker: its child ends the job, and its sidecar sends the webhook."""

import base64
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Final

from support.processes import wait_until
from support.scene import Scene
from zlora import config
from zlora.webhook import Event, Verifier

SECRET: Final = "whsec_" + base64.b64encode(b"k" * 32).decode()


def test_a_receiver_accepts_the_event_of_a_job(
    scene: Scene,
) -> None:
    """The event has the result that the producer gets."""
    events: list[Event] = []
    verifier = Verifier(SECRET)

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            events.append(verifier.verify(body, dict(self.headers)))
            self.send_response(204)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        host = f"127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with scene.worker(**{config.WEBHOOK_SECRET: SECRET, config.ALLOW_HOSTS: host}):
            job = scene.submit(options={"webhook_url": f"http://{host}/jobs"})
            result = job.result(timeout=30)
            wait_until(lambda: events, "the receiver has the event")
        server.shutdown()

    (event,) = events
    assert (event.job_id, event.type, event.result) == (job.id, "job.succeeded", result)
