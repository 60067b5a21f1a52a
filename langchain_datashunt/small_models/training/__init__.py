"""Training small models: settings, loops, processes and model selection."""
