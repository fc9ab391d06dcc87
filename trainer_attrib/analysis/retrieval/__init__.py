"""Finding few among everything that was seen in training: filters, both ends of a ranking, sums over groups."""
