"""A training run: its settings, its loop, its folder, and what it leaves behind."""
