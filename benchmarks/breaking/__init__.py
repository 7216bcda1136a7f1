"""The faults of fault_drill.py: in ranks of the trainer, and in hosts and the links between them."""
