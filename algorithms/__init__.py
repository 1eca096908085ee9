"""The mathematics: policies and losses. No sockets, files, clocks or logging."""
