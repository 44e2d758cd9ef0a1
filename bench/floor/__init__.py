"""The floor: what the default settings do where drafts do not help, beside where they do."""
