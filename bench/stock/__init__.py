"""The baseline: stock vLLM as a server, and its client."""
