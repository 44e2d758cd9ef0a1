"""A result as a report: its text, tables and plots, and what the simulation predicted."""
