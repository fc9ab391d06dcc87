"""Two small trainings repeated on subsets of their examples, for ``influence_lds.py``: data, models, truths."""
