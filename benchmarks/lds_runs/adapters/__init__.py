"""One module per peer library, run by the peer's own Python: its ``METHODS`` score a task's training examples."""
