"""A federation in which everything goes wrong, in virtual time: the server's and the clients' own code, with faults of
networks, disks, clocks and processes between them. What happens is a function of the seed and the orders given.

    world = World("secure", folder, seed)
    world.start_server()
    world.run(60)                       # a minute passes, at once
    world.kill_server(); world.start_server()
    world.check()                       # raises Violation when something is not as it must be
    world.end()                         # everything is mended: the federation has to come to its end
"""

import pfedsecure.wire.grpc_settings  # noqa: F401 - must run before any module of this package imports grpc
