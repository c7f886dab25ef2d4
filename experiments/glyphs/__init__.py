"""Small models of emoji in four styles."""
