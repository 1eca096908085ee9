"""From the wire to a batch: a log on disk that readers follow."""
