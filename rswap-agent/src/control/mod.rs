//! The agent's mutating calls, over a unix socket, and the client that the command line uses.
