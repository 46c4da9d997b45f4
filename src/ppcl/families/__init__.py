"""Model families: a folder each for all that is odd about a model, and what they share."""
