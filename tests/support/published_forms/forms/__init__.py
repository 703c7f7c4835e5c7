"""The forms, by family: each module has its own as `FORMS`."""
