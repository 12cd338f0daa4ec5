"""The tool: `nearfar train`, `evaluate`, `verify` and the other commands."""
