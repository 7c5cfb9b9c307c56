"""Models that the tests run on: regions written once and spelled in several ways, blocks, whole networks."""
