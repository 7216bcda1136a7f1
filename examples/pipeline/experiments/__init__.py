"""Helpers of examples/experiments.py."""
