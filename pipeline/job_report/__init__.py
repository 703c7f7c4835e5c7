"""What a finished job tells: one HTML page, and its layers as a table for programs."""
