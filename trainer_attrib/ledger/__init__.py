"""What is on disk: immutable parts, an atomic manifest per writer, snapshots. Format: docs/ledger-format.md."""
