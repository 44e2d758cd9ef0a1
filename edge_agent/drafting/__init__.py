"""Drafting: a small model that proposes tokens, in a process of its own.

A command's way: `context.DraftContext` (event loop) -> `process.DraftingProcess` -> a pipe
(`ipc`) -> `worker_main` -> `worker.DraftWorker` -> `drafter.DrafterContext` -> a runtime (`onnx`,
`torch`, `ngram`); events come back the same way. `messages` has all that travels, `scripted` the
doubles.
"""
