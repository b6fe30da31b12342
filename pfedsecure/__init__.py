"""What the server and the clients of a federation share; it knows nothing of either."""

__version__ = "0.1.0"
