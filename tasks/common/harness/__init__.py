"""The harness that runs one stage: what a stage is given, how it is executed, launched and recorded."""
