"""The block loop: its order, its retries, the repair of damage, and what it asks of an executor."""
