"""`prox24 doctor`: what each node has, and what of it is wrong, with the remedy."""
