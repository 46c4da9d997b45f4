"""Damage, kills, nonsense and malice, many of each: `make battery`."""
