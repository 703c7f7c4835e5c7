"""Devices, threads, clocks, free memory, and how work is divided over the workers."""
