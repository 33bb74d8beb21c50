"""Fine-tuning on conversations, or with a head on labels and numbers."""
