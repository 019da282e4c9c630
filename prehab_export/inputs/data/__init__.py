"""Prepares data for the tasks: opens it, finds its columns and labels, splits it and makes batches."""
