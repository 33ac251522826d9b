"""Changing graphs: rules declare, the driver does."""
