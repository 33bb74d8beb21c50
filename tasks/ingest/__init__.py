"""Read every source into the tables that later stages use."""
