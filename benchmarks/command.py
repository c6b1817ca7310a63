"""`steersman bench`: what guidance costs beside plain decoding, or under load."""

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """`steersman bench load …` sends traffic at rising rates; without `load` the cost of a guided token is measured."""
    if argv and argv[0] == "load":
        from steersman.benchmarks import load

        return load.main(argv[1:])
    from steersman.benchmarks import overhead

    return overhead.main(argv)
