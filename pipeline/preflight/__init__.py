"""What is checked before compute: disk, memory, scratch, and folders that all nodes share."""
