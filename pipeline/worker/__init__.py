"""One rank of a job: what it does in each phase, whoever runs it."""
