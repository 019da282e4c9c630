"""The stages of a run, a module for each part of the way, and the table that says in which order they stand."""
