"""What the benchmarks' commands measure with: timing, memory, cases, peers, records and tables."""
