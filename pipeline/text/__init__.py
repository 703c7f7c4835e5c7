"""Reads texts and cuts them into calibration and evaluation sequences of tokens."""
