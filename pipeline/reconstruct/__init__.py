"""Block reconstruction: the kept weights of a pruned block are trained. Tensors in, tensors out."""
