"""What examples/experiments.py is made of."""
