"""A ledger as pages: live in a browser, or as one file. Only :mod:`live` needs a model."""
