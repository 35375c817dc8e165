"""What auto-round writes into configs."""
