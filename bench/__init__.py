"""Measurements: every figure is measured in the run that prints it, beside its baseline."""
