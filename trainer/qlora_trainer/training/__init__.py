"""Training on one rank: set up, step after step, finish; and how a rank's end is reported."""
