"""The running of a `prepare` job: tasks out to the workers, results back in order, checkpoints in between."""

import time
from collections import deque
from dataclasses import asdict
from typing import Any

from nemo_cpt.corpus.choice import Comparison, UnlikeReferenceError
from nemo_cpt.corpus.encode import Encoded, Layout, texts_of
from nemo_cpt.corpus.feed import Feed, Task, hash_source
from nemo_cpt.corpus.journal import Journal, Progress
from nemo_cpt.corpus.lines import Problem
from nemo_cpt.corpus.progress import ProgressBar
from nemo_cpt.corpus.sources import Source
from nemo_cpt.corpus.tokenizer import Encoder
from nemo_cpt.corpus.workers import Pool, Worker
from nemo_cpt.errors import CptError

CHECKPOINT_BYTES = 1 << 30
SAMPLE_TEXTS, SAMPLE_BYTES = 100, 300_000


def first_texts(sources: list[Source], json_key: str) -> list[str]:
    """Return the corpus' first documents, to try tokenizers on: at most 100, 300 kB of them or a single one."""
    texts: list[str] = []
    size = 0
    for task in Feed(sources, json_key, 1 << 18):
        for text in texts_of(task, json_key).texts:
            size += len(text.encode())
            if texts and (size > SAMPLE_BYTES or len(texts) == SAMPLE_TEXTS):
                return texts
            texts.append(text)
    return texts


