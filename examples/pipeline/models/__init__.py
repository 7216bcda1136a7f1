"""Backbones by name, checkpoints, trained encoders, and their export to other libraries."""
