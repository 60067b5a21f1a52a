"""Helpers without knowledge of routing: settings, sync and async drivers, files, forks, prices."""
