"""Put one model through the evaluations that apply to it."""
