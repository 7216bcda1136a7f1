"""What an encoder is worth: features, protocols, and the commands of examples/imagenet_eval.py."""
