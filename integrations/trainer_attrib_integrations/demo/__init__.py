"""The demo behind ``trainer-attrib demo``: real facts, three trainers, one ledger, one report."""
