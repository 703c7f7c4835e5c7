"""What each weight of a block is for, seen from what a forward does with it."""
