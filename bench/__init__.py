"""Benchmarks and the serving replay: run from the repository, not part of the wheel."""
