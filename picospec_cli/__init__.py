"""The `picospec` command: prepares models, runs a demo, chats, and examines an installation."""
