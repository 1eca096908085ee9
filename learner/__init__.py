"""Sampler -> update -> publish."""
