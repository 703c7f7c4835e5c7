"""Evaluation of a model: perplexity, likelihoods of continuations, and lm-eval's tasks."""
