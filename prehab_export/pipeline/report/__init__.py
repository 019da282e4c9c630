"""The report of a run with its plots, the model card, and the check of ``--min-speedup``."""
