"""uvicorn's HTTP/1.1 with deadlines and problem documents."""

import asyncio
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from zlora.server import problems
from zlora.server.endpoint import CLOSING
from zlora.server.problems import NotHttp

READ_SECONDS: Final = 10.0  # for the head of a request, or for the rest of a body that is not read
WRITE_SECONDS: Final = 30.0  # in which a client reads 48 KiB of what was sent, or the last bytes


class Protocol(H11Protocol):
    """One connection, which ends if its client is too slow.

    uvicorn itself waits for ever until a client has sent the head of a request, has sent the rest
    of a body after the answer, and has read an answer. Bodies that are read have a deadline of
    their own (`zlora.server.open_requests`).
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # uvicorn would answer more connections with plain text, and keep them.
        self._max_connections, self.limit_concurrency = self.limit_concurrency, None
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._max_connections is not None and len(self.connections) > self._max_connections:
            transport.abort()
        self._time_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_reading()
        self._stop_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._time_reading()
        else:  # the request is being answered
            self._stop_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._time_writing()

    def resume_writing(self) -> None:
        self._stop_writing()
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # once the client has read the rest
            self._time_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._time_writing()

    def shutdown(self) -> None:
        self.app_state[CLOSING].set()
        super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP with a problem document."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun
            self.transport.abort()
            return
        answer = problems.answer(NotHttp(msg))
        headers = [*answer.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=answer.status_code, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._time_writing()

    def _time_reading(self) -> None:
        if self._reading is None:
            self._reading = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _time_writing(self) -> None:
        if self._writing is None:
            self._writing = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
