"""Tests; they need no network and no server. `make test` runs them."""
