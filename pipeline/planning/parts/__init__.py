"""The parts of a plan's phases: files, solves, reconstruction."""
