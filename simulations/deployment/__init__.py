"""Real deployment: what is refused before a process starts, keys, signed bundles, the gate, and a smoke on loopback."""
