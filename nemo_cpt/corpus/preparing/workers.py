"""Forked processes that encode tasks and write them where they are told.

A task's life, whose states `job.Job` keeps:
    1. ("encode", task) goes to a free worker, which answers with an `Encoded`: sizes and counts. The payloads are
       large and stay in the worker (`held`); they cross no pipe.
    2. ("write", index, offsets) goes to the same worker once the sizes of all earlier tasks are known, because only
       these say where its bytes belong.
    3. The worker writes them there itself and answers with the index.
So tasks are encoded and written in any order, and the output does not depend on the number of workers.
"""

import gc
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from nemo_cpt.corpus.atomic_files import write_at
from nemo_cpt.corpus.preparing.encode import Encoded, Work
from nemo_cpt.corpus.reading.chunks import Task
from nemo_cpt.corpus.tokenization.tokenizer import FastEncoder
from nemo_cpt.errors import CptError

AHEAD = 2  # payloads that a worker may hold while an earlier task is still being encoded


@dataclass
class Worker:
    """A worker as the parent sees it.

    Attributes:
        connection: The parent's end of its pipe.
        task: The task that it encodes, None when it is free.
        held: Tasks encoded but not written yet.
    """

    process: Any
    connection: Connection
    task: Task | None = None
    held: set[int] = field(default_factory=set)

    @property
    def free(self) -> bool:
        """Whether it may be given a task."""
        return self.task is None and len(self.held) < AHEAD


def count_processes(workers: int | None) -> int:
    """Return how many processes to use: so many, or all CPUs that this process may use.

    In a Slurm job those are the ones that it was given, also where nothing binds it to them.

    Raises:
        CptError: Fewer than one.
    """
    if workers is not None and workers < 1:
        raise CptError(f"workers is {workers}; it must be at least 1.")
    given = os.environ.get("SLURM_CPUS_ON_NODE", "")
    return workers or min(len(os.sched_getaffinity(0)), int(given) if given.isdigit() else os.cpu_count() or 1)


class Pool:
    """`count` workers over the output files."""

    def __init__(self, count: int, work: Work, outputs: Sequence[int]) -> None:
        # Fork, not spawn: the encoder's tables are shared, and not pickled or loaded once more for each worker.
        context = multiprocessing.get_context("fork")
        self.workers: list[Worker] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            # A pipe reports its end only when every copy of its other end is closed, those in siblings included.
            others = [worker.connection for worker in self.workers] + [ours]  # which a fork inherits
            process = context.Process(target=_serve, args=(theirs, others, work, outputs), daemon=True)
            process.start()
            theirs.close()  # so that the worker's end of the pipe closes with the worker
            self.workers.append(Worker(process, ours))

    def give(self, worker: Worker, task: Task) -> None:
        """Hand a task to a free worker."""
        worker.task = task
        self._send(worker, ("encode", task))

    def write(self, worker: Worker, index: int, offsets: Sequence[int]) -> None:
        """Tell a worker where a task's payloads go."""
        self._send(worker, ("write", index, offsets))

    def _send(self, worker: Worker, message: tuple[Any, ...]) -> None:
        try:
            worker.connection.send(message)
        except OSError:
            raise self._last_word(worker) from None

    def _last_word(self, worker: Worker) -> CptError:
        """Return what a worker that has ended said was wrong; answers from before may lie in front of it."""
        with suppress(EOFError, OSError):
            # What killed a worker often is in its last message, behind answers that nobody has read yet.
            while worker.connection.poll():
                if isinstance(answer := worker.connection.recv(), CptError):
                    return answer
        return self._death(worker)

    def answers(self, timeout: float | None) -> Iterator[tuple[Worker, Any]]:
        """Yield what workers have to say: (worker, (task, Encoded)) or (worker, index written).

        Raises:
            CptError: A worker died, or could not read or write.
        """
        by_connection = {worker.connection: worker for worker in self.workers}
        for connection in wait(list(by_connection), timeout):
            worker = by_connection[connection]  # type: ignore[index]
            try:
                answer = worker.connection.recv()
            except (EOFError, OSError):
                raise self._death(worker) from None
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, Encoded):  # step 1 is done; the worker may take another task while it holds this one
                task, worker.task = worker.task, None
                assert task is not None
                worker.held.add(task.index)
                yield worker, (task, answer)
            else:  # an index: step 3 is done
                worker.held.discard(answer)
                yield worker, answer

    def _death(self, worker: Worker) -> CptError:
        ended = how_it_ended(worker.process)
        hint = " The system may have run out of memory: use fewer workers." if "SIGKILL" in ended else ""
        return CptError(f"A worker process died with {ended}.{hint} Run the same command again.")

    def stop(self) -> None:
        """End the workers: those that wait leave at the closed pipe, those that work are killed."""
        for worker in self.workers:
            worker.connection.close()
            # SIGKILL: a handler of SIGTERM that the fork inherited would wait for the end of the encoder's call.
            worker.process.kill()
            worker.process.join()


def how_it_ended(process: Any) -> str:
    """Return how a process ended, in words."""
    process.join(5)
    code = process.exitcode
    return f"signal {-code} ({signal.Signals(-code).name})" if code and code < 0 else f"exit code {code}"


def _serve(connection: Connection, others: list[Connection], work: Work, outputs: Sequence[int]) -> None:
    """Be a worker until the parent closes the pipe or dies."""
    # Else the first collection here copies the pages that this process shares with its parent. Not there: a caller may
    # have frozen what it has, and to walk over what NeMo has imported takes a second.
    gc.freeze()
    # Ctrl-C goes to the whole process group; workers that die first would look like a crash.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    # One process a CPU already: threads of the Rust pool would only fight for them, and do not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"  # fastokens' pool, which long texts begin here
    for other in others:  # held open here, they would hide the parent's death from the others
        other.close()
    held: dict[int, list[list[bytes]]] = {}  # by task, then by output file: its payload in pieces
    try:
        while True:
            # The end of the pipe is the order to leave, which even a parent that is killed gives.
            kind, *arguments = connection.recv()
            if kind == "encode":
                encoded, held[arguments[0].index] = _encode(arguments[0], work)
                connection.send(encoded)
            else:
                index, offsets = arguments
                for output, pieces, offset in zip(outputs, held.pop(index), offsets, strict=True):
                    _write(output, pieces, offset)
                connection.send(index)
    except CptError as error:
        connection.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass


def _encode(task: Task, work: Work) -> tuple[Encoded, list[list[bytes]]]:
    try:
        return work(task)
    except OSError as error:
        raise CptError(f"Cannot read {task.path}: {error.strerror}.") from error
    except MemoryError:
        raise CptError(f"Out of memory near byte {task.start} of {task.path}: use fewer workers.") from None
    # Its own message says more than what the last clause would make of it.
    except CptError:
        raise
    except BaseException as error:  # a Rust panic is no Exception
        cure = " Run again with fast=False (--no-fast), which takes the reference tokenizer."
        raise CptError(
            f"{work.encoder.name} failed between the bytes {task.start} and {task.stop} of {task.path}: {error!r}."
            f"{cure if isinstance(work.encoder, FastEncoder) else ''}"
        ) from error


def _write(output: int, pieces: list[bytes], offset: int) -> None:
    try:
        for piece in pieces:
            write_at(output, piece, offset)
            offset += len(piece)
    except OSError as error:
        raise CptError(
            f"Cannot write the tokens: {error.strerror}. Make room and run the same command again."
        ) from error
