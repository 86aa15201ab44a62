"""Side-by-side speed tables: `python -m benchmarks`, or `make bench`."""
