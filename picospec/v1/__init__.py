"""Generated from proto/picospec/v1/speculation.proto by `make proto`; do not edit."""
