"""What is printed for people."""

from nemo_cpt.output import size_of


def test_a_size_is_never_shown_as_nothing() -> None:
    sizes = (70, 12_345, 2_100_000, 449_700_000_000)
    assert [size_of(size) for size in sizes] == ["0.1 kB", "12.3 kB", "2.1 MB", "449.7 GB"]
