"""One rank of a job: its work in each phase, with Ray or without."""
