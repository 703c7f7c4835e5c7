"""`prox24 sweep`: many settings of one model, pruned and evaluated."""
