"""Second moments of layer inputs: observed, accumulated, and summed over the workers."""
