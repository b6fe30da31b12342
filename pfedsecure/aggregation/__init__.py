"""How the clients' prompts become the global prompt. Imports no torch."""
