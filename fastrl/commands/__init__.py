"""The commands that are no training loops."""
