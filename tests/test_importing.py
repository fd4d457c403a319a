"""The garbage collector waits for imports, and for nothing else."""

import gc

import pytest

from nemo_cpt.importing import uncollected


def test_it_comes_back_whatever_the_import_raises() -> None:
    seen = []

    def broken() -> None:
        with uncollected():
            seen.append(gc.isenabled())
            raise ImportError

    with pytest.raises(ImportError):
        broken()
    assert [*seen, gc.isenabled()] == [False, True]


def test_it_stays_off_where_it_was_off() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
