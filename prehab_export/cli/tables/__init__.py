"""The tables that verbs print on the terminal, in one module for each verb."""
