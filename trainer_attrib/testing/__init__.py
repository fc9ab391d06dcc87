"""Contract suite that any integration can inherit: a zoo of small modules and the oracle they are checked against."""
