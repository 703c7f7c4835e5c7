"""How good a model is: perplexity, likelihoods of continuations, and lm-eval's tasks."""
