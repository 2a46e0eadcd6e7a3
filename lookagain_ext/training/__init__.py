"""Training: supervised fine-tuning with visual re-injection in the forward pass."""
