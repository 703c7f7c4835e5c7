"""Models and methods: how layers are read, calibrated and solved."""
