"""What examples/imagenet_eval.py is made of."""
