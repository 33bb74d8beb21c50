"""Join all evaluations into one scorecard and judge the gates."""