class Job:
    """One run over what an open journal says is still to do.

    Args:
        sources: The inputs in order.
        layout: How documents are laid out.
        journal: The output's journal, open.
        skip: Leave lines out that give no text, instead of stopping there.
        chunk_bytes: Size of a task.
        checkpoint_seconds: Time between checkpoints.
    """

    def __init__(
        self,
        sources: list[Source],
        layout: Layout,
        journal: Journal,
        skip: bool,
        chunk_bytes: int,
        checkpoint_seconds: float,
    ) -> None:
        self.sources, self.layout, self.journal, self.skip = sources, layout, journal, skip
        self.progress = journal.progress
        self.checkpoint_seconds = checkpoint_seconds
        self.feed = Feed(sources, layout.json_key, chunk_bytes, (self.progress.source, self.progress.position))
        self.offset = self.progress.nbytes  # where the next task's tokens go
        self.ready: dict[int, tuple[Worker, Task, Encoded]] = {}  # encoded, but an earlier task is not
        self.placed: deque[tuple[Task, Encoded]] = deque()  # told where to go, in order
        self.written: set[int] = set()
        self.next_index = 0
        self.lengths: list[bytes] = []
        self.problems: list[dict[str, Any]] = []
        self.comparison: Comparison | None = None
        self.before = self.progress.seconds
        self.begin = self.saved = time.monotonic()
        self.saved_bytes = self.progress.nbytes

    def run(self, encoder: Encoder, workers: int, bar: ProgressBar, comparison: Comparison | None = None) -> None:
        """Encode and write everything that is left; a failure leaves a checkpoint from which the next run goes on.

        Args:
            encoder: What encodes.
            workers: Processes.
            bar: The progress.
            comparison: What compares passages of the corpus with the reference, before each checkpoint.

        Raises:
            CptError: As `prepare`.
        """
        self.comparison = comparison
        pool = Pool(workers, encoder, self.layout, self.journal.bin, comparison is not None)
        begun = (self.progress.entries, self.progress.tokens)
        try:
            for _ in self._turns(pool):
                bar.update(self.progress.read, self.progress.entries - begun[0], self.progress.tokens - begun[1])
            self._complete_hashes()
            self.progress.finished = True
        finally:
            pool.stop()
            self._checkpoint()

    def _complete_hashes(self) -> None:
        """Hash what the feed has not: inputs that an earlier run had finished when it was killed."""
        for number, source in enumerate(self.sources):
            known = self.feed.hashes.get(number) or self.progress.hashes.get(str(number))
            self.progress.hashes[str(number)] = known or hash_source(source)

    def _turns(self, pool: Pool) -> Any:
        """Keep the workers busy until nothing is left; yield after each round."""
        tasks, queue, more = iter(self.feed), deque[Task](), True
        while more or queue or self._outstanding(pool):
            if more and len(queue) < len(pool.workers):
                task = next(tasks, None)
                more = task is not None
                queue.extend([task] if task else [])
            for worker in pool.workers:
                if queue and worker.free:
                    pool.give(worker, queue.popleft())
            hungry = more and len(queue) < len(pool.workers)
            for worker, answer in pool.answers(0 if hungry else 1.0) if self._outstanding(pool) else ():
                self._take(pool, worker, answer)
            self._maybe_checkpoint()
            yield

    def _outstanding(self, pool: Pool) -> bool:
        return any(worker.task or worker.held for worker in pool.workers)

    def _take(self, pool: Pool, worker: Worker, answer: Any) -> None:
        """Place results whose predecessors' sizes are all known; absorb those whose predecessors are all written."""
        if isinstance(answer, int):
            self.written.add(answer)
        else:
            task, encoded = answer
            self.ready[task.index] = (worker, task, encoded)
        while self.next_index in self.ready:
            owner, task, encoded = self.ready.pop(self.next_index)
            pool.write(owner, task.index, self.offset)
            self.placed.append((task, encoded))
            self.offset += encoded.nbytes
            self.next_index += 1
        while self.placed and self.placed[0][0].index in self.written:
            task, encoded = self.placed.popleft()
            self.written.discard(task.index)
            self._absorb(task, encoded)

    def _absorb(self, task: Task, encoded: Encoded) -> None:
        """Count a written task in; tasks come in the input's order, so that the first error is the one reported."""
        for problem in self._problems_of(task, encoded):
            self._complain(task, problem)
        progress = self.progress
        progress.nbytes += encoded.nbytes
        progress.entries += encoded.documents
        progress.tokens += encoded.tokens
        progress.longest = max(progress.longest, encoded.longest)
        progress.largest = max(progress.largest, encoded.largest)
        progress.empty += encoded.empty
        progress.blank += encoded.blank
        progress.source, progress.position = (task.source + 1, 0) if task.last else (task.source, task.stop)
        progress.lines = 0 if task.last else progress.lines + encoded.lines
        progress.read = sum(source.size for source in self.sources[: task.source]) + task.done
        for number, count in encoded.special.items():
            progress.special[str(number)] = progress.special.get(str(number), 0) + count
        self.lengths.append(encoded.lengths)
        if self.comparison:
            self.comparison.add(encoded.passages)
        if task.last and not self.sources[task.source].unchanged():
            raise CptError(f"{task.path} changed while it was being read. Run again once nothing writes to it.")

    def _problems_of(self, task: Task, encoded: Encoded) -> list[Problem]:
        problems = list(encoded.problems)
        if task.damage:
            problems.append(Problem("damaged", task.damage, encoded.lines, task.stop))
        elif task.last and self.progress.lines + encoded.lines == 0:
            problems.append(Problem("empty_file", "the file is empty", 0, 0))
        return problems

    def _complain(self, task: Task, problem: Problem) -> None:
        """Note a line left out, or raise."""
        line = self.progress.lines + problem.line + 1
        unit = "row" if isinstance(task.data, list) else "byte offset"
        if not self.skip:
            raise CptError(
                f"{task.path}, line {line}, {unit} {problem.offset}: {problem.detail}. "
                f"Mend it, or leave such lines out with on_error='skip' (--on-error skip)."
            )
        self.progress.skipped[problem.reason] = self.progress.skipped.get(problem.reason, 0) + 1
        self.problems.append(asdict(problem) | {"path": task.path, "line": line})

    def _maybe_checkpoint(self) -> None:
        old = time.monotonic() - self.saved > self.checkpoint_seconds
        if old or self.progress.nbytes - self.saved_bytes > CHECKPOINT_BYTES:
            self._checkpoint()

    def _checkpoint(self) -> None:
        try:
            self._compare()
        finally:
            self.progress.hashes.update({str(number): value for number, value in self.feed.hashes.items()})
            self.progress.seconds = self.before + time.monotonic() - self.begin
            self.journal.checkpoint(b"".join(self.lengths), self.problems)
            self.lengths, self.problems = [], []
            self.saved, self.saved_bytes = time.monotonic(), self.progress.nbytes

    def _compare(self) -> None:
        """Compare passages of what was absorbed with the reference; where they differ, nothing is vouched for."""
        if not self.comparison:
            return
        try:
            self.progress.compared += self.comparison.run()
        except UnlikeReferenceError:
            self.progress = self.journal.progress = Progress()
            self.lengths, self.problems = [], []
            raise
