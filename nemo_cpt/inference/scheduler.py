"""Requests of many clients, answered by one thread that owns the model: a bounded queue and one batch."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from nemo_cpt.inference.decoding import Decoder, Request
from nemo_cpt.inference.engine import Piece


class QueueFullError(Exception):
    """As many requests wait as may."""


class StoppedError(Exception):
    """The server ended before the reply did."""


@dataclass(eq=False)
class Ticket:
    """A request's place in the queue, and later in the batch."""

    request: Request
    loop: asyncio.AbstractEventLoop
    pieces: "asyncio.Queue[Piece | Exception]" = field(default_factory=asyncio.Queue)
    gone: bool = False  # nobody waits for it any more

    def give(self, item: Piece | Exception) -> None:
        """Hand a piece over to the event loop's thread."""
        try:
            # asyncio's queue is not for two threads; the loop's own thread puts.
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, item)
        except RuntimeError:  # the loop was closed: the server is gone, and so is the client
            self.gone = True

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while True:
            item = await self.pieces.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finish_reason:
                return


class Scheduler:
    """Continuous batching: between two steps, requests that wait join the batch, and those without a client leave it.

    Args:
        decoder: the batch; this object's thread alone touches it and the model.
        most_rows: requests in the batch at once.
        batch_tokens: tokens of prompts and replies, padding included, that the batch may come to hold.
        most_waiting: requests in the queue; more are refused.
        ended: called with each request as it leaves the batch, however that came, before its client hears of it.
    """

    def __init__(
        self, decoder: Decoder, most_rows: int, batch_tokens: int, most_waiting: int, ended: Callable[[Request], None]
    ) -> None:
        self.decoder, self.most_rows, self.batch_tokens, self._ended = decoder, most_rows, batch_tokens, ended
        # Bounded: beyond that, a client is better told to come back than kept waiting.
        self.most_waiting = most_waiting
        self._waiting: queue.Queue[Ticket | None] = queue.Queue(most_waiting)
        self._next: Ticket | None = None  # taken from the queue, and waiting for room
        self._running: dict[Request, Ticket] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="nemo-cpt decoder", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._waiting.qsize() + (self._next is not None)

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    def submit(self, request: Request) -> Ticket:
        """Put a request into the queue; its pieces come out of the ticket. Call it in the event loop.

        Raises:
            QueueFullError: as many wait as may.
            CptError: it cannot be answered within the model's context.
        """
        # In the client's thread: what cannot be answered does not wait in the queue first.
        self.decoder.check(request)
        ticket = Ticket(request, asyncio.get_running_loop())
        try:
            self._waiting.put_nowait(ticket)
        except queue.Full:
            raise QueueFullError from None
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Let the next step go without this request; in the queue its place is free at once."""
        ticket.gone = True
        with self._waiting.mutex, contextlib.suppress(ValueError):
            self._waiting.queue.remove(ticket)

    def stop(self) -> None:
        """Have the thread end after its current step; requests that are not answered yet get an error."""
        self._closing = True
        with contextlib.suppress(queue.Full):  # which does as well: the thread is to wake up
            self._waiting.put_nowait(None)

    def close(self) -> None:
        """Stop, and wait for the end."""
        self.stop()
        self._thread.join()

    def _work(self) -> None:
        while not self._closing:
            try:
                # Here alone are rows taken out: only this thread may touch the batch.
                for ticket in [each for each in self._running.values() if each.gone]:
                    self.decoder.cancel(ticket.request)
                    del self._running[ticket.request]
                    self._ended(ticket.request)
                self._join(self._joining())
                self._hand_out(self.decoder.step())
            except Exception as error:  # these clients are told, the next ones are served
                self._fail(error)
        self._fail(StoppedError("the server is shutting down"))

    def _join(self, joining: list[Ticket]) -> None:
        """Take requests into the batch; where that fails, those in it go on."""
        try:
            pieces = self.decoder.add([ticket.request for ticket in joining]) if joining else []
        except Exception as error:
            for ticket in joining:
                self.decoder.cancel(ticket.request)
                self._end(ticket, error)
        else:
            self._hand_out(pieces)

    def _joining(self) -> list[Ticket]:
        """Those that join now, in the order of the queue; waits for one where the batch is empty."""
        joining: list[Ticket] = []
        while True:
            if self._next is None:
                try:
                    # With nothing to do it sleeps here, until a request or None comes.
                    self._next = self._waiting.get(block=not self._running)
                except queue.Empty:
                    return joining
            if self._next is not None and self._next.gone:
                self._next = None
            # The next in turn is waited for, though a shorter one behind it would fit: none waits for ever.
            elif self._next is None or not self._fits(self._next.request):
                return joining
            else:
                joining.append(self._next)
                self._running[self._next.request] = self._next
                self._next = None

    def _fits(self, request: Request) -> bool:
        """Whether the batch's keys and values stay within `batch_tokens`, however long its replies become."""
        lengths = [each.longest for each in (*self._running, request)]
        # One alone is always taken: it was checked against the model's context.
        return len(lengths) == 1 or (
            len(lengths) <= self.most_rows and max(lengths) * len(lengths) <= self.batch_tokens
        )

    def _hand_out(self, pieces: list[tuple[Request, Piece]]) -> None:
        for request, piece in pieces:
            ticket = self._running[request]
            if piece.finish_reason:
                self._end(ticket, request.error or piece)
            else:
                ticket.give(piece)

    def _end(self, ticket: Ticket, last: Piece | Exception) -> None:
        del self._running[ticket.request]
        self._ended(ticket.request)
        ticket.give(last)

    def _fail(self, error: Exception) -> None:
        self.decoder.clear()
        for ticket in list(self._running.values()):
            self._end(ticket, error)
        if self._closing and self._next is not None:
            self._next.give(error)
        # Nobody takes from the queue any more: whoever waits there would wait for ever.
        while self._closing:
            try:
                ticket_or_none = self._waiting.get_nowait()
            except queue.Empty:
                return
            if ticket_or_none is not None:
                ticket_or_none.give(error)
