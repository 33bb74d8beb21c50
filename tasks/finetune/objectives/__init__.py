"""Training objectives of fine-tuning."""
