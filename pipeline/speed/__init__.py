"""How fast 2:4 weights are on the GPU at hand: `prox24 bench`."""
