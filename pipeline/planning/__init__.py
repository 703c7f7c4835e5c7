"""What a job will take, before it starts: time, memory, disk and network, from shapes alone."""
