"""Ray workers: thin classes that hold a worker's state; each method calls one pipeline function."""
