"""How a client finds the experts nearest to its own prompt. Imports no torch."""
