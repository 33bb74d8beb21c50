"""Human feedback on answers: the store, its tables, and the HTTP routes that write to it."""
