"""The command line: each command parses, makes one call into commvq_core, and renders."""
