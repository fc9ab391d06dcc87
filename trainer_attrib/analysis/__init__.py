"""Ledger -> results: behaviors are measured on moved weights, queries are scored against recorded rows."""
