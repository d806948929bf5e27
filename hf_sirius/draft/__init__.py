"""A model that drafts: the twin's modules, what it proposes, and its view of the KV-cache."""
