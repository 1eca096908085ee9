"""Server-only rooms: gateway, membership, registry, release store."""
