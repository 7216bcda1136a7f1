"""What fault_drill.py breaks: ranks of the trainer, and hosts with the links between them."""
