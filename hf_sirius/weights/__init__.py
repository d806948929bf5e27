"""What a draft reads: the formats of its weights, which of them it holds, and how they get there."""
