"""Work that forked processes share."""

import signal
from typing import Any

from nemo_cpt.corpus.processes import in_order


def sees_of_interrupts(_: int) -> Any:
    return signal.getsignal(signal.SIGINT)


def test_an_interrupt_is_the_parents_and_leaves_no_worker_waiting() -> None:
    assert [seen for _, seen in in_order(sees_of_interrupts, range(8), workers=2)] == [signal.SIG_IGN] * 8
