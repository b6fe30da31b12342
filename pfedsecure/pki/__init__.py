"""Certificates and keys: the authority, the identities it approves, and the checks that both sides of a call run."""
