"""What people read of a finished job: the report's page, tables and plots, and comparisons."""
