"""Data as tasks take it: opened, its columns and labels understood, split, and turned into batches."""
