"""Text, as it is stored, to calibration and evaluation sequences of tokens."""
