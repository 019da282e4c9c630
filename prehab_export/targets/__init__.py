"""Measuring where a model will run: kits, and the places that they are taken to."""
