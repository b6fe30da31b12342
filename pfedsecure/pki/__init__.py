"""Certificates, keys and the secrets that clients share: the authority, the identities it approves, and every check."""
