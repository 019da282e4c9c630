"""Targets, which are the places where a kit of graphs is measured: this machine, another machine, or a browser."""
