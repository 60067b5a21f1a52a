"""Helpers that do not depend on routing: settings, lazy imports, files, locks after a fork, prices."""
