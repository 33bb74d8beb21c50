"""The service: it answers with an exported package and knows nothing of training, DVC or Prefect."""
