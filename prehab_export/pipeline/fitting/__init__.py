"""The fit: the most accurate model within a budget on the target where it will run."""
