"""Emulated edges: all of the real ones but the drafter, many to a core."""
