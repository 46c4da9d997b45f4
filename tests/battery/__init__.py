"""Damage, kills, nonsense and malice, many of each: `make battery`."""

from ppcl.quiet import quiet_messages

quiet_messages()  # before anything imports the libraries
