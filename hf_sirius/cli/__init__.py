"""The command line, `hf-sirius`."""
