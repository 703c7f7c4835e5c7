"""The machine under a job: devices, threads, clocks, free memory, and how work is divided."""
