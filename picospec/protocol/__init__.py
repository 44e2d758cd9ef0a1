"""The protocol of one generation (docs/protocol.md), sans I/O.

`messages` are what travels, `codec` their bytes, `validation` their bounds. The state machines:
`EdgeSession` (edge_session.py) is the edge's side, `CloudSession` (cloud_session.py) checks the
order of frames in the gRPC process, `DraftQueue` (draft_queue.py) holds drafts in the engine.
"""
