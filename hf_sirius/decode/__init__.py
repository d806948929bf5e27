"""The stock loop and us: how a twin is attached, asked for candidates, and verified."""
