"""Many clients against one server, over the network: `pfed bench load` measures with it.

Every client is the real one, with a certificate, a state directory and a connection of its own, and does all that the
protocol asks of it. Only its training is replaced: `trainer` makes a small change of the prompt. A few processes
(`worker`) hold the clients; `gathering` makes certificates, starts server and processes, and collects what these saw.
"""
