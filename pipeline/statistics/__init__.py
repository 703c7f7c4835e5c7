"""Second moments of layers' inputs: observed, added up, and summed over the ranks."""
