"""Where a job runs: connecting to Ray, placement, dispatch, and the command line."""
