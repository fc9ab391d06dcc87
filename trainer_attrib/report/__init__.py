"""Plain data -> one self-contained HTML page. Knows nothing of ledgers or models; every text is escaped here."""
