"""What the measurement costs and what the alerts find; each module is a command."""
