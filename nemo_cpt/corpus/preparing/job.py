"""The running of a `prepare` job: tasks out to the workers, results back in order, checkpoints in between."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate
from typing import Any, NamedTuple

from nemo_cpt.corpus.preparing.encode import Encoded, Work
from nemo_cpt.corpus.preparing.journal import Journal, ReadInput
from nemo_cpt.corpus.preparing.workers import Pool, Worker
from nemo_cpt.corpus.progress import ProgressBar
from nemo_cpt.corpus.reading.chunks import Feed, Task, check_unchanged, texts_of
from nemo_cpt.corpus.reading.sources import Source
from nemo_cpt.corpus.reading.tally import Policy
from nemo_cpt.corpus.tokenization.encoder_choice import Comparison, UnlikeReferenceError
from nemo_cpt.errors import CptError

CHECKPOINT_BYTES = 1 << 30
SAMPLE_TEXTS, SAMPLE_BYTES = 100, 300_000


def first_texts(sources: list[Source], json_key: str) -> list[str]:
    """Return the corpus' first documents, to try tokenizers on: at most 100, 300 kB of them or one's beginning."""
    texts: list[str] = []
    size = 0
    # Small chunks: only the first few hundred kilobytes are wanted, of a file that may have terabytes.
    for task in Feed(sources, json_key, 1 << 18):
        for text in texts_of(task, json_key).texts:
            size += len(text.encode())
            if texts and (size > SAMPLE_BYTES or len(texts) == SAMPLE_TEXTS):
                return texts
            texts.append(text[:SAMPLE_BYTES])  # a whole file may be one document, and the reference encodes slowly
    return texts


class Ready(NamedTuple):
    """A task that is encoded, and the worker that holds its payloads."""

    worker: Worker
    task: Task
    encoded: Encoded


class Placed(NamedTuple):
    """A task whose worker knows where in the output it goes."""

    task: Task
    encoded: Encoded


class Job:
    """One run over what an open journal says is still to do.

    A task passes through `ready`, `placed` and `written` (see `workers`), and is then absorbed. Invariants:
        Places are given out in the tasks' order: `offsets` is where task `next_index` begins, and all before it are
        placed.
        Tasks are absorbed in their order too, and only when written: what `progress` counts is a prefix of the inputs
        whose bytes are all in the output, so that a checkpoint may be taken after any round.

    Args:
        tasks: The tasks from there on.
        sources: The inputs in order.
        journal: The output's journal, open.
        policy: What to do with lines that give no text.
        checkpoint_seconds: Time between checkpoints.
    """

    def __init__(
        self,
        tasks: Iterator[Task],
        sources: list[Source],
        journal: Journal,
        policy: Policy,
        checkpoint_seconds: float,
    ) -> None:
        self.tasks, self.sources, self.journal, self.policy = tasks, sources, journal, policy
        self.starts = list(accumulate((source.nbytes for source in sources), initial=0))  # of each, in all the bytes
        self.progress = journal.progress
        self.checkpoint_seconds = checkpoint_seconds
        self.offsets = journal.sizes(self.progress)  # where the next task's payloads go
        self.ready: dict[int, Ready] = {}  # encoded, but an earlier task is not
        self.placed: deque[Placed] = deque()  # told where to go, in order; the first one may not be written yet
        self.written: set[int] = set()  # of `placed`, those that the workers have written
        self.next_index = 0  # the first task that is not placed
        # Since the last checkpoint, which takes them along:
        self.lengths: list[bytes] = []
        self.problems: list[dict[str, Any]] = []
        self.comparison: Comparison | None = None
        self.inputs: list[ReadInput] = []
        self.before = self.progress.seconds
        self.begin = self.saved = time.monotonic()
        self.saved_bytes = self.progress.nbytes

    def run(self, work: Work, workers: int, bar: ProgressBar, comparison: Comparison | None = None) -> None:
        """Encode and write everything that is left; a failure leaves a checkpoint from which the next run goes on.

        Args:
            work: What workers do.
            workers: Processes.
            bar: The progress.
            comparison: What compares passages of the corpus with the reference, before each checkpoint.

        Raises:
            CptError: As `prepare`.
        """
        self.comparison = comparison
        pool = Pool(workers, work, self.journal.outputs)
        # The bar shows this run's rate; what an earlier run did would make it look faster than it is.
        begun = (self.progress.entries, self.progress.tokens)
        try:
            for _ in self._turns(pool):
                bar.update(self.progress.read, self.progress.entries - begun[0], self.progress.tokens - begun[1])
            # Before the last checkpoint, which takes it along: what then is left to do are the files' names.
            self.progress.finished = True
            pool.stop()
            self._checkpoint()
        except UnlikeReferenceError:
            # First of all: while workers still write, nothing can be cut or begun anew.
            pool.stop()
            self.journal.begin_anew()  # earlier checkpoints compared passages alone: they prove nothing about the rest
            raise
        except BaseException as error:
            pool.stop()
            if isinstance(error, CptError):  # Ctrl-C may come between two counts that belong together
                with suppress(CptError):  # of a full disk; the last checkpoint still holds
                    self.journal.cut_tokens()
                    self._checkpoint()
            raise

    def _turns(self, pool: Pool) -> Any:
        """Keep the workers busy until nothing is left; yield after each round."""
        queue, more = deque[Task](), True
        while more or queue or self._outstanding(pool):
            # One task a round: reading ahead must not keep the answers of the workers waiting.
            if more and len(queue) < len(pool.workers):
                task = next(self.tasks, None)
                more = task is not None
                queue.extend([task] if task else [])
            for worker in pool.workers:
                if queue and worker.free:
                    pool.give(worker, queue.popleft())
            # With a task still to be read, look and go on; else sleep until a worker answers, at most a second, so that
            # checkpoints come in time.
            hungry = more and len(queue) < len(pool.workers)
            for worker, answer in pool.answers(0 if hungry else 1.0) if self._outstanding(pool) else ():
                self._take(pool, worker, answer)
            self._maybe_checkpoint()
            yield

    def _outstanding(self, pool: Pool) -> bool:
        return any(worker.task or worker.held for worker in pool.workers)

    def _take(self, pool: Pool, worker: Worker, answer: Any) -> None:
        """Place results whose predecessors' sizes are all known; absorb those whose predecessors are all written."""
        # An index is step 3's answer, a pair step 1's; see `workers`.
        if isinstance(answer, int):
            self.written.add(answer)
        else:
            task, encoded = answer
            self.ready[task.index] = Ready(worker, task, encoded)
        # One answer may close a gap, behind which several tasks have been waiting.
        while self.next_index in self.ready:
            owner, task, encoded = self.ready.pop(self.next_index)
            pool.write(owner, task.index, self.offsets)
            self.placed.append(Placed(task, encoded))
            sizes = self.journal.sizes(encoded)
            self.offsets = [offset + size for offset, size in zip(self.offsets, sizes, strict=True)]
            self.next_index += 1
        while self.placed and self.placed[0].task.index in self.written:
            task, encoded = self.placed.popleft()
            self.written.discard(task.index)
            self._absorb(task, encoded)

    def _absorb(self, task: Task, encoded: Encoded) -> None:
        """Count a written task in; tasks come in the inputs' order."""
        progress, source = self.progress, self.sources[task.source]
        if task.last:
            # Before anything is counted: an input that changed must not be in the next checkpoint.
            check_unchanged(source, task)
        self.problems += progress.tally.add(task, encoded.reading, source, self.policy)
        progress.nbytes += encoded.nbytes
        progress.entries += encoded.documents
        progress.tokens += encoded.tokens
        progress.longest = max(progress.longest, encoded.longest)
        progress.largest = max(progress.largest, encoded.largest)
        progress.empty += encoded.empty
        # The cursor of a resumed run, and the hash by which it knows that what lies before is still the same.
        progress.source, progress.position, progress.before = task.source, task.stop, task.hash
        if task.last:
            self.inputs.append(ReadInput(source.stamp, task.hash))
            progress.source, progress.position, progress.before = task.source + 1, 0, ""
        progress.read = self.starts[task.source] + task.done
        for number, count in encoded.special.items():
            progress.special[str(number)] = progress.special.get(str(number), 0) + count
        for name, count in encoded.counts.items():
            progress.counts[name] = progress.counts.get(name, 0) + count
        self.lengths.append(encoded.lengths)
        if self.comparison:
            self.comparison.add(encoded.passages)

    def _maybe_checkpoint(self) -> None:
        old = time.monotonic() - self.saved > self.checkpoint_seconds
        if old or self.progress.nbytes - self.saved_bytes > CHECKPOINT_BYTES:
            self._checkpoint()

    def _checkpoint(self) -> None:
        if self.comparison:
            self.progress.compared += self.comparison.run()  # first: nothing that differs may be recorded as done
        self.progress.seconds = self.before + time.monotonic() - self.begin
        self.journal.checkpoint(b"".join(self.lengths), self.problems, self.inputs)
        self.lengths, self.problems, self.inputs = [], [], []
        self.saved, self.saved_bytes = time.monotonic(), self.progress.nbytes
