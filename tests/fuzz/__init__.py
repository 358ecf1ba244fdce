"""Random programs run by chunkft and by dense training that is masked by hand; see ``python -m tests.fuzz --help``."""
