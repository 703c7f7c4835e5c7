"""Checks before the computation starts: disk, memory, scratch, and folders that nodes share."""
