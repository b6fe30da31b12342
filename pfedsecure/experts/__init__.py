"""How the prompts that clients lend each other travel. Imports no torch."""
