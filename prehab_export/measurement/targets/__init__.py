"""Targets: the places where a kit of graphs is measured, from a process of its own here to a browser on a phone."""
