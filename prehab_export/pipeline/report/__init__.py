"""What a run tells: the report with its plots, the model card, the check of ``--min-speedup``."""
