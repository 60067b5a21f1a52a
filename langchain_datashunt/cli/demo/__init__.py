"""The demo command, its figures and the data that it runs on."""
