"""Results as tables for the terminal, a module for each verb that has one."""
