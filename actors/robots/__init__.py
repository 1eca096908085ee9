"""Robot adapters: a dict of strings in actors/main.py names them."""
