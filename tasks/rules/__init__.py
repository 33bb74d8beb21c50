"""Rules of `params.yaml` beyond the classes of single settings. They only report problems, so no recipe has them."""
