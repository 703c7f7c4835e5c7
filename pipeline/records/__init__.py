"""The JSON files of a run directory: for each, its writer and reader in one module.

Their schema numbers are in `schemas`.
"""
