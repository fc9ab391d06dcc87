"""Live training -> ledger. Nothing here changes a loss, a weight or a random state, and no fault here ends a run."""
