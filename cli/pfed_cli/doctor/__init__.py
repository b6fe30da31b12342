"""`pfed doctor`: what is wrong with a deployment, found out before a federation does."""
