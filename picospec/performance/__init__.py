"""How fast speculation is, before it is run: the paper's model and ours.

`costs` are what the models are fed, in milliseconds and bytes; `prediction` has closed forms, fast
enough for the edge's draft-length control; `simulation` is an event simulation of the same system.
"""
