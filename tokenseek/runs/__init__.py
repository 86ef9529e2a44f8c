"""Whole runs: what the launch scripts and the command line call."""
