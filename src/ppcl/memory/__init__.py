"""Estimates what every stage of a command needs, before anything is loaded."""
