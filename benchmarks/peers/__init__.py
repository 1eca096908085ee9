"""The systems that the benchmarks run beside ours, each in an environment of its own (tools/setup_peers.sh)."""
