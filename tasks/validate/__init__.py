"""Check, curate and report the tables; rejected rows keep their reasons."""
