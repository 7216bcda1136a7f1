"""What the example scripts share."""
