"""The stages of a run, the options and results that each depends on, and the table that lists them in order."""
