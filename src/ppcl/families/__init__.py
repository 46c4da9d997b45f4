"""Model families: one folder per family with everything specific to it, and the modules that families share."""
