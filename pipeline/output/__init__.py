"""The pruned model's folder: written, described in a card, and verified against its source."""
