"""Every JSON of a run directory: its schema number, its writer and its reader in one file each."""
