"""`prox24 sweep`: prunes and evaluates one model with many settings."""
