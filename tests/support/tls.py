"""TLS in front of a Redis that has none: a proxy that wants certificates of its clients."""

import asyncio
import ssl
import threading
from collections.abc import Coroutine
from typing import Any, Final, Self, TypeVar

from support.servers import Authority

T = TypeVar("T")

_CHUNK: Final = 65_536  # bytes


class TlsFront:
    """Listens on a free port of loopback, and forwards what it decrypts to the port `target`."""

    def __init__(self, target: int, authority: Authority, *, clients: Authority | None) -> None:
        """Take the authorities of the certificates of server (for `localhost`) and clients."""
        self._target, self._context = target, authority.server("localhost")
        if clients is not None:
            self._context.verify_mode = ssl.CERT_REQUIRED
            self._context.load_verify_locations(clients.bundle)
        self.accepted = 0  # connections whose handshake both sides have finished
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda *_: None)  # handshakes fail on purpose
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = self._run(self._start())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _run(self, action: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(action, self._loop).result(10)

    async def _start(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _stop(self) -> None:
        self._server.close()
        while tasks := asyncio.all_tasks(self._loop) - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.01)  # the loop closes aborted connections, and begins others

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            ahead = await asyncio.open_connection("127.0.0.1", self._target)
            try:
                await asyncio.gather(_pump(reader, ahead[1]), _pump(ahead[0], writer))
            finally:
                ahead[1].transport.abort()
        except (OSError, asyncio.CancelledError):  # a fault of either side, or the end of the test
            pass
        finally:
            writer.transport.abort()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(_CHUNK):
        sink.write(data)
        await sink.drain()
    sink.close()
