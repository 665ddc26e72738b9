"""Runs, apart from what they learn: settings, folder, log, optimizer, checkpoints, resume."""
