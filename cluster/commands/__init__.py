"""The commands of `prox24`, one file each, listed in `cluster.command_line`."""
