"""The service: serves an exported package. It does not depend on training code, DVC or Prefect."""
