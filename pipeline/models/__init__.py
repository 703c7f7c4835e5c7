"""A transformers model seen as blocks of linear layers, without its weights."""
