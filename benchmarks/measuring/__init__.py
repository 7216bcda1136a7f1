"""Code that the benchmarks share: timing, memory, cases, peers, records and tables."""
