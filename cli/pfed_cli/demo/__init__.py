"""`pfed demo`: a real federation on this machine, server and clients as processes over mutual TLS, and a report."""
