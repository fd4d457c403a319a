"""What a dataset that many tasks make will take, before any of them is started: time, disk and network."""

from dataclasses import dataclass

from nemo_cpt.corpus.dataset.index import ITEMSIZE
from nemo_cpt.corpus.plan import Plan
from nemo_cpt.corpus.preparing.parts import settings_of, whole
from nemo_cpt.corpus.reading.chunks import Feed, texts_of
from nemo_cpt.corpus.reading.sources import Source
from nemo_cpt.corpus.tokenization.tokenizer import Tokenizer
from nemo_cpt.errors import CptError

TEXT_BYTES_CPU_S = 50e6
"""Of text that a CPU second encodes: 56e6 measured on a Zen 4 with Llama 3.1's tokenizer, 43e6 out of gzip."""
DISK_BYTES_S = 1e9
"""Of a shared file system, for one process that copies."""
START_SECONDS = 15
"""Of a task: its interpreter, the tokenizer, the comparison of the encoders; `benchmarks/corpus.py` has 3."""
INDEX_BYTES = 20  # a document of one sequence takes in the `.idx`
SAMPLE_BYTES = 1 << 20  # of text that is encoded to know how many tokens a byte gives


@dataclass(frozen=True)
class Sample:
    """What the beginning of a corpus tells of the rest.

    Attributes:
        text: Bytes of text for each byte on disk; above 1 for what is compressed.
        tokens: Tokens for each byte of text.
        documents: Documents for each byte of text.
    """

    text: float
    tokens: float
    documents: float


@dataclass(frozen=True)
class Estimate:
    """What the tasks will take.

    Attributes:
        tasks: How many there are.
        stored: Bytes of all inputs on disk.
        largest: Bytes on disk of the largest share.
        text: Bytes of text in all inputs.
        tokens: Tokens of the dataset.
        dataset: Bytes of its `.bin` and `.idx`.
        disk: Bytes that are taken at the most: the parts and the dataset, until the parts are removed.
        network: Bytes that go over the network, where inputs and outputs are on it.
        task_seconds: Of the task with the largest share.
        all_seconds: Of all tasks, one after the other.
        join_seconds: Of the join.
    """

    tasks: int
    stored: int
    largest: int
    text: int
    tokens: int
    dataset: int
    disk: int
    network: int
    task_seconds: float
    all_seconds: float
    join_seconds: float


def estimate(plan: Plan, tokenizer: Tokenizer, cpus: int) -> Estimate:
    """Estimate a plan from a sample of its first documents.

    Args:
        plan: What the tasks do.
        tokenizer: The plan's, loaded.
        cpus: CPUs that each of them has.

    Raises:
        CptError: The inputs have no size, or no text at their beginning.
    """
    shares = [sum(source.nbytes for source in share) for share in plan.shares]
    if not sum(shares):
        raise CptError("The inputs have no size that is known beforehand: bring them here with `nemo-cpt fetch` first.")
    divided = {source.path: source.size for share in plan.shares for source in share if source.is_range}
    itemsize = ITEMSIZE[whole(plan, tokenizer).dtype]
    return estimate_shares(shares, sum(divided.values()), _sample(plan, tokenizer), itemsize, cpus)


def estimate_shares(shares: list[int], divided: int, sample: Sample, itemsize: int, cpus: int) -> Estimate:
    """Estimate the work on shares of so many bytes.

    Args:
        shares: Bytes on disk of each task's share.
        divided: Bytes of the files that several tasks read, which the join hashes.
        sample: What a byte of them holds.
        itemsize: Bytes of a token.
        cpus: CPUs of each task.
    """
    stored, text = sum(shares), sum(shares) * sample.text
    tokens = text * sample.tokens
    dataset = tokens * itemsize + text * sample.documents * INDEX_BYTES
    seconds = [START_SECONDS + share * sample.text / (TEXT_BYTES_CPU_S * cpus) for share in shares]
    return Estimate(
        tasks=len(shares),
        stored=stored,
        largest=max(shares),
        text=round(text),
        tokens=round(tokens),
        dataset=round(dataset),
        disk=round(2 * dataset),
        # Read by the tasks, written as parts, read and written by the join, and once more what it hashes.
        network=round(stored + 3 * dataset + divided),
        task_seconds=max(seconds),
        all_seconds=sum(seconds),
        join_seconds=START_SECONDS + (2 * dataset + divided) / DISK_BYTES_S,
    )


def _sample(plan: Plan, tokenizer: Tokenizer) -> Sample:
    # The largest stands for all: most of the corpus is in it, or in files like it.
    source = max(plan.sources, key=lambda each: each.size)
    texts, read = _first_texts(source, settings_of(plan).json_key)
    size = sum(len(text.encode()) for text in texts)
    ids, _ = tokenizer.reference_encoder().encode(texts)
    # A token more for each text: the one that ends its document.
    return Sample(size / read, (len(ids) + len(texts)) / size, len(texts) / size)


def _first_texts(source: Source, json_key: str) -> tuple[list[str], int]:
    """Return the first texts of an input, and how many bytes on disk hold them."""
    texts, size = list[str](), 0
    for task in Feed([source], json_key, SAMPLE_BYTES):
        texts += (found := texts_of(task, json_key).texts)
        size += sum(len(text.encode()) for text in found)
        if size >= SAMPLE_BYTES:
            break
    if not size:
        raise CptError(f"{source.path} has no text under {json_key!r}.")
    return texts, max(task.done, 1)
