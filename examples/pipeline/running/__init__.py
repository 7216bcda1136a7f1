"""How a script runs: its flags, its ranks, Ctrl-C, how it ends, and on what machine."""
