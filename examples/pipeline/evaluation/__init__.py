"""Evaluates an encoder: features, protocols, and the commands of examples/imagenet_eval.py."""
