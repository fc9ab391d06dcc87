"""Two pipelines of four stages, the third of which teaches a shortcut; what ``benchmarks/spurious.py`` measures."""
