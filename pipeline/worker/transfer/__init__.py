"""What moves a rank's bytes between its device, the host and files, beside its computation."""
