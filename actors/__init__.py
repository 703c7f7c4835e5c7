"""Ray workers: thin classes that hold a rank's state and call one pipeline function per method."""
