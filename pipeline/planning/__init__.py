"""Predicts the time, memory, disk and network traffic of a job, from shapes alone."""
