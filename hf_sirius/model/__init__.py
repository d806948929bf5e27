"""What a transformers model is, for us: the one place that knows families, accelerate's hooks and versions."""
